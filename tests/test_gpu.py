"""On a Hopper GPU: every implementation and type against the float64 oracle, determinism, bounds, memory, graphs."""

import dataclasses

import pytest
import torch
from strategies import Dims, emulable, make_call, without_weights

from hsa_tl import build_pairs, fusion_weights, hsa_attention, retrieve_chunks, selected_attention
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.autotune import cost, table
from hsa_tl.kernels_tilelang.config import PROGRAMS, space, tuned
from hsa_tl.oracle import retrieve_oracle
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, assert_attention, run_with_gradients

pytestmark = pytest.mark.gpu

KERNELS = ("tilelang", "triton")
HALF = (torch.bfloat16, torch.float16)
TYPES = [
    *((impl, dtype) for impl in ("auto", "reference", *KERNELS) for dtype in HALF),
    *((impl, torch.float32) for impl in ("auto", "reference", "triton")),
]
each_type = pytest.mark.parametrize(
    "impl, dtype", TYPES, ids=[f"{impl}-{str(dtype).removeprefix('torch.')}" for impl, dtype in TYPES]
)
each_kernel = pytest.mark.parametrize("impl", KERNELS)

# Indices are uniform in [-1, N): every case has empty slots and duplicates anywhere in a row.
DIMS = {
    "paper-d128": Dims(T=300, T_kv=512, HQ=16, D=128, S=64, K=16),
    "paper-d64-two-kv-heads": Dims(B=2, T=130, T_kv=384, HQ=32, H=2, D=64, S=64, K=16),
    "tail-odd-k": Dims(B=2, T=333, T_kv=333, HQ=16, D=128, S=64, K=7),
    "tail-of-one-key": Dims(T=129, T_kv=129, HQ=16, D=64, S=64, K=3),
    "shorter-than-a-chunk": Dims(T=40, T_kv=40, HQ=16, D=128, S=64, K=2),
    "one-token": Dims(B=8, T=1, T_kv=640, HQ=16, D=128, S=64, K=5),
    "g4-s32": Dims(T=200, T_kv=320, HQ=8, H=2, D=64, S=32, K=5),
    "g1": Dims(T=200, T_kv=320, HQ=4, H=4, D=128, S=64, K=4),
    "g3-per-head": Dims(T=100, T_kv=200, HQ=6, H=2, D=64, S=64, K=3, per_head=True),
    "g16-per-head-tail": Dims(T=250, T_kv=250, HQ=16, D=128, S=64, K=8, per_head=True),
    "g32": Dims(T=100, T_kv=256, HQ=32, D=128, S=64, K=4),
}
DIMS = {name: emulable(d) for name, d in DIMS.items()}


def on_gpu(call: Inputs, dtype: torch.dtype) -> Inputs:
    q, k, v, do = (x.to("cuda", dtype) for x in (call.q, call.k, call.v, call.do))
    return Inputs(q, k, v, call.weights.cuda(), call.indices.cuda(), do)


def check(impl: str, call: Inputs, config: dict | None = None, **options) -> None:
    assert_attention(run_with_gradients(hsa_attention, call, impl=impl, config=config, **options), call, **options)


@each_type
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_equals_the_oracle(impl, dtype, dims):
    check(impl, on_gpu(make_call(dims), dtype), chunk_size=dims.S)


@pytest.mark.parametrize("G", (64, 128))
def test_many_query_heads_a_head_of_keys(G):
    """Which chunk stationary programs alone suit."""
    dims = emulable(Dims(T=100, T_kv=256, HQ=G, D=128, S=64, K=4))
    check("tilelang", on_gpu(make_call(dims), torch.bfloat16), chunk_size=dims.S)


@pytest.mark.parametrize("impl, dtype", TYPES)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_selected_equals_the_oracle(impl, dtype, dims):
    call = without_weights(on_gpu(make_call(dims), dtype))
    results = run_with_gradients(selected_attention, call, chunk_size=dims.S, impl=impl)
    assert_attention(results, call, chunk_size=dims.S)
    options = {"chunk_size": dims.S, "impl": impl, "deterministic": True}
    results, again = (run_with_gradients(selected_attention, call, **options) for _ in range(2))
    assert_attention(results, call, chunk_size=dims.S)
    assert all(torch.equal(again[name], x) for name, x in results.items())


@pytest.mark.device
def test_tilelang_float32_is_refused():
    """Its programs on CUDA are for tensor cores."""
    with pytest.raises(NotImplementedError, match=r"impl='tilelang' cannot run .*; use 'auto' or"):
        check("tilelang", on_gpu(make_call(DIMS["g1"]), torch.float32), chunk_size=64)


@each_type
def test_all_empty_rows_and_unselected_chunks(impl, dtype):
    """Rows of -1 give exactly 0; a chunk nobody selected has gradient exactly 0."""
    call = make_call(Dims(T=100, T_kv=256, HQ=16, D=64, S=64, K=4))
    call.indices[:, 40:60] = -1
    call.indices[call.indices == 2] = 1
    call = on_gpu(call, dtype)
    actual = run_with_gradients(hsa_attention, call, chunk_size=64, impl=impl)
    assert all((actual[name][:, 40:60] == 0).all() for name in ("out", "dq", "dweights"))
    assert all((actual[name][:, 128:192] == 0).all() for name in ("dk", "dv"))
    check(impl, call, chunk_size=64)


@each_type
def test_packed(impl, dtype):
    """An empty sequence, one shorter than a chunk, tails."""
    lengths = [200, 0, 17, 130]
    T = sum(lengths)
    call = make_call(Dims(T=T, T_kv=T, HQ=16, D=64, S=64, K=4))
    limit = torch.cat([torch.full((n,), -(-n // 64)) for n in lengths])[:, None, None]
    call = call._replace(indices=(torch.randint(0, 1 << 20, call.indices.shape) % (limit + 1) - 1).int())
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    check(impl, on_gpu(call, dtype), cu_seqlens=cu_seqlens, chunk_size=64)


@each_kernel
def test_strided_inputs(impl):
    call = on_gpu(make_call(Dims(B=2, T=100, T_kv=192, HQ=16, D=64, S=64, K=4)), torch.bfloat16)
    kv = torch.cat([call.k, call.v], -1)
    strided = Inputs(
        call.q.transpose(1, 2).contiguous().transpose(1, 2),
        kv[..., :64],
        kv[..., 64:],
        call.weights.mT.contiguous().mT,
        call.indices.mT.contiguous().mT,
        call.do.transpose(1, 2).contiguous().transpose(1, 2),
    )
    options = {"chunk_size": 64, "impl": impl}
    plain, other = (run_with_gradients(hsa_attention, x, **options) for x in (call, strided))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@each_kernel
def test_scores_below_minus_88_give_no_nan(impl):
    call = make_call(Dims(T=100, T_kv=256, HQ=16, D=64, S=64, K=4))
    call.q[..., 0], call.k[:, 64:128, :, 0] = 64.0, -256.0
    check(impl, on_gpu(call, torch.bfloat16), scale=0.125, chunk_size=64)


@each_type
def test_two_runs_are_bitwise_equal(impl, dtype):
    """Many tokens share each chunk, so an atomic sum would show."""
    call = on_gpu(make_call(emulable(Dims(T=4096, T_kv=512, HQ=16, D=128, S=64, K=8))), dtype)
    first, *others = (
        run_with_gradients(hsa_attention, call, chunk_size=64, impl=impl, deterministic=True) for _ in range(3)
    )
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("impl", ("reference", *KERNELS))
@pytest.mark.device  # on a CPU it raises
def test_index_out_of_range(impl, monkeypatch):
    """Unchecked it is an empty slot, never an out-of-bounds read; validate=True or HSA_TL_VALIDATE=1 raises."""
    good = make_call(Dims(T=100, T_kv=250, HQ=16, D=64, S=64, K=4))
    outside = torch.rand(good.indices.shape) < 0.3
    values = torch.tensor([4, 5, -2, 2**31 - 1, -(2**31)], dtype=torch.int32)
    wild = values[torch.randint(0, 5, good.indices.shape)]
    empty, bad = (
        on_gpu(good._replace(indices=torch.where(outside, x, good.indices)), torch.bfloat16)
        for x in (torch.full_like(wild, -1), wild)
    )
    options = {"chunk_size": 64, "impl": impl}
    a, b = (run_with_gradients(hsa_attention, x, **options) for x in (empty, bad))
    assert all(torch.equal(a[name], b[name]) for name in a)
    pairs = build_pairs(bad.indices, 4)
    assert torch.equal(pairs.offsets, build_pairs(empty.indices, 4).offsets)
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, 4\)"):
        hsa_attention(*bad[:5], validate=True, **options)
    monkeypatch.setenv("HSA_TL_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, 4\)"):
        hsa_attention(*bad[:5], **options)


@each_kernel
@pytest.mark.device
def test_memory_is_linear_in_tokens(impl):
    """Forward and backward at 256K tokens take less than half a (T, N) mask of bytes."""
    T, S = 1 << 18, 64
    call = make_call(Dims(T=T, T_kv=T, HQ=1, D=64, S=S, K=4))
    call = on_gpu(call, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_with_gradients(hsa_attention, call, chunk_size=S, impl=impl)
    assert torch.cuda.max_memory_allocated() - before < T * (T // S) // 2


@pytest.mark.device
def test_triton_does_not_recompile_for_a_new_length(monkeypatch):
    import triton

    def step(T, B=1, H=1):
        dims = Dims(B=B, T=T, T_kv=T, HQ=16 * H, H=H, D=64, S=64, K=4)
        check("triton", on_gpu(make_call(dims), torch.bfloat16), chunk_size=64)

    # Divisible by 16 or not, a short last chunk or not, one split of a chunk's tokens or several.
    for T in (128, 200, 1024, 1000):
        step(T)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(fn.name))
    for T in (256, 320, 777, 1111):
        step(T)
    step(192, B=2)
    assert not compiled


@each_kernel
@pytest.mark.device
def test_cuda_graph(impl):
    """A captured forward replays on new contents: it reads nothing on the host."""
    call, other = (on_gpu(make_call(Dims(T=64, T_kv=512, HQ=16, D=128, S=64, K=8), s), torch.bfloat16) for s in (1, 2))
    forward = lambda x: hsa_attention(*x[:5], chunk_size=64, impl=impl)  # noqa: E731
    wanted = forward(other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(call)
    for x, y in zip(call, other, strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, wanted)


def layer(q_slc, landmarks, q, k, v):
    scores, indices = retrieve_chunks(q_slc, landmarks, 4, chunk_size=64)
    return hsa_attention(q, k, v, fusion_weights(scores), indices, chunk_size=64)


@pytest.mark.device
def test_compile_equals_eager():
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (512, 600):
        call = on_gpu(make_call(Dims(T=T, T_kv=T, HQ=16, D=64, S=64, K=4)), torch.bfloat16)
        q_slc, landmarks = torch.randn(1, T, 1, 64, device="cuda"), torch.randn(1, -(-T // 64), 1, 64, device="cuda")
        inputs = [x.requires_grad_() for x in (q_slc, landmarks, *call[:3])]
        results = []
        for f in (layer, compiled):
            out = f(*inputs)
            results.append((out, *torch.autograd.grad(out, inputs, call.do)))
        for a, b in zip(*results, strict=True):  # the compiler's softmax rounds otherwise
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-8 * b.abs().max().item())


@each_type
@pytest.mark.parametrize("window", (0, 200))
@pytest.mark.parametrize(
    "T, N, K, D_r, q_start", [(1000, 20, 5, 16, 300), (300, 3000, 64, 64, 190000), (70, 500, 128, 128, 31000)]
)
def test_retrieval_equals_the_oracle(impl, dtype, window, T, N, K, D_r, q_start):
    """Integers, so every score is exact and many are equal: the lower chunk wins on the GPU too."""
    q_slc, landmarks = (torch.randint(-1, 2, (2, n, 3, D_r), device="cuda").to(dtype) for n in (T, N))
    options = {"chunk_size": 64, "exclude_window": window, "q_start": q_start, "scale": 0.25}
    scores, indices = retrieve_chunks(q_slc, landmarks, K, impl=impl, **options)
    high_scores, high_indices = retrieve_oracle(q_slc.double().cpu(), landmarks.double().cpu(), K, **options)
    assert torch.equal(indices.cpu(), high_indices)
    assert torch.equal(scores.cpu().double(), high_scores)


@each_type
@pytest.mark.parametrize(
    "T, N, K, q_start, span", [(1000, 20, 5, 300, 16), (300, 3000, 64, 190000, 16), (70, 40, 9, 0, 99)]
)
def test_retrieval_with_recency_equals_the_oracle(impl, dtype, T, N, K, q_start, span):
    """Quarters, so that near and far chunks tie."""
    q_slc, landmarks = (torch.randint(-1, 2, (2, n, 3, 64), device="cuda").to(dtype) for n in (T, N))
    recency = torch.tensor([0.0, 0.25, 1.5], device="cuda")
    options = {"exclude_window": 100, "scale": 0.25, "recency_span": span}
    found = retrieve_chunks(q_slc, landmarks, K, q_start=q_start, recency=recency, impl=impl, **options)

    def oracle(q, m, r):
        return retrieve_oracle(q, m, K, q_start=q_start, recency=r, **options)

    inputs = [x.cpu() for x in (q_slc, landmarks, recency)]
    assert torch.equal(found[1].cpu(), oracle(*(x.double() for x in inputs))[1])
    assert_accurate("scores", found[0].cpu(), expect(lambda *x: oracle(*x)[0], *inputs))


@each_kernel
def test_chunked_prefill_retrieves_the_same_bits(impl):
    q_slc, landmarks = (torch.randn(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (300, 700))
    landmarks[:, 1::2] = landmarks[:, ::2]
    whole = retrieve_chunks(q_slc, landmarks, 16, q_start=40000, impl=impl)
    parts = [
        retrieve_chunks(q_slc[:, a:b], landmarks[:, : (40000 + b) // 64], 16, q_start=40000 + a, impl=impl)
        for a, b in ((0, 1), (1, 2), (2, 130), (130, 300))
    ]
    assert all(torch.equal(x, torch.cat(y, 1)) for x, y in zip(whole, zip(*parts, strict=True), strict=True))


@each_type
def test_retrieval_gradients(impl, dtype):
    """Twice the same bits; against float64."""
    q_slc, landmarks = (torch.randn(2, n, 2, 64, device="cuda", dtype=dtype) for n in (700, 11))
    dscores = torch.randn(2, 700, 2, 8, device="cuda")

    def gradients(retrieve, q, m, ds, **options):
        leaves = [x.detach().requires_grad_() for x in (q, m)]
        scores, indices = retrieve(*leaves, 8, chunk_size=64, **options)
        return torch.autograd.grad(scores, leaves, ds.to(scores.dtype).masked_fill(indices < 0, 0.0))

    actual, again = (gradients(retrieve_chunks, q_slc, landmarks, dscores, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    inputs = q_slc.cpu(), landmarks.cpu(), dscores.cpu()
    wanted = expect(lambda *x: gradients(retrieve_oracle, *x), *inputs, out=dtype)
    for name, a, w in zip(("dq_slc", "dlandmarks"), actual, wanted, strict=True):
        assert_accurate(name, a, w)


def test_pairs_equal_the_cpu_ones():
    indices = torch.randint(-1, 9, (2, 300, 3, 5), dtype=torch.int32)
    for a, b in zip(build_pairs(indices.cuda(), 9), build_pairs(indices, 9), strict=True):
        assert torch.equal(a.cpu(), b)


STRATEGY_DIMS = (
    "paper-d128",
    "paper-d64-two-kv-heads",
    "tail-odd-k",
    "g4-s32",
    "g1",
    "g3-per-head",
    "g16-per-head-tail",
)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("program", tuned())
@pytest.mark.parametrize("name", STRATEGY_DIMS)
def test_every_config_of_every_program_equals_the_oracle(name, program, dtype):
    """So each strategy, and each hand-specialised program beside its tile-level twin, which the CPU tests prove."""
    dims = DIMS[name]
    call = on_gpu(make_call(dims), dtype)
    masked = dims.T_kv % dims.S != 0
    problem = Problem(
        dims.B, dims.T, dims.N, dims.HQ, dims.H, dims.D, dims.S, dims.K, dtype, masked=masked, per_head=dims.per_head
    )
    for config in space(program, problem):
        check("tilelang", call, chunk_size=dims.S, config={program: dataclasses.asdict(config)})


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name.startswith("selected_") and PROGRAMS[name]])
@pytest.mark.parametrize("name", STRATEGY_DIMS)
def test_every_config_of_one_softmax_equals_the_oracle(name, program):
    dims = DIMS[name]
    call = without_weights(on_gpu(make_call(dims), torch.bfloat16))
    masked = dims.T_kv % dims.S != 0
    problem = Problem(dims.B, dims.T, dims.N, dims.HQ, dims.H, dims.D, dims.S, dims.K, torch.bfloat16, masked=masked)
    for config in space(program, problem):
        options = {"chunk_size": dims.S, "impl": "tilelang", "config": {program: dataclasses.asdict(config)}}
        assert_attention(run_with_gradients(selected_attention, call, **options), call, chunk_size=dims.S)


@pytest.mark.parametrize("D", (64, 128))
def test_every_shipped_plan_equals_the_oracle(D):
    """What a table names runs without being asked for."""
    call = on_gpu(make_call(Dims(T=200, T_kv=512, HQ=16, D=D, S=64, K=4)), torch.bfloat16)
    for row in (r for device in cost.DEVICES for r in table.shipped(device)):
        if (row["D"], row["G"], row["S"]) == (D, 16, 64):
            check("tilelang", call, chunk_size=64, config=row["programs"])


def test_windows_of_partials_give_the_same(monkeypatch):
    """A small HSA_TL_PARTIAL_BYTES makes many windows of tokens: the same forward; dk and dv added up by window."""
    call = on_gpu(make_call(DIMS["paper-d128"]), torch.bfloat16)
    config = {"hsa_fwd_chunk_sm90a": {}, "hsa_bwd_chunk_sm90a": {}}
    whole = run_with_gradients(hsa_attention, call, impl="tilelang", config=config, chunk_size=64)
    monkeypatch.setenv("HSA_TL_PARTIAL_BYTES", str(64 * 16 * 16 * 128 * 2))
    check("tilelang", call, chunk_size=64, config=config)
    windows = run_with_gradients(hsa_attention, call, impl="tilelang", config=config, chunk_size=64)
    assert all(torch.equal(whole[name], windows[name]) for name in ("out", "dq", "dweights"))
