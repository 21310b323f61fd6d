"""Runs a CUDA-authored, tile-level TileLang program on the CPU: the proof that needs no GPU.

TileLang's C target knows neither shared memory and fragments nor parallel loops. Rewriting the tile-level IR before
lowering is enough: on-chip buffers become local, T.Parallel becomes serial, the launch's thread count, barriers and
hints for ptxas go, and a tile's product is summed before it is accumulated. float32 only (the C target has no 16-bit
types); atomics become plain read-modify-write.
"""

from tilelang import tvm  # noqa: F401  (puts the bundled tvm on the path)
from tvm import tirx
from tvm.tirx import functor

ON_CHIP = ("shared", "shared.dyn", "local.fragment")
GPU_ONLY = (
    "tl.no_set_max_nreg",
    "tl.annotate_producer_reg_dealloc",
    "tl.annotate_consumer_reg_alloc",
    "tirx.tvm_storage_sync",
)


@functor.mutator
class _ToLocal(functor.PyStmtExprMutator):
    def __init__(self):
        super().__init__()
        self.local = {}
        self.tiles = []

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
        name = getattr(getattr(op.value, "op", None), "name", "")
        if name in GPU_ONLY:
            return tirx.Evaluate(0)
        call = self.visit_expr(op.value)
        if name == "tl.tileop.reduce":  # without annotations: its code takes no batch
            call = tirx.Call(call.dtype, call.op, call.args)
        return self.summed_apart(call) if name == "tl.tileop.gemm" else tirx.Evaluate(call)

    def summed_apart(self, call):
        """C += A B as tmp = A B, then C += tmp: one running float32 sum over all tiles would lose digits."""
        region = call.args[2]
        c = region.args[0].buffer
        tmp = tirx.decl_buffer(c.shape, c.dtype, name=f"{c.name}_tile", scope="local")
        self.tiles.append(tmp)
        target = tirx.Call(region.dtype, region.op, [tirx.BufferLoad(tmp, [0, 0]), *region.args[1:]])
        product = tirx.Call(call.dtype, call.op, [*call.args[:2], target, *call.args[3:]])

        def each(store):
            i, j = tirx.Var("i", "int32"), tirx.Var("j", "int32")
            inner = tirx.For(j, 0, c.shape[1], tirx.ForKind.SERIAL, store([i, j]))
            return tirx.For(i, 0, c.shape[0], tirx.ForKind.SERIAL, inner)

        clear = each(lambda at: tirx.BufferStore(tmp, tirx.const(0, c.dtype), at))
        add = each(lambda at: tirx.BufferStore(c, tirx.BufferLoad(c, at) + tirx.BufferLoad(tmp, at), at))
        return tirx.SeqStmt([clear, tirx.Evaluate(product), add])

    def visit_sblock_(self, op):
        notes = {k: v for k, v in op.annotations.items() if k != "tl.launch_threads"}
        init = self.visit_stmt(op.init) if op.init is not None else None
        body = self.visit_stmt(op.body)
        buffers = [self.on_cpu(b) for b in op.alloc_buffers]
        if buffers:
            buffers, self.tiles = buffers + self.tiles, []
        return tirx.SBlock(
            op.iter_vars, op.reads, op.writes, op.name_hint, body, init, buffers, op.match_buffers, notes
        )


def cpu_program(program: tirx.PrimFunc) -> tirx.PrimFunc:
    """`program` with its on-chip buffers and loops rewritten for target "c"."""
    body = _ToLocal().visit_stmt(program.body)
    return tirx.PrimFunc(program.params, body, program.ret_type, program.buffer_map, program.attrs)
