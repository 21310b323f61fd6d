"""hsa_bwd_chunk alone, on the CPU target: all gradients against the oracle, windows, poison, and what it promises."""

import re
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import Dims, attend, emulable, make_call, seeds
from tiers import prove

from hsa_tl import cases
from hsa_tl.autotune import static
from hsa_tl.impl.tilelang import targeted
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config import space, why_illegal
from hsa_tl.kernels_tilelang.config_base import ChunkConfig
from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig
from hsa_tl.kernels_tilelang.hsa_bwd_chunk_sm90a import BwdChunkSm90aConfig
from hsa_tl.pairs import sort_pairs
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, assert_attention, run_with_gradients

# Few static keys, since each is compiled: a power of two, and a group of 3 with weights for each head and a short tail.
WHOLE = Dims(T=13, T_kv=64, HQ=4, H=2, D=32, K=2)
TAIL = Dims(B=2, T=11, T_kv=40, HQ=3, H=1, D=16, K=3, per_head=True)
each_dims = pytest.mark.parametrize("d", [WHOLE, TAIL], ids=["whole", "tail"])
each_reduce_add = pytest.mark.parametrize("reduce_add", [0, 1])


def _chunks(x: torch.Tensor, S: int) -> torch.Tensor:
    """[B, T, H, D] -> [B, N, S, H, D], a short tail padded with zeros, as hsa_tl.api does."""
    B, T, H, D = x.shape
    N = -(-T // S)
    padded = torch.zeros(B, N * S, H, D, dtype=x.dtype, device=x.device)
    padded[:, :T] = x
    return padded.view(B, N, S, H, D)


def backward(call: Inputs, S=16, window: int | None = None, splits=1, config: BwdChunkConfig | None = None, **fields):
    """dq, dk, dv, dweights of windows of tokens, then dk and dv by chunk; `fields` change the CPU's config."""
    B, T, HQ, D = call.q.shape
    T_kv, H = call.k.shape[1:3]
    G, K, device, dtype = HQ // H, call.indices.shape[3], call.q.device, call.q.dtype
    k, v = _chunks(call.k, S), _chunks(call.v, S)
    N = k.shape[1]
    chunk_len = torch.full((N,), S, dtype=torch.int32, device=device)
    chunk_len[-1] = T_kv - (N - 1) * S
    q, do, weights = (x.unflatten(2, (H, -1)).contiguous() for x in (call.q, call.do, call.weights))
    problem = targeted(Problem.of(call.q, k, call.weights, call.indices, chunk_len if T_kv % S else None))
    config = config or replace(BwdChunkConfig.on_cpu(problem), **fields)
    program = "hsa_bwd_chunk_sm90a" if config.sm_90a_only else "hsa_bwd_chunk"
    kernel = compile.kernel(program, problem, config)
    dweights = torch.zeros_like(weights)
    shared = [torch.zeros(splits, *k.shape, device=device) for _ in "kv"]
    dq = torch.zeros(B, T, H, G, D, device=device)
    valid = (call.indices >= 0) & (call.indices < N)
    for start in range(0, T, window or T):
        stop = min(T, start + (window or T))
        outside = torch.ones(T, dtype=torch.bool, device=device)
        outside[start:stop] = False
        pair, offsets = sort_pairs(call.indices.masked_fill(outside[:, None, None], -1), N)
        begin, end = offsets[:-1].contiguous(), offsets[1:].contiguous()
        rows = torch.full((B, H, (stop - start) * K, G, D), torch.nan, dtype=dtype, device=device)
        arguments = (q, k, v, weights, pair, begin, end, start, chunk_len, do, D**-0.5)
        kernel(*arguments, dq if config.reduce_add else rows, *shared, dweights)
        if not config.reduce_add:
            rows = rows.view(B, H, stop - start, K, G, D).permute(0, 2, 1, 3, 4, 5)
            real = valid[:, start:stop, :, :]
            assert torch.equal(~rows.isnan().any((-1, -2)), real)  # a row for each real pair, and for no other
            dq[:, start:stop] = torch.where(real[..., None, None], rows, 0).float().sum(3)
    dk, dv = (x.sum(0) for x in shared)
    gradients = (dq.flatten(2, 3), dk.flatten(1, 2)[:, :T_kv], dv.flatten(1, 2)[:, :T_kv])
    return *(x.to(dtype) for x in gradients), dweights.flatten(2, 3), dk, dv


def _gradients(call: Inputs, **options) -> dict[str, torch.Tensor]:
    return dict(zip(("dq", "dk", "dv", "dweights"), backward(call, **options)[:4], strict=True))


@each_reduce_add
@each_dims
def test_every_gradient_agrees_with_the_oracle(d, reduce_add):
    """Duplicates, empty slots and unselected chunks fall as they fall; any number of tokens, windows and splits."""

    @hypothesis.settings(max_examples=10)
    @hypothesis.given(seed=seeds, T=st.integers(8, 18), window=st.none() | st.integers(5, 9), splits=st.integers(1, 4))
    def holds(seed, T, window, splits):
        call = make_call(d._replace(T=T), seed)
        actual = _gradients(call, reduce_add=reduce_add, window=window, splits=splits)
        assert_attention(actual, call, chunk_size=16)

    holds()


@each_reduce_add
@each_dims
def test_an_unselected_chunk_is_neither_read_nor_written(d, reduce_add):
    """All keys and values of a chunk that nobody chose are NaN; its dk and dv stay as they were."""
    call = make_call(d, seed=3)
    call.indices[call.indices == 1] = 0
    clean = _gradients(call, reduce_add=reduce_add)
    for x in (call.k, call.v):
        x[:, 16:32] = torch.nan
    actual = _gradients(call, reduce_add=reduce_add)
    for name, x in actual.items():
        assert torch.equal(x, clean[name]), name
    assert not actual["dk"][:, 16:32].any() and not actual["dv"][:, 16:32].any()


@each_dims
def test_keys_past_a_tail_get_no_gradient(d):
    *_, dk, dv = backward(make_call(d, seed=4))
    for x in (dk, dv):
        assert not x.flatten(1, 2)[:, d.T_kv :].any()


@each_dims
def test_windows_give_the_same_dk_dv_as_one_pass_to_rounding_and_repeat_exactly(d):
    call = make_call(d, seed=5)
    once, twice, again = (_gradients(call, window=w) for w in (None, 6, 6))
    for name in once:
        torch.testing.assert_close(once[name], twice[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(twice[name], again[name])


@each_dims
def test_no_pair_at_all_changes_nothing(d):
    call = make_call(d, seed=6)
    call.indices.fill_(-1)
    assert not any(x.any() for x in _gradients(call).values())


@each_dims
def test_one_pair_and_one_duplicate(d):
    """A lone pair repeats in every missing row of its tile; a duplicate counts twice."""
    for slots in (slice(0, 1), slice(0, 2)):
        call = make_call(d, seed=7)
        call.indices.fill_(-1)
        call.indices[0, 4, 0, slots] = 2
        assert_attention(_gradients(call), call, chunk_size=16)


def test_the_operator_sums_what_ctas_that_split_a_chunk_leave(monkeypatch):
    monkeypatch.setattr(ChunkConfig, "splits", lambda config, problem: 3)
    call = make_call(WHOLE)
    config = {"hsa_fwd_chunk": {"block_M": 16}, "hsa_bwd_chunk": {"block_M": 16}}
    actual = run_with_gradients(attend("tilelang"), call, chunk_size=16, config=config)
    assert_attention(actual, call, chunk_size=16)


def test_the_tile_size_only_regroups_the_pairs():
    call = make_call(TAIL, seed=8)
    a, b = (_gradients(call, block_M=m) for m in (16, 64))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


PAPER = cases.case("paper-d128").problem
TWIN = BwdChunkSm90aConfig()


@pytest.mark.parametrize(
    "changes, config, words",
    [
        ({"D": 96}, BwdChunkConfig(), "D must be 64 or 128, got 96"),
        ({}, replace(TWIN, num_stages=0), "num_stages must be at least 1, got 0"),
        ({"S": 32}, TWIN, "it needs D of 64 or 128, S = 64 and G of 8, 16, 32 or 64, got 128, 32 and 16"),
        ({"HQ": 4}, TWIN, "S = 64 and G of 8, 16, 32 or 64, got 128, 64 and 4"),
        ({}, replace(TWIN, block_M=64), "it needs block_M = 128 and threads = 256"),
        ({}, replace(TWIN, num_stages=3), "shared memory must be at most 232320 bytes"),
    ],
)
def test_why_illegal_says_what_and_why(changes, config, words):
    program = "hsa_bwd_chunk" if type(config) is BwdChunkConfig else "hsa_bwd_chunk_sm90a"
    assert words in why_illegal(program, replace(PAPER, **changes), config)


def test_the_twin_begins_with_two_stages_and_has_no_config_for_few_heads():
    assert space("hsa_bwd_chunk_sm90a", PAPER)[0] == TWIN
    assert not space("hsa_bwd_chunk_sm90a", replace(PAPER, HQ=4))


def _branch(source: str, opening: str) -> str:
    """The text of the braces that `opening` opens."""
    start = source.index(opening) + len(opening)
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
    return source[start:end]


@pytest.mark.parametrize("D", (64, 128))
def test_what_only_a_gpu_needs_of_the_twin(D):
    """A fence keeps the compiler from reading registers ahead of the wait for their product: all that a thread has of
    each accumulator. At D = 64 a consumer has all of dk or of dv. What the producer gives up the consumers take.
    """
    program = compile.build("hsa_bwd_chunk_sm90a", replace(PAPER, D=D), TWIN).script()
    fences = re.findall(r'warpgroup_fence_operand\("float32", acc_(\w+)\.data, 0, (\d+)\)', program)
    of_thread = {"s": 32, "dp": 32, "dq": D // 2, "dk": 32, "dv": 32}
    assert [(name, int(n)) for name, n in fences] == list(of_thread.items())
    assert re.findall(r"set_max_nreg\((\d+), (\d)\)", program) == [("56", "0"), ("224", "1")]


@prove
@pytest.mark.static
@pytest.mark.parametrize("reduce_add", [0, 1])
@pytest.mark.parametrize(
    "D, G, per_head, masked", [(128, 16, False, False), (64, 16, False, False), (128, 8, True, True)]
)
def test_the_twin_keeps_to_its_protocol(D, G, per_head, masked, reduce_add):
    """What can be read without a GPU: who meets at which barrier, who stores, and the registers that change hands."""
    problem = replace(PAPER, D=D, HQ=G, per_head=per_head, masked=masked)
    config = replace(TWIN, reduce_add=reduce_add)
    source = compile.lower("hsa_bwd_chunk_sm90a", problem, config).kernel_source
    assert not static.barrier_in_elected_branch(source)
    producer = _branch(source, "if (256 <= ((int)threadIdx.x)) {")
    consumers = source[source.index(producer) + len(producer) :]
    # Whoever meets at a named barrier is one group: TileLang's own, in the producer, must not be one of the consumers'.
    met = [set(re.findall(r"__sync_thread_partial\((.*), (\d+)\);", part)) for part in (producer, consumers)]
    assert {count for _, count in met[0]} == {"128"} and not {name for name, _ in met[0]} & {name for name, _ in met[1]}
    own = {("8", "256"), ("9", "256")} | (set() if reduce_add else {("((((int)threadIdx.x) >> 7) + 10)", "128")})
    assert own <= met[1] and all(int(name) < 8 and count == "256" for name, count in met[1] - own)
    assert "__syncthreads" not in producer + consumers
    # A thread of each consumer stores its dq; each adds its part of dk and dv (a branch of a shared one was once lost).
    assert consumers.count("tl_shuffle_elect<128>") == (not reduce_add) and consumers.count("tl_shuffle_elect") <= 1
    for name in ("dk", "dv"):
        assert re.search(rf"\*\(float2\*\)\({name} \+ .* = ", consumers)
    if not static.missing_tools():
        (found,) = static.analyse("hsa_bwd_chunk_sm90a", problem, [config])
        row = static.row("twin", "hsa_bwd_chunk_sm90a", problem, config, found)
        assert static.faults(row) == [] and row["registers"] == 168, row  # 384 * 168 = 128 * 56 + 256 * 224


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "d",
    [
        Dims(T=300, T_kv=512, HQ=16, D=128, S=64, K=16),
        Dims(B=2, T=130, T_kv=384, HQ=32, H=2, D=64, S=64, K=5),
        Dims(T=250, T_kv=250, HQ=8, D=128, S=64, K=8, per_head=True),
        Dims(T=100, T_kv=200, HQ=6, H=2, D=64, S=64, K=3, per_head=True),
    ],
    ids=["g16-d128", "g16-d64", "g8-per-head-tail", "g3-per-head-tail"],
)
def test_every_config_agrees_with_the_oracle_on_a_gpu(d, dtype):
    call = make_call(emulable(d))
    call = Inputs(
        *(x.to("cuda", dtype) for x in call[:3]), call.weights.cuda(), call.indices.cuda(), call.do.to("cuda", dtype)
    )
    problem = replace(PAPER, HQ=d.HQ, H=d.H, D=d.D, K=d.K, per_head=d.per_head, masked=d.T_kv % d.S != 0, dtype=dtype)
    for config in space("hsa_bwd_chunk", problem) + space("hsa_bwd_chunk_sm90a", problem):
        for window, splits in ((None, 1), (64, 3)):
            options = {"S": d.S, "config": config, "window": window, "splits": splits}
            actual = _gradients(call, **options)
            assert_attention(actual, call, chunk_size=d.S)
            if not config.reduce_add:
                again = _gradients(call, **options)
                assert all(torch.equal(x, again[n]) for n, x in actual.items()), config
