"""Faults reported of TileLang, each held against the pinned version and against the programs here.

A test of what is "absent" fails when the fault comes (back). A test of what is "present" shows it in a small program of
our idiom; it fails when the fault is gone, and its docstring says what may then be simpler. That no program here does
the like is tested beside it where the source shows it, and by every run of the program in the emulator. Numbers are
those of reports and changes at github.com/tile-ai/tilelang.

Reports without a test, since they cannot touch us or cannot be seen here:
- 3087 (parity of an mbarrier handed to T.gemm or T.copy inside T.Pipelined): our barriers stand in T.serial loops with
  the parity written out, and T.gemm takes none on Hopper.
- 2933 (outputs whose shape is a composite expression, under tvm_ffi): every output is passed in.
- 1250 (the autotuner's cache ignores shapes): `autotune/` is our own, and its keys hold every static dim.
- 1929 (failures to launch were silent): only a GPU can tell, where the tests compare every result.
- What only costs speed, such as copies that are not asynchronous: `test_static.py` counts the instructions.
- 2892, 3059, 2960, 3055, 2931, 3106 and 2851 are new work, not faults; 2893, 2941 and 2917 mend the CPU target, on
  which every program's tests run.
"""

import collections
import functools
import re

import emulator
import pytest
import tilelang.language as T
import torch
from strategies import Dims, make_call
from tiers import prove, tiered
from tilelang import tvm
from tvm import tirx
from upstream import BF16, PROBLEM, N, cuda_source, our_programs, ours, run

from hsa_tl import hsa_attention
from hsa_tl.autotune import static
from hsa_tl.kernels_tilelang import compile, config
from hsa_tl.testing import assert_attention, run_with_gradients


@pytest.fixture(autouse=True, scope="module")
def _emulating():
    with emulator.attached():
        yield


def products(tiles: int | None, stages: int, order: bool = False, waves: int = 1, barrier: bool = True):
    """out[w] = the sum over i of weights[i] x[w] k[i]^T, k in a pipeline: the idiom of hsa_fwd_token.

    tiles None: as many as there are. order: of k's tiles, from a tile in shared memory. barrier: behind the prologue.
    """
    tiles = T.dynamic("tiles") if tiles is None else tiles

    @T.prim_func
    def products(
        x: T.Tensor((waves, 16, N), BF16),
        k: T.Tensor((tiles, N, N), BF16),
        weights: T.Tensor((8,), "float32"),
        index: T.Tensor((8,), "int32"),
        out: T.Tensor((waves, 16, N), "float32"),
    ):
        with T.Kernel(1, threads=128):
            x_shared = T.alloc_shared([16, N], BF16)
            k_shared = T.alloc_shared([N, N], BF16)
            weights_shared = T.alloc_shared([8], "float32")
            index_shared = T.alloc_shared([8], "int32")
            acc = T.alloc_fragment([16, N], "float32")
            total = T.alloc_fragment([16, N], "float32")
            T.copy(weights, weights_shared)
            for i in T.Parallel(8):
                index_shared[i] = index[i]
            for w in T.serial(waves):
                for r, d in T.Parallel(16, N):
                    x_shared[r, d] = x[w, r, d]
                if barrier:
                    T.sync_threads()
                T.clear(total)
                for i in T.Pipelined(tiles, num_stages=stages):
                    T.copy(k[index_shared[i] if order else i, :, :], k_shared)
                    T.clear(acc)
                    T.gemm(x_shared, k_shared, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                    for r, c in T.Parallel(16, N):
                        total[r, c] = total[r, c] + weights_shared[i] * acc[r, c]
                for r, c in T.Parallel(16, N):
                    out[w, r, c] = total[r, c]

    return products


def assert_products(tiles: int, *arguments, waves: int = 1, **options) -> None:
    """That a warp-specialised `products` is right in the emulator."""
    x, k = torch.randn(waves, 16, N).bfloat16(), torch.randn(tiles, N, N).bfloat16()
    weights, index, out = torch.randn(8), torch.randperm(8, dtype=torch.int32) % tiles, torch.empty(waves, 16, N)
    source = run(products(*arguments, waves=waves, **options), x, k, weights, index, out)
    assert "__launch_bounds__(256, 1)" in source and "tma_load" in source, "not warp-specialised"
    chosen = k[index[:tiles].long()] if options.get("order") else k
    wanted = torch.einsum("wrd,icd,i->wrc", x.double(), chosen.double(), weights[:tiles].double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("arguments", tiered([(1, 1), (1, 2), (1, 3), (None, 2)], quick=[(1, 2)]))
def test_a_pipeline_of_one_iteration_ends(arguments):
    """2566, absent: a warp-specialised pipeline of one iteration hung. Ours has one where K = 1."""
    assert_products(1, *arguments)


@prove  # compiles each program for the host
@pytest.mark.parametrize(
    "programs",
    [
        {"hsa_fwd_token": {}},
        {"hsa_fwd_union": {}},
        {"hsa_fwd_union_sm90a": {}},
        {"hsa_bwd_dq_token": {}, "hsa_bwd_dkdv_chunk": {}},
        {"hsa_bwd_chunk_sm90a": {}},
    ],
    ids="-".join,
)
def test_our_pipelines_of_one_iteration_end(programs):
    """2566: K = 1, and all tokens choose one chunk, so the union of a tile is one chunk too."""
    call = make_call(Dims(T=12, T_kv=128, HQ=16, D=64, S=64, K=1))
    call = call._replace(**{x: getattr(call, x).bfloat16() for x in ("q", "k", "v", "do")})
    call.indices.fill_(1)
    attend = functools.partial(hsa_attention, impl="tilelang", config=programs)
    assert_attention(run_with_gradients(attend, call, chunk_size=64), call, chunk_size=64)


def test_a_barrier_follows_the_prologue():
    """2443, absent: nothing made the consumers wait for what all threads, or a 1-D copy, wrote before the pipeline."""
    assert_products(4, 4, 2, barrier=False)


@prove  # lowers each program twice
@pytest.mark.parametrize("name", ["hsa_fwd_token", "hsa_fwd_union", "hsa_bwd_dq_token"])
def test_our_barrier_behind_the_prologue_changes_nothing(name):
    """2443: the T.sync_threads() behind these prologues may go, for TileLang places one, until this fails."""
    program = dict(our_programs())[name]
    dropped = []

    def drop(node):
        if "storage_sync" in str(node.value):
            dropped.append(node)
            return tirx.Evaluate(tirx.const(0))
        return None

    bare = program.with_body(tirx.stmt_functor.ir_transform(program.body, None, drop, ["tirx.Evaluate"]))
    with_it, without = (re.sub(r"workspace(_\d+)?", "workspace", cuda_source(x)) for x in (program, bare))
    assert len(dropped) == 1 and with_it == without


def test_no_barrier_follows_the_prologue_where_the_producer_reads_it():
    """Present: where the producer reads shared memory of the prologue, its own threads alone wait behind it.

    Decode reads its pages so, behind T.sync_threads(), which helps; others read the chunk from global memory.
    """
    with pytest.raises(emulator.Fault, match=r"race|uninitialised"):
        assert_products(4, 4, 2, order=True, barrier=False)


def test_an_index_from_shared_memory_places_no_barrier_in_an_elected_branch():
    """Absent: the barrier behind the prologue stood in the producer's elected thread, which then waited alone.

    Decode has such an index, the pages of its slots."""
    assert_products(4, 4, 2, order=True)
    for program in (products(4, 2, order=True), dict(our_programs())["hsa_decode_split"]):
        assert not static.barrier_in_elected_branch(cuda_source(program))


def test_later_waves_of_a_pipeline_are_right():
    """2674, absent: in a loop around a warp-specialised pipeline the parity of its barriers began anew.

    No program here has such a loop.
    """
    for tiles in (2, 3, 4):  # a multiple of twice the stages was right
        assert_products(tiles, tiles, 2, waves=3)


def test_a_branch_around_a_pipelined_copy_leaves_it_to_tma():
    """Absent for TMA: a branch that depends on data made the copy synchronous.

    So an empty slot might be branched around, where the programs read a chunk the token chose elsewhere.
    """

    @T.prim_func
    def branch(
        x: T.Tensor((16, N), BF16), k: T.Tensor((4, N, N), BF16), index: T.Tensor((4,), "int32"),
        out: T.Tensor((16, N), "float32"),
    ):  # fmt: skip
        with T.Kernel(1, threads=128):
            x_shared = T.alloc_shared([16, N], BF16)
            k_shared = T.alloc_shared([N, N], BF16)
            acc = T.alloc_fragment([16, N], "float32")
            for r, d in T.Parallel(16, N):
                x_shared[r, d] = x[r, d]
            T.clear(acc)
            for i in T.Pipelined(4, num_stages=2):
                if index[i] >= 0:
                    T.copy(k[index[i], :, :], k_shared)
                    T.gemm(x_shared, k_shared, acc, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
            for r, c in T.Parallel(16, N):
                out[r, c] = acc[r, c]

    x, k = torch.randn(16, N).bfloat16(), torch.randn(4, N, N).bfloat16()
    index, out = torch.tensor([3, -1, 0, 2], dtype=torch.int32), torch.empty(16, N)
    assert "tma_load" in run(branch, x, k, index, out)
    wanted = x.double() @ k.double()[[3, 0, 2]].sum(0).T
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-3)


def sums(copy_first: bool):
    """out = a column sum of each tile, read from the tile that the loop copies before or after."""

    @T.prim_func
    def sums(x: T.Tensor((8, N, N), BF16), out: T.Tensor((8, N), "float32")):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared([N, N], BF16)
            total = T.alloc_fragment([N], "float32")
            if not copy_first:
                T.copy(x[0, :, :], tile)
            for i in T.Pipelined(8, num_stages=2):
                if copy_first:
                    T.copy(x[i, :, :], tile)
                T.clear(total)
                for r in T.serial(N):
                    for c in T.Parallel(N):
                        total[c] = total[c] + T.cast(tile[r, c], "float32")
                for c in T.Parallel(N):
                    out[i, c] = total[c]
                if not copy_first:
                    T.copy(x[T.min(i + 1, 7), :, :], tile)

    return sums


def read_before_copied(program: tirx.PrimFunc) -> set[str]:
    """Tiles that a pipeline copies after it has read them."""
    uses, found = collections.Counter(), set()

    def note_use(node):
        if isinstance(node, tirx.BufferLoad):
            uses[node.buffer.name] += 1
        elif isinstance(node, tirx.Call) and getattr(node.op, "name", "") == "tl.tileop.copy":
            to = node.args[1].args[0].buffer.name  # which is a use itself
            if uses[to] > 1:
                found.add(to)

    def note_pipeline(node):
        if isinstance(node, tirx.For) and "num_stages" in node.annotations:
            uses.clear()
            tirx.stmt_functor.post_order_visit(node.body, note_use)

    tirx.stmt_functor.post_order_visit(program.body, note_pipeline)
    return found


def test_a_tile_that_is_read_before_it_is_copied_is_wrong():
    """2668, present: a pipeline takes a copy forward over a read of the same tile that stands before it.

    Every pipeline here copies a tile before it reads it; nothing gets simpler when this is gone.
    """
    assert read_before_copied(sums(False)) == {"tile"} and not read_before_copied(sums(True))
    for name, program in our_programs():
        assert not read_before_copied(program), name
    x = torch.randint(-2, 3, (8, N, N)).bfloat16()
    out = torch.empty(8, N)
    run(sums(True), x, out)
    assert torch.equal(out, x.float().sum(1))
    with pytest.raises(emulator.Fault, match="race"):
        run(sums(False), x, out)


def test_a_read_does_not_pass_an_atomic():
    """2595, absent: a pipeline took a read forward over an atomic addition to what it reads, such as top-k's counts."""

    @T.prim_func
    def count(x: T.Tensor((8, N, N), BF16), out: T.Tensor((8, N), "int32")):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared([N, N], BF16)
            count_shared = T.alloc_shared([N], "int32")
            for c in T.Parallel(N):
                count_shared[c] = 0
            T.sync_threads()
            for i in T.Pipelined(8, num_stages=2):
                T.copy(x[i, :, :], tile)
                for c in T.Parallel(N):
                    out[i, c] = count_shared[c]
                for r, c in T.Parallel(N, N):
                    T.atomic_add(count_shared[c], T.if_then_else(tile[r, c] > 0, 1, 0))

    x, out = torch.randn(8, N, N).bfloat16(), torch.empty(8, N, dtype=torch.int32)
    run(count, x, out)
    counts = (x > 0).sum(1).int()
    assert torch.equal(out, counts.cumsum(0).int() - counts)


@pytest.mark.parametrize("stages", [2, 3])
def test_two_pipelines_of_one_tile_are_refused(stages):
    """2309, present, for stages that differ and those that do not: two pipelines that fill one tile do not compile.

    No program has two pipelines; nothing gets simpler when this is gone.
    """

    @T.prim_func
    def twice(x: T.Tensor((8, N, N), BF16), k: T.Tensor((N, N), BF16), out: T.Tensor((N, N), "float32")):
        with T.Kernel(1, threads=128):
            k_shared = T.alloc_shared([N, N], BF16)
            tile = T.alloc_shared([N, N], BF16)
            acc = T.alloc_fragment([N, N], "float32")
            T.copy(k, k_shared)
            T.clear(acc)
            for i in T.Pipelined(4, num_stages=2):
                T.copy(x[i, :, :], tile)
                T.gemm(tile, k_shared, acc)
            for i in T.Pipelined(4, num_stages=stages):
                T.copy(x[4 + i, :, :], tile)
                T.gemm(tile, k_shared, acc)
            T.copy(acc, out)

    with pytest.raises(tvm.error.InternalError, match="CanProveEqual"):
        cuda_source(twice)
    assert all(text.count("T.Pipelined(") <= 1 for text in ours().values())


def test_two_warpgroups_wait_for_a_tile_that_both_read():
    """2613, absent: without a pipeline, a tile was filled anew while the other warpgroup still multiplied it."""

    @T.prim_func
    def halves(x: T.Tensor((4, N, N), BF16), k: T.Tensor((2, N, N), BF16), out: T.Tensor((2, N, N), "float32")):
        with T.Kernel(1, threads=256):
            x_shared = T.alloc_shared([N, N], BF16)
            k_shared = T.alloc_shared([2, N, N], BF16)
            first = T.alloc_fragment([N, N], "float32")
            second = T.alloc_fragment([N, N], "float32")
            T.copy(k, k_shared)
            if T.get_thread_binding() < 128:
                T.clear(first)
            else:
                T.clear(second)
            for i in T.serial(4):
                T.copy(x[i, :, :], x_shared)
                if T.get_thread_binding() < 128:
                    T.gemm(x_shared, k_shared[0, :, :], first, transpose_B=True)
                else:
                    T.gemm(x_shared, k_shared[1, :, :], second, transpose_B=True)
            if T.get_thread_binding() < 128:
                T.copy(first, out[0, :, :])
            else:
                T.copy(second, out[1, :, :])

    x, k, out = torch.randn(4, N, N).bfloat16(), torch.randn(2, N, N).bfloat16(), torch.empty(2, N, N)
    run(halves, x, k, out)
    wanted = x.double().sum(0) @ k.double().transpose(1, 2)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-3)


def test_a_barrier_in_a_branch_that_depends_on_data_is_moved_out_of_it(capfd):
    """2612, present: of threads that write and then read in one branch, none waits; TileLang only warns of it.

    No barrier of ours is needed in such a branch; nothing gets simpler when this is gone.
    """

    @T.prim_func
    def mirror(x: T.Tensor((2, 128), "float32"), mask: T.Tensor((128,), "int32"), out: T.Tensor((2, 128), "float32")):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared([128], "float32")
            thread = T.get_thread_binding()
            if mask[thread] != 0:
                for i in T.serial(2):
                    tile[thread] = x[i, thread]
                    out[i, thread] = tile[127 - thread]

    with pytest.raises(emulator.Fault, match="uninitialised"):
        run(mirror, torch.randn(2, 128), torch.ones(128, dtype=torch.int32), torch.empty(2, 128))
    assert "ThreadSync" in capfd.readouterr().err


@prove  # lowers every program
def test_no_barrier_of_ours_is_moved_out_of_a_branch(capfd):
    """2612, and the other faults of barriers that TileLang warns of."""
    for name in config.PROGRAMS:
        problem = config.problem_of(name, PROBLEM)
        assert name in compile.lower(name, problem, config.space(name, problem)[0]).kernel_source
    assert "ThreadSync" not in capfd.readouterr().err


def test_no_barrier_stands_before_a_fill_at_an_offset():
    """2698, present: a part of a tile that begins elsewhere is filled while other threads still copy into it.

    No program fills a part of a tile: `T.clear` and `T.fill` take whole ones.
    """

    @T.prim_func
    def patch(x: T.Tensor((N,), "int32"), out: T.Tensor((N,), "int32")):
        with T.Kernel(1, threads=N):
            tile = T.alloc_shared([N], "int32")
            T.copy(x, tile)
            T.fill(tile[10:16], 7)
            T.copy(tile, out)

    with pytest.raises(emulator.Fault, match="race"):
        run(patch, torch.zeros(N, dtype=torch.int32), torch.zeros(N, dtype=torch.int32))
    assert not [name for name, text in ours().items() if re.search(r"T\.(fill|clear)\([^,)]*\[", text)]
