"""The emulator: what TileLang makes of the programs is right on it, and a program that is broken on purpose is not."""

import functools
import re
from dataclasses import asdict

import emulator
import hypothesis
import pytest
import tilelang.language as T
import torch
from hypothesis import strategies as st
from strategies import TYPES, Dims, check_selected, each_end, hard_calls, make_call, seeds, without_weights
from tiers import prove, tiered

from hsa_tl import (
    hsa_attention,
    hsa_decode,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
)
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.impl import tilelang, tilelang_retrieval
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config import PROGRAMS, space, tuned
from hsa_tl.kernels_tilelang.config_base import ChunkConfig
from hsa_tl.pairs import sort_pairs
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, assert_attention, run_with_gradients

S = 64
HALF = TYPES[1:]
UNION = "hsa_fwd_union_sm90a"
SPECIALISED = {
    UNION: {"block_M": 128, "num_stages": 2},
    "hsa_fwd_chunk_sm90a": {"block_M": 128, "threads": 256, "num_stages": 2},
    "hsa_bwd_chunk_sm90a": {"block_M": 128, "threads": 256, "num_stages": 2},
}


@pytest.fixture(autouse=True, scope="module")
def _emulating():
    with emulator.attached():
        yield


def half(call: Inputs, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    q, k, v, do = (x.to(dtype) for x in (call.q, call.k, call.v, call.do))
    return call._replace(q=q, k=k, v=v, do=do)


def results(call: Inputs, gradients: bool, **options) -> dict[str, torch.Tensor]:
    attend = functools.partial(hsa_attention, impl="tilelang", **options)
    return run_with_gradients(attend, call) if gradients else {"out": attend(*call[:5])}


def check(call: Inputs, S: int, config: dict | None = None, gradients: bool = True) -> None:
    """Out, and gradients, in the call's 16-bit type against the oracle."""
    assert_attention(results(call, gradients, config=config, chunk_size=S), call, chunk_size=S)


# A tail, empty slots, duplicates; more pairs of a chunk than two stages of any tile hold.
DIMS = {
    "paper-d128": Dims(T=30, T_kv=100, HQ=16, D=128, S=64, K=8),
    "paper-d64-two-kv-heads": Dims(B=2, T=12, T_kv=128, HQ=32, H=2, D=64, S=64, K=8),
    "g4-s32-odd-k": Dims(T=60, T_kv=96, HQ=4, D=64, S=32, K=5),
    "g3-per-head": Dims(T=60, T_kv=128, HQ=3, D=96, S=64, K=3, per_head=True),
}


@prove  # a minute of compiling for the host a program
@pytest.mark.parametrize("program", tuned())
@pytest.mark.parametrize("name", DIMS)
def test_every_config_equals_the_oracle(name, program):
    d = DIMS[name]
    call = half(make_call(d), torch.float16 if name == "g3-per-head" else torch.bfloat16)
    masked = d.T_kv % d.S != 0
    problem = Problem(d.B, d.T, d.N, d.HQ, d.H, d.D, d.S, d.K, call.q.dtype, masked=masked, per_head=d.per_head)
    for config in space(program, problem):
        check(call, d.S, {program: asdict(config)}, gradients=program.startswith("hsa_bwd"))


def check_one_softmax(call: Inputs, S: int, config: dict | None) -> None:
    """`selected_attention`, and its gradients where the config is of a backward, against the oracle."""
    call, options = without_weights(call), {"impl": "tilelang", "config": config, "chunk_size": S}
    if config and not any("_bwd_" in name for name in config):
        actual = dict(zip(("out", "lse"), selected_attention(*call[:4], **options), strict=True))
    else:
        actual = run_with_gradients(selected_attention, call, **options)
    assert_attention(actual, call, chunk_size=S)


@prove
@pytest.mark.parametrize("program", [x for x in PROGRAMS if x.startswith("selected_") and PROGRAMS[x]])
@pytest.mark.parametrize("name", DIMS)
def test_every_config_of_one_softmax_equals_the_oracle(name, program):
    d = DIMS[name]._replace(per_head=False)
    d = d._replace(D=d.D if d.D in (64, 128) else 64)  # the backward has no other
    problem = Problem(d.B, d.T, d.N, d.HQ, d.H, d.D, d.S, d.K, torch.bfloat16, masked=d.T_kv % d.S != 0)
    for config in space(program, problem):
        check_one_softmax(half(make_call(d)), d.S, {program: asdict(config)})


@prove
@pytest.mark.parametrize("program", ("selected_fwd_union", "selected_bwd_chunk"))
def test_one_softmax(program):
    """A tail, empty slots, duplicates, two tiles of a chunk's pairs."""
    check_one_softmax(half(make_call(Dims(T=21, T_kv=90, HQ=16, D=64, S=S, K=4))), S, {program: {}})


@prove
@pytest.mark.parametrize("program", [x for x, launcher in PROGRAMS.items() if launcher in ("fwd_chunk", "bwd_chunk")])
def test_ctas_split_a_chunk(monkeypatch, program):
    monkeypatch.setattr(ChunkConfig, "splits", lambda config, problem: 3)
    call = half(make_call(DIMS["paper-d128"]))
    if program.startswith("selected_"):
        check_one_softmax(call, S, {program: {}})
    else:
        check(call, S, {program: {}}, gradients="_bwd_" in program)


@prove
@each_end
def test_dims_of_one_softmax(dims):
    """The backward splits a chunk that is too large for its registers."""
    check_selected("tilelang", dims, torch.float16 if dims.D == 64 else torch.bfloat16)


@prove
@hypothesis.given(
    G=st.sampled_from((1, 2, 3, 5, 8, 16, 32)), D=st.sampled_from((16, 48, 64, 80, 112, 128)),
    S=st.sampled_from((16, 32, 64, 128)), K=st.sampled_from((1, 2, 5, 7, 10, 16)), per_head=st.booleans(),
    tail=st.booleans(), seed=seeds,
)  # fmt: skip
@hypothesis.settings(max_examples=8)
def test_what_is_accepted_runs(G, D, S, K, per_head, tail, seed):
    """The arithmetic of legality against TileLang: odd shapes either raise NotImplementedError or are right."""
    d = Dims(B=1, T=20, T_kv=3 * S - 5 * tail, HQ=G, D=D, S=S, K=K, per_head=per_head)
    try:
        check(half(make_call(d, seed)), S)
    except NotImplementedError:
        hypothesis.event("refused")


@prove
@pytest.mark.parametrize("forward", (None, UNION, "hsa_fwd_chunk_sm90a"))
@hypothesis.given(hard_calls(HALF, {"HQ": 16, "D": 64, "K": 2, "S": S}))
@hypothesis.settings(max_examples=12)
def test_hard_calls(forward, drawn):
    """What TileLang makes of the programs is accurate where a careless bound fails; 5 s an example."""
    call, _ = drawn
    hypothesis.assume(all(x.isfinite().all() for x in call[:4]))
    named = (forward, "hsa_bwd_chunk_sm90a") if forward else ()
    check(call, S, {name: SPECIALISED[name] for name in named} or None)


@prove
def test_the_seed_shuffles_and_changes_nothing(monkeypatch):
    call = half(make_call(DIMS["paper-d128"]))
    config = {name: SPECIALISED[name] for name in (UNION, "hsa_bwd_chunk_sm90a")}
    found = []
    for seed in "01":
        monkeypatch.setenv("HSA_TL_EMULATE_SEED", seed)
        found.append(run_with_gradients(hsa_attention, call, impl="tilelang", config=config, chunk_size=S))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


@prove
@pytest.mark.parametrize("topk, N", ((5, 40), (64, 300)))
def test_retrieval_of_prefill_and_decode(topk, N):
    """Integers, so every score is exact and many are equal."""
    q, landmarks = (torch.randint(-1, 2, (2, n, 2, 64)).bfloat16() for n in (3, N))
    lengths = torch.tensor([N * S, 300], dtype=torch.int32)
    scores, indices = retrieve_decode(q, landmarks, lengths, topk, impl="tilelang")
    for b, n in enumerate(lengths.tolist()):
        part = slice(b, b + 1)
        for impl in ("tilelang", "reference"):
            want = retrieve_chunks(q[part], landmarks[part], topk, q_start=n, impl=impl)
            assert torch.equal(indices[part], want[1]) and torch.equal(scores[part], want[0])


def test_gradients_of_retrieval():
    q = torch.randn(1, 70, 2, 48).bfloat16()
    dscores, indices = torch.randn(1, 70, 2, 5), torch.randint(-1, 3, (1, 70, 2, 5), dtype=torch.int32)
    actual = tilelang_retrieval.dlandmarks(dscores, tilelang.sort_pairs(indices, 3), q, 3, 0.5)
    where = torch.nn.functional.one_hot(indices.long() + 1, 4)[..., 1:].double()
    wanted = expect(
        lambda ds, q: torch.einsum("btrk,btrd,btrkn->bnrd", 0.5 * ds, q, where), dscores, q, out=torch.bfloat16
    )
    assert_accurate("dlandmarks", actual, wanted)


def test_the_counting_sort_equals_the_torch_sort():
    indices = torch.randint(-2, 8, (2, 77, 3, 5), dtype=torch.int32)
    for a, b in zip(tilelang.sort_pairs(indices, 7), sort_pairs(indices, 7), strict=True):
        assert torch.equal(a, b)


@prove
@pytest.mark.parametrize("K, weighted, D", ((1, True, 64), (16, True, 64), (16, False, 64), (16, False, 96)))
def test_decode(K, weighted, D):
    """Decode has no backward, whose programs of one softmax know D = 64 and 128 only."""
    pages, N = 9, 4
    q = torch.randn(2, 1, 16, D).bfloat16()
    k, v = (torch.randn(pages, S, 1, D).bfloat16() for _ in range(2))
    weights, indices = torch.randn(2, 1, 1, K), torch.randint(-1, N, (2, 1, 1, K), dtype=torch.int32)
    table = torch.randperm(pages)[: 2 * N].view(2, N).int()
    call = Inputs(q, *(x[table.long()].flatten(1, 2) for x in (k, v)), weights, indices, torch.zeros_like(q))
    if weighted:
        out = hsa_decode(q, k, v, weights, indices, table, impl="tilelang")
        assert_attention({"out": out}, call, chunk_size=S)
    else:
        out, lse = selected_decode(q, k, v, indices, table, impl="tilelang")
        assert_attention({"out": out, "lse": lse}, without_weights(call), chunk_size=S)


def run_changed(program: str, pattern: str, replacement: str, monkeypatch) -> None:
    """Runs the program with its CUDA source changed wherever the pattern stands, and it must stand somewhere."""
    call = half(make_call(Dims(T=80, T_kv=4 * S, HQ=16, D=64, S=S, K=4)))
    places = []

    class Changed(emulator.Emulated):
        def __init__(self, ir, artifact):
            super().__init__(ir, artifact)
            if ir.attrs["global_symbol"] == program:
                self.source, count = re.subn(pattern, replacement, self.source)
                places.append(count)

    monkeypatch.setattr(compile, "emulator", Changed)
    config = {program: SPECIALISED.get(program, {})}
    try:
        results(call, program.startswith("hsa_bwd"), config=config, chunk_size=S)
    finally:
        assert places and all(places), f"{pattern!r} is not in the source"


# name: (program, pattern in its CUDA source, what stands there instead, what the emulator says)
BROKEN = {
    "no proxy fence": (UNION, r"tl::fence_proxy_async\(\);", "", "no fence.proxy.async"),
    "no barrier after the prologue": (
        UNION, r"(tl::fence_proxy_async\(\);\s*)__syncthreads\(\);", r"\1", "race|uninitialised",
    ),
    "a stage is filled while it is read": (
        UNION, r"empty\[[^;]*\.wait\([^;]*;", "", "race with a read|more arrivals",
    ),
    "a stage is read while it is filled": (UNION, r"full\[[^;]*\.wait\([^;]*;", "", "race: wgmma"),
    "the wrong parity": (UNION, r"(full\[[^;]*\.wait\()([^;]*)\);", r"\1(\2) ^ 1);", "race|deadlock"),
    "fewer bytes expected": (
        UNION, r"expect_transaction\(8192\)", "expect_transaction(4096)", "race: wgmma|deadlock",
    ),
    "a stage never freed": (UNION, r"empty\[[^;]*\.arrive\(\);", "", "deadlock.*mbarrier"),
    "more registers than there are": (
        UNION, r"warpgroup_reg_alloc<\d+>", "warpgroup_reg_alloc<248>", "deadlock.*more registers",
    ),
    "wgmma not waited for": (UNION, r"warpgroup_wait<0>", "warpgroup_wait<1>", "wgmma is under way"),
    "wgmma without its fence": (UNION, r"tl::warpgroup_arrive\(\);", "", "wgmma without wgmma.fence"),
    "a store not waited for": (
        "hsa_bwd_chunk_sm90a", r"tl::tma_store_wait<0, true>\(\);", "", "race with a read|while a TMA store",
    ),
    "a barrier for the wrong number of threads": (
        "hsa_fwd_token", r"__sync_thread_partial\(3, \d+\)", "__sync_thread_partial(3, 32 + threadIdx.x / 32 * 32)",
        "is waited at for",
    ),
    "no barrier before a tile is read": ("hsa_fwd_token", r"tl::__sync_thread_partial\([^;]*;", "", "race"),
    "half a warp": (
        "hsa_fwd_token", r"\(tl::tl_shuffle_elect<128>\(\)\)",
        "(threadIdx.x % 2 && tl::tl_shuffle_elect<128>())", "deadlock.*elect",
    ),
    "a misaligned row": (
        "hsa_fwd_token", r"(ptx_ldmatrix_x4\(\(&\(\(\(bfloat16_t\*\)q_shared\)\[)", r"\g<1>1 + ", "misaligned",
    ),
    "beyond the tensor": ("hsa_fwd_token", r"\(q \+ \(", "(q + (1 << 24) + (", "out of bounds"),
    "beyond shared memory": (
        "hsa_fwd_token", r"\(\(float\*\)weights_shared\)\[", "((float*)weights_shared)[(1 << 16) + ", "out of bounds",
    ),
    "two CTAs write one row": (
        "hsa_fwd_token", r"\*\(uint4\*\)\(out \+ [^=]*=", "*(uint4*)(out + threadIdx.x * 8) =", "race between CTAs",
    ),
}  # fmt: skip


# Each is compiled for the host anew.
@pytest.mark.parametrize("broken", tiered(BROKEN, quick=("no barrier before a tile is read",)))
def test_what_is_broken_is_told(broken, monkeypatch):
    program, pattern, replacement, fault = broken
    with pytest.raises(emulator.Fault, match=fault):
        run_changed(program, pattern, replacement, monkeypatch)


def round_trip():
    """A tile from x to scratch and back, all by TMA; scratch is read by threads as well."""

    @T.prim_func
    def round_trip(
        x: T.Tensor((64, 64), "bfloat16"),
        scratch: T.Tensor((64, 64), "bfloat16"),
        out: T.Tensor((2, 64, 64), "bfloat16"),
    ):
        with T.Kernel(1, threads=128):
            tile = T.alloc_shared([64, 64], "bfloat16")
            full = T.alloc_barrier(arrive_count=128)
            T.tma_copy(x, tile, barrier=full)
            T.barrier_arrive(full)
            T.barrier_wait(full, 0)
            T.tma_copy(tile, scratch)
            T.tma_store_wait(0)
            T.sync_threads()
            for i, j in T.Parallel(64, 64):
                tile[i, j] = 0
            T.tma_store_wait(0, read=False)
            T.fence_proxy_async()
            T.sync_threads()
            for i, j in T.Parallel(64, 64):
                out[0, i, j] = scratch[i, j]
            T.tma_copy(scratch, tile, barrier=full)
            T.barrier_arrive(full)
            T.barrier_wait(full, 1)
            for i, j in T.Parallel(64, 64):
                out[1, i, j] = tile[i, j]

    return round_trip


def run_round_trip(pattern: str, replacement: str) -> None:
    kernel = compile.compile_ir(round_trip(), "cuda")
    kernel.source, count = re.subn(pattern, replacement, kernel.source, count=1)
    assert count, f"{pattern!r} is not in the source"
    x = torch.randn(64, 64).bfloat16()
    scratch, out = torch.zeros_like(x), torch.zeros(2, 64, 64).bfloat16()
    kernel(x, scratch, out)
    assert torch.equal(scratch, x) and torch.equal(out, torch.stack((x, x)))


WRITTEN = (r"tma_store_wait<0, false>", "tma_store_wait<0, true>")  # says only that the tile was read
FENCE = r"(tl::fence_proxy_async\(\);)"
# name: (pattern in the source, what stands there instead, what the emulator says)
BROKEN_ROUND_TRIP = {
    "a thread reads what a store may not have written": (*WRITTEN, "race: thread .* after the write of a TMA store"),
    "TMA reads what a store may not have written": (*WRITTEN, "race: a TMA load .* after the write of a TMA store"),
    "a tile is overwritten that a store may not have read": (
        r"tl::tma_store_wait<0, true>\(\);", "", "race with a read: thread .* after the read of a TMA store",
    ),
    "TMA reads global memory that threads wrote": (
        FENCE, r"scratch[threadIdx.x] = x[threadIdx.x]; \1", "no fence.proxy.async: a TMA load .* reads global",
    ),
    "more bytes are awaited than come": (r"expect_transaction\(\d+\)", "expect_transaction(1 << 15)", "deadlock"),
    "an mbarrier is not fenced": (r"tl::fence_barrier_init\(\);", "", "no fence.mbarrier_init: .* a TMA load"),
    "an mbarrier is fenced before it is initialised": (
        r"(if [^;]*full\[0\]\.init\(128\);\s*\})\s*(tl::fence_barrier_init\(\);)", r"\2\1",
        "no fence.mbarrier_init: .* a TMA load",
    ),
    "an mbarrier is used before all know of it": (
        r"(tl::fence_barrier_init\(\);\s*)__syncthreads\(\);",
        r"\1tl::__sync_thread_partial(14 + threadIdx.x / 64, 64);", "uses an mbarrier before it knows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN_ROUND_TRIP)
def test_what_is_broken_of_a_round_trip_is_told(broken):
    pattern, replacement, fault = BROKEN_ROUND_TRIP[broken]
    with pytest.raises(emulator.Fault, match=fault):
        run_round_trip(pattern, replacement)


def test_a_round_trip_that_is_not_broken_passes():
    run_round_trip("}", "}")


@prove
@pytest.mark.parametrize("program", (*SPECIALISED, "hsa_fwd_token"))
def test_what_is_not_broken_passes(program, monkeypatch):
    run_changed(program, "}", "}", monkeypatch)
