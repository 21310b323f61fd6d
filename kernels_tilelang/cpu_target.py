"""Runs a CUDA-authored, tile-level TileLang program on the CPU: the proof that needs no GPU.

TileLang's C target knows neither shared memory and fragments nor parallel loops. Rewriting four things in the
tile-level IR, before lowering, is enough: on-chip buffers become local, T.Parallel becomes serial, and the launch's
thread count, barriers and hints for ptxas go. float32 only (the C target has no 16-bit types); atomics become plain read-modify-write.
"""

from tilelang import tvm  # noqa: F401  (puts the bundled tvm on the path)
from tvm import tirx
from tvm.tirx import functor

ON_CHIP = ("shared", "shared.dyn", "local.fragment")
GPU_ONLY = ("tl.no_set_max_nreg", "tirx.tvm_storage_sync")


@functor.mutator
class _ToLocal(functor.PyStmtExprMutator):
    def __init__(self):
        super().__init__()
        self.local = {}

    def on_cpu(self, buffer):
        if buffer.scope() not in ON_CHIP:
            return buffer
        if buffer not in self.local:
            self.local[buffer] = tirx.decl_buffer(buffer.shape, buffer.dtype, name=buffer.name, scope="local")
        return self.local[buffer]

    def visit_buffer_load_(self, op):
        return tirx.BufferLoad(self.on_cpu(op.buffer), [self.visit_expr(i) for i in op.indices])

    def visit_buffer_store_(self, op):
        indices = [self.visit_expr(i) for i in op.indices]
        return tirx.BufferStore(self.on_cpu(op.buffer), self.visit_expr(op.value), indices)

    def visit_for_(self, op):
        kind = tirx.ForKind.SERIAL if op.kind == tirx.ForKind.PARALLEL else op.kind
        notes = {k: v for k, v in op.annotations.items() if k != "num_stages"}
        low, extent, body = self.visit_expr(op.min), self.visit_expr(op.extent), self.visit_stmt(op.body)
        return tirx.For(op.loop_var, low, extent, kind, body, op.thread_binding, notes)

    def visit_evaluate_(self, op):
        if isinstance(op.value, tirx.Call) and getattr(op.value.op, "name", "") in GPU_ONLY:
            return tirx.Evaluate(0)
        return tirx.Evaluate(self.visit_expr(op.value))

    def visit_sblock_(self, op):
        notes = {k: v for k, v in op.annotations.items() if k != "tl.launch_threads"}
        init = self.visit_stmt(op.init) if op.init is not None else None
        buffers = [self.on_cpu(b) for b in op.alloc_buffers]
        body = self.visit_stmt(op.body)
        return tirx.SBlock(
            op.iter_vars, op.reads, op.writes, op.name_hint, body, init, buffers, op.match_buffers, notes
        )


def cpu_program(program: tirx.PrimFunc) -> tirx.PrimFunc:
    """`program` with its on-chip buffers and loops rewritten for target "c"."""
    body = _ToLocal().visit_stmt(program.body)
    return tirx.PrimFunc(program.params, body, program.ret_type, program.buffer_map, program.attrs)
