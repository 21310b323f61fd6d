"""retrieve_chunks against the dense oracle: exact selections, ties, gradients, blocks, memory."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import largest_allocation, seeds
from tiers import tiered

from hsa_tl import build_pairs, ops, retrieval, retrieve_chunks
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.oracle import retrieve_oracle
from hsa_tl.problem import Retrieval

KERNELS = ("tilelang", "triton")
EXAMPLES = {"tilelang": 40, "triton": 4}
IMPLS = ("reference", *KERNELS)
each_impl = pytest.mark.parametrize("impl", IMPLS)


def _inputs(B, T, N, R, D_r=16, seed=0, dtype=torch.float32, low=-1, high=1):
    """Small integers: at D_r = 16, scale 1/4, every score is exact, and many are equal."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(low, high + 1, (B, n, R, D_r), generator=g).to(dtype) for n in (T, N))


def assert_equals_oracle(q_slc, landmarks, topk, impl="auto", **options):
    scores, indices = retrieve_chunks(q_slc, landmarks, topk, impl=impl, **options)
    high_scores, high_indices = retrieve_oracle(q_slc.double(), landmarks.double(), topk, **options)
    assert indices.dtype == torch.int32
    assert scores.dtype == (torch.float64 if q_slc.dtype == torch.float64 else torch.float32)
    assert torch.equal(indices, high_indices)
    assert torch.equal(scores.double(), high_scores)
    return scores, indices


problems = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "T": st.integers(1, 90),
        "N": st.integers(0, 8) | st.integers(30, 100),
        "R": st.integers(1, 3),
        "seed": seeds,
        "dtype": st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    }
)
options = st.fixed_dictionaries(
    {
        "topk": st.integers(1, 10),
        "chunk_size": st.sampled_from((16, 32)),
        "q_start": st.integers(0, 70) | st.integers(0, 2000),
        "exclude_window": st.integers(0, 50) | st.integers(0, 2500),
        "scale": st.sampled_from((None, 1.0, 0.5, 0.0)),
    }
)


@given(problems, options)
def test_equals_the_oracle(problem, options):
    assert_equals_oracle(*_inputs(**problem), **options)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("topk", (3, 20))
def test_every_kernel_equals_the_oracle(impl, topk):
    """float32, and few topk, since TileLang compiles for each; no power of two, and more than 16."""

    @hypothesis.settings(max_examples=EXAMPLES[impl])
    @given(problems, options)
    def holds(problem, options):
        assert_equals_oracle(*_inputs(**problem | {"dtype": torch.float32}), impl=impl, **options | {"topk": topk})

    holds()


@given(problems, options, st.integers(1, 50) | st.integers(1, 5000))
def test_blocks_change_nothing(problem, options, block):
    q_slc, landmarks = _inputs(**problem, low=-3, high=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_SCORES", block)
        patch.setattr(retrieval, "TILE_CHUNKS", 64)
        assert_equals_oracle(q_slc, landmarks, **options)


def test_blocks_are_no_smaller_than_their_budget():
    """Tokens that see 4096 chunks each: a block holds as many scores as it may."""
    blocks = retrieval._blocks(slice(0, 4096), slice(0, 4096), 1 << 20, 64)
    assert {4096 * (tokens.stop - tokens.start) for tokens, *_ in blocks} == {retrieval.BLOCK_SCORES}


@pytest.mark.parametrize("stride", (0, 1, 2, 3))
def test_keys_of_one_access_share_no_bank(stride):
    """16 threads, half a warp, move 8 bytes each: 8 in a row of 64 keys, those of a thread 1 << stride apart."""
    from hsa_tl.kernels_tilelang.macros_sort import RADIX, at

    first = [((c >> stride) << (stride + 3)) + (c & ((1 << stride) - 1)) for c in range(8)]
    for x in range(RADIX):
        spots = {at(row, j + (x << stride)) % 16 for row in (0, 1) for j in first}
        assert spots == set(range(16))


@pytest.mark.parametrize(
    "impl, dtype", [("reference", torch.float64), *((impl, torch.float32) for impl in IMPLS)], ids=str
)
def test_equal_scores_prefer_the_lower_chunk(impl, dtype):
    """All scores equal, and zeros of either sign: the first topk visible chunks win."""
    q_slc = torch.ones(1, 700, 1, 16, dtype=dtype)
    landmarks = torch.ones(1, 43, 1, 16, dtype=dtype)
    landmarks[:, ::2] = -1.0
    _, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, scale=0.0, impl=impl)
    slots = torch.arange(3)
    assert torch.equal(indices[0, :, 0], torch.where(slots < torch.arange(700)[:, None] // 16, slots, -1).int())


@each_impl
@pytest.mark.parametrize("order", ("rising", "falling", "peak in the middle"))
def test_ordered_scores(impl, order):
    """Rising scores put every chunk among the best so far, falling ones none after the first."""
    N, T, K = 200, 40, 20
    value = {
        "rising": torch.arange(N),
        "falling": -torch.arange(N),
        "peak in the middle": -(torch.arange(N) - 90).abs(),
    }
    landmarks = value[order].float()[None, :, None, None].expand(1, N, 1, 16).contiguous()
    q_slc = torch.ones(1, T, 1, 16)
    assert_equals_oracle(q_slc, landmarks, K, chunk_size=16, q_start=N * 16 - 20, impl=impl)


@each_impl
def test_infinities_and_nan(impl):
    """-inf is a score like any other and its chunk is chosen where no other is left; NaN counts as the highest."""
    q_slc = torch.zeros(1, 90, 1, 16)
    q_slc[..., 0] = 1.0
    landmarks = torch.zeros(1, 5, 1, 16)
    landmarks[0, :, 0, 0] = torch.tensor([-torch.inf, 1.0, -torch.nan, torch.inf, torch.nan])
    _, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, impl=impl)
    expected = [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert indices[0, :, 0].tolist() == [expected[p // 16] for p in range(90)]


@each_impl
def test_visible_chunks(impl):
    """Whole chunks in the past: the first token of chunk 1 sees chunk 0, and the window hides what it covers whole."""
    q_slc, landmarks = _inputs(1, 200, 13, 1)
    _, indices = retrieve_chunks(q_slc, landmarks, 20, chunk_size=16, impl=impl)
    assert (indices >= 0).sum(-1).flatten().tolist() == [p // 16 for p in range(200)]
    for w in (1, 16, 32, 40):
        _, indices = retrieve_chunks(q_slc, landmarks, 20, chunk_size=16, exclude_window=w, impl=impl)
        visible = [sum((i + 1) * 16 <= p and i * 16 <= p - w for i in range(13)) for p in range(200)]
        assert (indices >= 0).sum(-1).flatten().tolist() == visible
        # p in {0, S - 1, S, 2 S - 1, w - 2 .. w + S}, each token alone
        for p in (0, 15, 16, 31, *range(max(0, w - 2), w + 17)):
            options = {"chunk_size": 16, "exclude_window": w, "q_start": p, "impl": impl}
            _, alone = retrieve_chunks(q_slc[:, p : p + 1], landmarks, 20, **options)
            assert torch.equal(alone, indices[:, p : p + 1])


@pytest.mark.parametrize("steps", tiered(((1,) * 20, (7, 1, 32, 20), (16, 44)), quick=((7, 1, 32, 20),)), ids=str)
@pytest.mark.parametrize("start", (0, 1000))
@each_impl
def test_chunked_prefill_is_bitwise_one_shot(impl, start, steps):
    """Scores with rounding: token by token, in parts and in one shot they and the selection agree in every bit."""
    T, N, S = sum(steps), 70, 16
    q_slc, landmarks = torch.randn(2, T, 2, 16), torch.randn(2, N, 2, 16)
    landmarks[:, 1::2] = landmarks[:, ::2] * (1 + 2**-23)  # near ties, which rounding decides
    if impl == "triton":  # interpreted, a product is NumPy's, whose rounding depends on the place in the tile
        q_slc, landmarks = _inputs(2, T, N, 2, low=-9, high=9)
    options = {"chunk_size": S, "exclude_window": 24, "impl": impl}
    whole = retrieve_chunks(q_slc, landmarks, 20, q_start=start, **options)
    ends = torch.tensor([0, *steps]).cumsum(0).tolist()
    # As a model calls it: only the landmarks that there are by then.
    parts = [
        retrieve_chunks(q_slc[:, a:b], landmarks[:, : (start + b) // S], 20, q_start=start + a, **options)
        for a, b in itertools.pairwise(ends)
    ]
    for one, other in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(other, 1))


@each_impl
def test_packed_equals_separate_calls_of_a_kernel(impl):
    lengths = [40, 0, 17, 100, 16]
    chunks = [-(-n // 16) for n in lengths]
    q_slc, landmarks = _inputs(1, sum(lengths), sum(chunks), 2)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, cu_seqlens=cu_seqlens, impl=impl)
    parts = [
        retrieve_chunks(q, m, 3, chunk_size=16)
        for q, m in zip(q_slc.split(lengths, 1), landmarks.split(chunks, 1), strict=True)
    ]
    assert all(torch.equal(a, torch.cat(b, 1)) for a, b in zip(packed, zip(*parts, strict=True), strict=True))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum), st.integers(1, 4), st.integers(0, 40), seeds)
def test_packed_equals_separate_calls(lengths, topk, window, seed):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    chunks = [-(-n // 16) for n in lengths]
    q_slc, landmarks = (
        x.requires_grad_() for x in _inputs(1, sum(lengths), sum(chunks), 2, seed=seed, dtype=torch.float64)
    )
    options = {"chunk_size": 16, "exclude_window": window}
    scores, indices = retrieve_chunks(q_slc, landmarks, topk, cu_seqlens=cu_seqlens, **options)
    parts = [
        retrieve_chunks(q, m, topk, **options)
        for q, m in zip(q_slc.split(lengths, 1), landmarks.split(chunks, 1), strict=True)
    ]
    other_scores, other_indices = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    assert torch.equal(indices, other_indices)
    assert torch.equal(scores, other_scores)
    gradients = [torch.autograd.grad(x.clamp(min=-100).sum(), (q_slc, landmarks)) for x in (scores, other_scores)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _gradients(retrieve, q_slc, landmarks, dscores, **options):
    leaves = [x.detach().requires_grad_() for x in (q_slc, landmarks)]
    scores, _ = retrieve(*leaves, 5, chunk_size=16, **options)
    return torch.autograd.grad(scores, leaves, dscores.to(scores.dtype))


@pytest.mark.parametrize("block", (retrieval.BLOCK_SCORES, 100))
@pytest.mark.parametrize("q_start", (0, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients(dtype, q_start, block, monkeypatch):
    """Non-contiguous inputs, rows with few visible chunks or none, an infinite incoming gradient in no slot."""
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", block)
    q_slc, landmarks = (x.mT.contiguous().mT for x in _inputs(2, 70, 7, 3, dtype=dtype, low=-9, high=9))
    dscores = torch.randn(2, 70, 3, 5)
    actual = _gradients(retrieve_chunks, q_slc, landmarks, dscores, q_start=q_start)
    wanted = expect(lambda *x: _gradients(retrieve_oracle, *x, q_start=q_start), q_slc, landmarks, dscores, out=dtype)
    for name, a, w in zip(("dq_slc", "dlandmarks"), actual, wanted, strict=True):
        assert a.dtype == dtype
        assert_accurate(name, a, w)


def test_gradient_of_an_empty_slot_is_ignored():
    """Autograd may hand NaN or inf to slots of score -inf; they belong to no chunk."""
    q_slc, landmarks = _inputs(1, 40, 3, 1)
    dscores = torch.ones(1, 40, 1, 5)
    _, indices = retrieve_chunks(q_slc, landmarks, 5, chunk_size=16)
    expected = _gradients(retrieve_chunks, q_slc, landmarks, dscores)
    for value in (torch.nan, torch.inf):
        actual = _gradients(retrieve_chunks, q_slc, landmarks, dscores.masked_fill(indices < 0, value))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each_impl
def test_gradient_of_landmark_0(impl):
    """Rows with empty slots choose chunk 0 too: a kernel that scatters their zeros there would lose its gradient."""
    q_slc, landmarks = _inputs(1, 100, 6, 2, low=-9, high=9)
    leaves = [x.requires_grad_() for x in (q_slc, landmarks)]
    scores, _ = retrieve_chunks(*leaves, 20, chunk_size=16, impl=impl)
    dq, dlandmarks = torch.autograd.grad(scores, leaves, torch.ones_like(scores))
    seen = (torch.arange(100) // 16)[:, None]
    expected = 0.25 * torch.stack([q_slc[0, (seen > i).flatten()].sum(0) for i in range(6)])
    assert torch.equal(dlandmarks[0], expected)
    assert torch.equal(dq[0], 0.25 * torch.stack([landmarks[0, : p // 16].sum(0) for p in range(100)]))


@pytest.mark.parametrize("impl", ("reference", "tilelang", "triton"))
def test_gradient_of_landmarks_by_every_program(impl):
    """Against float64, with empty slots anywhere and duplicates; a chunk that nobody chose gets 0; twice the same."""
    run = ops.implementation(f"{impl}_retrieval")
    B, T, R, D_r, K, N = 2, 70, 3, 16, 5, 9
    indices = torch.randint(-1, N - 1, (B, T, R, K), dtype=torch.int32)
    q_slc, dscores = torch.randn(B, T, R, D_r), torch.randn(B, T, R, K)
    pairs = build_pairs(indices, N)
    actual = run.dlandmarks(dscores, pairs, q_slc, N, 0.3)
    assert torch.equal(actual, run.dlandmarks(dscores, pairs, q_slc, N, 0.3))

    def dlandmarks(dscores, q_slc):
        weight = q_slc.new_zeros(B, T, R, N + 1).scatter_add(-1, indices.long() % (N + 1), 0.3 * dscores)
        return torch.einsum("btrn,btrd->bnrd", weight[..., :N], q_slc)

    assert_accurate("dlandmarks", actual, expect(dlandmarks, dscores, q_slc))
    assert (actual[:, N - 1] == 0).all()


def test_gradcheck():
    q_slc, landmarks = torch.randn(1, 20, 2, 4).double(), torch.randn(1, 4, 2, 4).double()

    def scores(q_slc, landmarks):
        scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, q_start=30)
        return scores.masked_fill(indices < 0, 0.0)

    assert torch.autograd.gradcheck(scores, (q_slc.requires_grad_(), landmarks.requires_grad_()), fast_mode=True)


def test_indices_are_not_differentiable():
    q_slc, landmarks = (x.requires_grad_() for x in _inputs(1, 40, 3, 1))
    scores, indices = retrieve_chunks(q_slc, landmarks, 2, chunk_size=16)
    assert scores.requires_grad and not indices.requires_grad


def test_memory_is_linear_in_tokens(monkeypatch):
    """Forward and backward build no (T, N) matrix, not of bytes: no allocation is larger than its half."""
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 1 << 14)
    T, N = 4096, 256
    leaves = [x.requires_grad_() for x in _inputs(1, T, N, 1, low=-9, high=9)]

    def step():
        scores, _ = retrieve_chunks(*leaves, 4, chunk_size=16)
        torch.autograd.grad(scores, leaves, torch.ones_like(scores))

    assert largest_allocation(step) <= T * N // 2


@each_impl
def test_positions_beyond_int32(impl):
    """The 16M-th chunk of 128 tokens ends at 2^31: positions need 64 bits, chunks do not."""
    q_slc, landmarks = _inputs(1, 3, 40, 1)
    start = 2**31 + 300
    assert_equals_oracle(q_slc, landmarks, 3, chunk_size=128, q_start=start, impl=impl)
    window = start - 20 * 128
    assert_equals_oracle(q_slc, landmarks, 3, chunk_size=128, q_start=start, exclude_window=window, impl=impl)


@pytest.mark.parametrize(
    "N, T, D_r",
    tiered([(1 << 14, 4096, 16), (1 << 18, 1024, 8), (1 << 24, 64, 4)], quick=[(1 << 14, 4096, 16)], rows=True),
    ids=str,
)
def test_long_context(N, T, D_r):
    """The last tokens of 1M and of 16M, and 16M chunks: against plain rows of scores, in little memory."""
    q_slc, landmarks = torch.randn(1, T, 1, D_r), torch.randn(1, N, 1, D_r)
    result = []
    limit = 8 * retrieval.BLOCK_SCORES + 4 * T * retrieval.TILE_CHUNKS // 16
    run = lambda: result.extend(retrieve_chunks(q_slc, landmarks, 64, q_start=N * 64 - T))  # noqa: E731
    assert largest_allocation(run) <= max(limit, 8 << 20)
    scores, indices = result
    for t in (0, T // 3, T - 1):
        row = retrieval._scores(q_slc[0, t], landmarks[0, : (N * 64 - T + t) // 64, 0], 1 / D_r**0.5)[0]
        best = row.sort(descending=True, stable=True).indices[:64].sort().values
        assert torch.equal(indices[0, t, 0].long(), best)
        assert torch.equal(scores[0, t, 0], row[best])


@pytest.mark.static
@pytest.mark.parametrize("D_r, K", tiered(((128, 64), (64, 16), (128, 128)), quick=((64, 16),), rows=True))
def test_triton_kernels_compile_for_hopper(D_r, K):
    """Without a GPU: no spills, and the scores on tensor cores."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, triton_launch = map(ops.implementation, ("triton_retrieval", "triton_launch"))
    types = {
        "q_slc": "*bf16",
        "landmarks": "*bf16",
        "visible": "*i32",
        "scores": "*fp32",
        "indices": "*i32",
        "scale": "fp32",
    }
    types |= {"dscores": "*fp32", "pair": "*i32", "offsets": "*i64", "dlandmarks": "*bf16"}
    topk = module.topk_constants(1, D_r, K)
    for kernel, constants in ((module.topk_kernel, topk), (module.dlandmarks_kernel, module.sum_constants(1, D_r, K))):
        jitted = triton_launch.form(kernel, False)
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in jitted.arg_names}
        source = ASTSource(jitted, signature, {n: v for n, v in constants.items() if n in signature})
        options = {n: v for n, v in constants.items() if n not in signature} | {"enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "st.local" not in made.asm["ptx"]
        assert kernel is not module.topk_kernel or "mma" in made.asm["ptx"]


def test_auto_takes_the_first_that_can(monkeypatch):
    """For the selection and for its gradient, which sums over any number of slots."""
    monkeypatch.setattr(ops, "preferred", lambda problem: ("tilelang", "triton", "reference"))
    modules = {name: ops.implementation(f"{name}_retrieval") for name in ("tilelang", "triton", "reference")}
    asked = []
    for name, module in modules.items():
        monkeypatch.setattr(module, "dlandmarks", lambda *_, x=name: asked.append(x) or retrieval.dlandmarks(*_))
    leaves = [torch.randn(1, n, 1, 16, requires_grad=True) for n in (40, 3)]
    for name, module in modules.items():
        assert ops.resolve("auto", Retrieval.of(leaves[0], 3, 2), "_retrieval") == f"{name}_retrieval"
        for topk in (2, 129):
            retrieve_chunks(*leaves, topk, chunk_size=16)[0].clamp(min=-9.0).sum().backward()
        assert asked == [name] * 2
        asked.clear()
        if name != "reference":
            monkeypatch.setattr(module, "unavailable", lambda *_: "a reason")
