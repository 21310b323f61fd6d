"""Faults reported of TileLang, as in test_upstream.py: fragments, stores, atomics, registers, and how it is built."""

import ast
import importlib.metadata
import re

import emulator
import pytest
import tilelang.language as T
import torch
from packaging.requirements import Requirement
from tiers import tiered
from tilelang import tvm
from tvm import tirx
from upstream import BF16, N, cuda_source, our_programs, ours, run


@pytest.fixture(autouse=True, scope="module")
def _emulating():
    with emulator.attached():
        yield


def partial_loops(program: tirx.PrimFunc) -> set[str]:
    """Fragments that a T.Parallel loop walks without reaching all of an axis."""
    extents, found = {}, set()

    def note_loop(node):
        if isinstance(node, tirx.For) and node.kind == tirx.ForKind.PARALLEL:
            extents[node.loop_var] = node.extent

    def note_access(node):
        if isinstance(node, tirx.BufferLoad | tirx.BufferStore) and node.buffer.scope() == "local.fragment":
            for i, size in zip(node.indices, node.buffer.shape, strict=True):
                if i in extents and not tvm.ir.structural_equal(extents[i], size):
                    found.add(node.buffer.name)

    for visit in (note_loop, note_access):
        tirx.stmt_functor.post_order_visit(program.body, visit)
    return found


def test_a_loop_over_part_of_a_fragment_cuts_the_others_short():
    """2957, present: the shortest T.Parallel over a fragment decides how far all others go.

    Every loop here goes over all of a fragment's axis; nothing gets simpler when this is gone.
    """

    @T.prim_func
    def part(out: T.Tensor((256,), "float32")):
        with T.Kernel(1, threads=128):
            values = T.alloc_fragment([256], "float32")
            for i in T.Parallel(100):
                values[i] = 5
            for i in T.Parallel(256):
                out[i] = values[i]

    out = torch.zeros(256)
    run(part, out)
    assert (out[:100] == 5).all() and not out[100:].any()
    assert partial_loops(part) == {"values"}
    for name, program in our_programs():
        assert not partial_loops(program), name


def test_a_fragment_of_both_arms_of_a_branch_loses_the_second():
    """Present: what the second arm does with a fragment that the first one uses is left out without a word.

    So hsa_fwd_union_sm90a has fragments of its own in each arm, by a macro; one set would do without this.
    """

    @T.prim_func
    def arms(x: T.Tensor((2, 128), "float32"), out: T.Tensor((2, 128), "float32")):
        with T.Kernel(1, threads=256):
            values = T.alloc_fragment([128], "float32")
            if T.get_thread_binding() < 128:
                for i in T.Parallel(128):
                    values[i] = x[0, i]
                for i in T.Parallel(128):
                    out[0, i] = values[i] + 1
            else:
                for i in T.Parallel(128):
                    values[i] = x[1, i]
                for i in T.Parallel(128):
                    out[1, i] = values[i] + 1

    x, out = torch.zeros(2, 128), torch.zeros(2, 128)
    run(arms, x, out)
    assert (out[0] == 1).all() and (out[1] == 0).all()


def test_a_store_in_one_warpgroups_branch_needs_its_scope():
    """Present: a TMA store elects one thread of all that reach the branch around its own branch, maybe none of these.

    The specialised programs say leader_scope_threads=128; they need not once TileLang finds it out.
    """

    def store(scope: dict):
        @T.prim_func
        def store(x: T.Tensor((N, N), BF16), out: T.Tensor((N, N), BF16)):
            with T.Kernel(1, threads=384):
                tile = T.alloc_shared([N, N], BF16)
                if T.get_thread_binding() < 256:
                    for r, d in T.Parallel(N, N):
                        tile[r, d] = x[r, d]
                    T.fence_proxy_async()
                    T.sync_threads(8, 256)
                    if T.get_thread_binding() // 128 == 1:
                        T.tma_copy(tile, out, **scope)
                    T.tma_store_wait(0)

        return store

    x, out = torch.randn(N, N).bfloat16(), torch.zeros(N, N).bfloat16()
    run(store({}), x, out)
    assert not out.any()
    run(store({"leader_scope_threads": 128}), x, out)
    assert torch.equal(out, x)
    for name, text in ours().items():
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "T.tma_copy":
                assert {"barrier", "leader_scope_threads"} & {x.arg for x in call.keywords}, name


def test_a_bulk_store_keeps_its_tail():
    """2525, absent: a 1-D store by TMA dropped what is left over 16 bytes. Ours are boxes of whole rows."""

    def line(n: int, by_tma: bool):
        @T.prim_func
        def line(x: T.Tensor((n,), "float32"), out: T.Tensor((n,), "float32")):
            with T.Kernel(1, threads=128):
                tile = T.alloc_shared([n], "float32")
                T.copy(x, tile)
                if by_tma:
                    T.tma_copy(tile, out)
                    T.tma_store_wait(0)
                else:
                    T.copy(tile, out)

        return line

    for n in (63, 64):
        x, out = torch.randn(n), torch.zeros(n)
        assert ("tma_store" in run(line(n, by_tma=False), x, out)) == (n == 64)
        assert torch.equal(out, x)
    with pytest.raises(tvm.error.InternalError, match="TMA is not available"):
        cuda_source(line(63, by_tma=True))


def additions(target, memory_order=None, shared: bool = False):
    """out[target(i)] += x[i], four of each thread."""

    @T.prim_func
    def additions(x: T.Tensor((512,), "float32"), out: T.Tensor((512,), "float32")):
        with T.Kernel(1, threads=128):
            values = T.alloc_fragment([512], "float32")
            T.copy(x, values)
            if shared:
                sum_shared = T.alloc_shared([512], "float32")
                for i in T.Parallel(512):
                    sum_shared[i] = out[i]
                for i in T.Parallel(512):
                    T.atomic_add(sum_shared[target(i)], values[i])
                for i in T.Parallel(512):
                    out[i] = sum_shared[i]
            else:
                for i in T.Parallel(512):
                    T.atomic_add(out[target(i)], values[i], memory_order=memory_order)

    return additions


TARGETS = {"neighbours": lambda i: i, "pairs": lambda i: i // 2, "turns": lambda i: i % 2, "one": lambda i: i * 0}


@pytest.mark.parametrize("shared", tiered([False, True], quick=[False]))
@pytest.mark.parametrize("target", tiered(TARGETS, quick=["neighbours", "pairs"]))
def test_wide_atomics_add_to_neighbours_only(target, shared):
    """3219 and 3038, absent: additions to one place, or to shared memory, were made of vectors as if to neighbours.

    With reduce_add our programs add rows of neighbours in global memory, which may be vectors.
    """
    x, out = torch.randint(9, (512,)).float(), torch.zeros(512)
    source = run(additions(target, shared=shared), x, out)
    assert ("AtomicAddx4" in source) == (target is TARGETS["neighbours"] and not shared)
    assert torch.equal(out, torch.zeros(512).index_add_(0, target(torch.arange(512)), x))


def test_wide_atomics_keep_their_order():
    """2688, absent: a vector of additions was relaxed whatever memory_order said. Ours are meant to be relaxed."""
    calls = re.findall(r"AtomicAddx4\(.*\);", cuda_source(additions(lambda i: i, "acq_rel")))
    assert calls and all(call.endswith(", 4);") for call in calls)  # memory_order_acq_rel
    assert not [name for name, text in ours().items() if "memory_order" in text]


def wide_consumers(threads: int, producer: int | None = None, consumer: int | None = None):
    """A pipeline whose product takes `threads` threads, with or without hints of registers."""

    @T.prim_func
    def wide_consumers(
        x: T.Tensor((threads // 2, N), BF16), k: T.Tensor((4, N, N), BF16), out: T.Tensor((threads // 2, N), "float32")
    ):
        with T.Kernel(1, threads=threads):
            if producer:
                T.annotate_producer_reg_dealloc(producer)
            if consumer:
                T.annotate_consumer_reg_alloc(consumer)
            x_shared = T.alloc_shared([threads // 2, N], BF16)
            k_shared = T.alloc_shared([N, N], BF16)
            acc = T.alloc_fragment([threads // 2, N], "float32")
            T.copy(x, x_shared)
            T.clear(acc)
            for i in T.Pipelined(4, num_stages=2):
                T.copy(k[i, :, :], k_shared)
                T.gemm(x_shared, k_shared, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(acc, out)

    return wide_consumers


@pytest.mark.parametrize("threads", tiered([128, 256, 384], quick=[384]))
def test_the_registers_that_consumers_ask_for_are_there(threads):
    """2406, absent: three warpgroups of consumers asked for 240 registers each, more than an SM has, and hung."""
    x, k, out = torch.randn(threads // 2, N).bfloat16(), torch.randn(4, N, N).bfloat16(), torch.empty(threads // 2, N)
    assert "warpgroup_reg_alloc" in run(wide_consumers(threads), x, k, out)
    torch.testing.assert_close(out.double(), x.double() @ k.double().sum(0).T, rtol=1e-4, atol=1e-3)


def test_one_hint_of_registers_needs_the_other():
    """2088, present: the side without a hint asks for 0 registers, which PTX refuses. Ours give both or none."""
    assert "warpgroup_reg_alloc<0>" in cuda_source(wide_consumers(256, producer=24))
    assert "warpgroup_reg_dealloc<0>" in cuda_source(wide_consumers(256, consumer=240))
    for text in ours().values():
        assert text.count("T.annotate_producer_reg_dealloc(") == text.count("T.annotate_consumer_reg_alloc(")


def test_a_parameter_named_as_a_word_of_c_is_renamed():
    """Absent: it broke the build, so the programs call the gradient dout, not do."""

    @T.prim_func
    def add_one(do: T.Tensor((N,), "float32"), out: T.Tensor((N,), "float32")):
        with T.Kernel(1, threads=N):
            for i in T.Parallel(N):
                out[i] = do[i] + 1

    _, parameters = emulator.signature(cuda_source(add_one))
    assert "do" not in [name for _, name in parameters]


def test_tvm_ffi_is_bounded():
    """2367 and 2552, absent: pip could choose an apache-tvm-ffi that breaks TileLang. Otherwise we must bound it."""
    (bound,) = [r for x in importlib.metadata.requires("tilelang") if (r := Requirement(x)).name == "apache-tvm-ffi"]
    assert importlib.metadata.version("apache-tvm-ffi") in bound.specifier and "1.0" not in bound.specifier
