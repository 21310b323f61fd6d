"""Bounded recency of retrieve_chunks and retrieve_decode against the dense oracle: selections, ties, gradients."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import largest_allocation, seeds
from test_decode_retrieval import int32
from test_retrieval import IMPLS, KERNELS, _inputs, each_impl, options, problems

from hsa_tl import landmark_bounds, near, retrieval, retrieve_chunks, retrieve_decode
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.oracle import retrieve_oracle
from hsa_tl.testing import check_retrieval

S = 16
EXAMPLES = {"tilelang": 20, "triton": 3}


def integers(R, seed=0, high=3):
    """recency: quarters, as scores of `_inputs` are, so that near and far chunks tie."""
    return torch.randint(0, 4 * high + 1, (R,), generator=torch.Generator().manual_seed(seed)) / 4


def assert_equals_oracle(q_slc, landmarks, recency, topk, impl="auto", **options):
    """Indices exactly. Scores are rounded: the share of recency is a logarithm."""
    scores, indices = retrieve_chunks(q_slc, landmarks, topk, recency=recency, impl=impl, **options)

    def oracle(q_slc, landmarks, recency):
        return retrieve_oracle(q_slc, landmarks, topk, recency=recency, **options)

    high = oracle(q_slc.double(), landmarks.double(), recency.double())
    assert indices.dtype == torch.int32 and torch.equal(indices, high[1])
    assert_accurate("scores", scores, expect(lambda *x: oracle(*x)[0], q_slc, landmarks, recency))
    return scores, indices


def joined(q_slc, landmarks, recency, topk, *, chunk_size, recency_span, q_start=0, exclude_window=0, scale=None):
    """As kernels do it: far chunks found without recency, near ones scored beside them."""
    scale = q_slc.shape[-1] ** -0.5 if scale is None else scale
    options = {"chunk_size": chunk_size, "q_start": q_start, "scale": scale}
    hidden = near.far_window(recency_span, chunk_size, exclude_window)
    far = retrieve_chunks(q_slc, landmarks, topk, exclude_window=hidden, **options)
    return near.join(q_slc, *far, landmarks, None, recency, recency_span, chunk_size, q_start, exclude_window, scale)


recencies = st.builds(integers, st.just(3), seeds)
spans = st.sampled_from((2, 3, 4, 16)) | st.integers(2, 150)


@given(problems, options, recencies, spans, st.integers(1, 5000))
def test_equals_the_oracle(problem, options, recency, span, block):
    """Spans larger than N, windows that hide near chunks, ties between near and far ones, tiles."""
    recency = recency[: problem["R"]].to(torch.float64 if problem["dtype"] == torch.float64 else torch.float32)
    inputs, options = (*_inputs(**problem), recency), options | {"recency_span": span}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "BLOCK_SCORES", block)
        patch.setattr(retrieval, "TILE_CHUNKS", 64)
        for one, other in zip(assert_equals_oracle(*inputs, **options), joined(*inputs, **options), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("impl", KERNELS)
def test_every_kernel_equals_the_oracle(impl):
    @hypothesis.settings(max_examples=EXAMPLES[impl])
    @given(problems, options, recencies, spans)
    def holds(problem, options, recency, span):
        inputs = _inputs(**problem | {"dtype": torch.float32})
        options = options | {"topk": 3, "recency_span": span}
        assert_equals_oracle(*inputs, recency[: problem["R"]], impl=impl, **options)

    holds()


@given(problems, options, spans, st.integers(1, 5000))
def test_recency_0_is_none_to_the_bit(problem, options, span, block):
    """Blocks of any size: scores of near chunks have the bits that the others have."""
    inputs = [torch.randn_like(x, dtype=torch.float32) for x in _inputs(**problem)]
    want = retrieve_chunks(*inputs, **options)
    recency, options = torch.zeros(problem["R"]), options | {"recency_span": span}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "BLOCK_ELEMENTS", block)
        patch.setattr(retrieval, "BLOCK_SCORES", block)
        patch.setattr(retrieval, "TILE_CHUNKS", 64)
        for got in (f(inputs[0], inputs[1], recency=recency, **options) for f in (retrieve_chunks, joined)):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@each_impl
def test_great_recency_is_a_window_of_the_nearest_chunks(impl):
    q_slc, landmarks = torch.randn(2, 200, 2, 16), torch.randn(2, 13, 2, 16)
    recency = torch.tensor([1e9, 0.0])
    _, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, recency=recency, recency_span=40, impl=impl)
    own = torch.arange(200)[:, None] // 16
    nearest = (own - 3).clamp(min=0) + torch.arange(3)
    assert (indices[:, :, 0] == torch.where(nearest < own, nearest, -1)).all()
    plain = retrieve_chunks(q_slc, landmarks, 3, chunk_size=16, impl=impl)
    assert torch.equal(indices[:, :, 1], plain[1][:, :, 1])


@each_impl
def test_the_loss_of_far_chunks_is_bounded(impl):
    """The best chunk by more than recency is chosen however far it is; the others are then the nearest."""
    landmarks = torch.zeros(1, 5000, 1, 16)
    landmarks[0, 7] = 1.0
    options = {"chunk_size": 16, "q_start": 5000 * 16, "impl": impl}
    recency = torch.tensor([3.5])
    scores, indices = retrieve_chunks(torch.ones(1, 1, 1, 16), landmarks, 3, recency=recency, **options)
    assert indices.flatten().tolist() == [7, 4998, 4999]
    assert scores.flatten().tolist() == [0.5, -0.875, 0.0]


@each_impl
def test_infinities_and_nan(impl):
    """As without it: -inf is a score like any other, NaN the highest, be they near or far."""
    q_slc = torch.zeros(1, 110, 1, 16)
    q_slc[..., 0] = 1.0
    landmarks = torch.zeros(1, 6, 1, 16)
    landmarks[0, :, 0, 0] = torch.tensor([-torch.inf, 1.0, torch.nan, torch.inf, -torch.inf, torch.nan])
    options = {"chunk_size": 16, "impl": impl, "recency": torch.ones(1), "recency_span": 3}
    _, indices = retrieve_chunks(q_slc, landmarks, 3, **options)
    expected = [[-1, -1, -1], [0, -1, -1], [0, 1, -1], [0, 1, 2], [1, 2, 3], [1, 2, 3], [2, 3, 5]]
    assert indices[0, :, 0].tolist() == [expected[p // 16] for p in range(110)]


@each_impl
@pytest.mark.parametrize("start", (0, 1000))
def test_chunked_prefill_is_bitwise_one_shot(impl, start):
    steps, S = (7, 1, 32, 20), 16
    q_slc, landmarks = torch.randn(2, 60, 2, 16), torch.randn(2, 70, 2, 16)
    if impl == "triton":  # as in test_chunked_prefill_is_bitwise_one_shot
        q_slc, landmarks = _inputs(2, 60, 70, 2, low=-9, high=9)
    options = {"chunk_size": S, "exclude_window": 24, "recency": torch.rand(2), "impl": impl}
    whole = retrieve_chunks(q_slc, landmarks, 5, q_start=start, **options)
    ends = torch.tensor([0, *steps]).cumsum(0).tolist()
    parts = [
        retrieve_chunks(q_slc[:, a:b], landmarks[:, : (start + b) // S], 5, q_start=start + a, **options)
        for a, b in itertools.pairwise(ends)
    ]
    for one, other in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(other, 1))


@each_impl
def test_packed_sequences_equal_separate_calls(impl):
    lengths = [40, 0, 17, 100, 16]
    chunks = [-(-n // 16) for n in lengths]
    q_slc, landmarks = _inputs(1, sum(lengths), sum(chunks), 2)
    leaves = [q_slc.requires_grad_(), landmarks.requires_grad_(), integers(2).requires_grad_()]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"chunk_size": 16, "recency": leaves[2], "recency_span": 4, "impl": impl}
    packed = retrieve_chunks(q_slc, landmarks, 3, cu_seqlens=cu_seqlens, **options)
    parts = [
        retrieve_chunks(q, m, 3, **options)
        for q, m in zip(q_slc.split(lengths, 1), landmarks.split(chunks, 1), strict=True)
    ]
    other = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(packed, other, strict=True))
    gradients = [torch.autograd.grad(x.clamp(min=-100).sum(), leaves) for x in (packed[0], other[0])]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("span", (2, 4, 100))
@pytest.mark.parametrize("impl, dtype", [("reference", torch.bfloat16), *((impl, torch.float32) for impl in IMPLS)])
def test_gradients(impl, dtype, span):
    """Of queries, landmarks and recency; rows with few visible chunks or none, NaN for empty slots."""
    q_slc, landmarks = _inputs(2, 70, 7, 3, dtype=dtype, low=-9, high=9)
    recency, dscores = torch.tensor([0.0, 1.5, 20.0]), torch.randn(2, 70, 3, 3)

    def gradients(retrieve, q_slc, landmarks, dscores, recency, **options):
        leaves = [x.detach().requires_grad_() for x in (q_slc, landmarks, recency)]
        options |= {"chunk_size": S, "q_start": 20, "recency_span": span}
        scores, indices = retrieve(leaves[0], leaves[1], 3, recency=leaves[2], **options)
        return torch.autograd.grad(scores, leaves, dscores.to(scores.dtype).masked_fill(indices < 0, torch.nan))

    inputs = q_slc, landmarks, dscores, recency
    actual = gradients(retrieve_chunks, *inputs, impl=impl)
    wanted = expect(lambda *x: gradients(retrieve_oracle, *x)[:2], *inputs, out=dtype)
    wanted += expect(lambda *x: gradients(retrieve_oracle, *x)[2:], *inputs)
    for name, a, w, leaf in zip(
        ("dq_slc", "dlandmarks", "drecency"), actual, wanted, inputs[:2] + inputs[3:], strict=True
    ):
        assert a.dtype == leaf.dtype
        assert_accurate(name, a, w)


def test_gradcheck():
    inputs = [torch.randn(1, n, 2, 4).double().requires_grad_() for n in (20, 4)]
    recency = torch.rand(2).double().requires_grad_()

    def scores(q_slc, landmarks, recency):
        scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, q_start=30, recency=recency)
        return scores.masked_fill(indices < 0, 0.0)

    assert torch.autograd.gradcheck(scores, [*inputs, recency], fast_mode=True)


@each_impl
def test_scores_with_rounding(impl):
    """Normal inputs: the selection but for what rounding may swap, and the scores' accuracy."""
    q_slc, landmarks, recency = torch.randn(2, 90, 2, 64), torch.randn(2, 80, 2, 64), torch.tensor([0.7, 5.0])
    options = {"chunk_size": S, "q_start": 1000, "recency": recency, "recency_span": 16}
    found = retrieve_chunks(q_slc, landmarks, 5, impl=impl, **options)
    assert check_retrieval(*found, q_slc, landmarks, **options) == []
    near_ones = found[1] >= (1000 + torch.arange(90))[:, None, None] // S - 15
    assert near_ones.any() and not near_ones.all()


def test_types_of_recency():
    """Any floating type, of which its gradient is too."""
    q_slc, landmarks = torch.randn(1, 90, 2, 16).bfloat16(), torch.randn(1, 5, 2, 16).bfloat16()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        recency = torch.tensor([0.5, 2.0], dtype=dtype, requires_grad=True)
        scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, recency=recency)
        want = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, recency=recency.detach().float())
        assert scores.dtype == torch.float32 and torch.equal(scores, want[0]) and torch.equal(indices, want[1])
        scores[scores.isfinite()].sum().backward()
        assert recency.grad.dtype == dtype and (recency.grad < 0).all()


def test_autocast_changes_nothing():
    inputs = torch.randn(1, 90, 2, 16), torch.randn(1, 5, 2, 16), torch.tensor([0.5, 2.0])
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            scores, indices = retrieve_chunks(*leaves[:2], 3, chunk_size=S, recency=leaves[2])
        results.append((scores, indices, *torch.autograd.grad(scores.clamp(min=-9).sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    lengths = int32(500)

    def step(q_slc, landmarks, recency):
        scores, indices = retrieve_chunks(q_slc, landmarks, 3, chunk_size=S, recency=recency, recency_span=4)
        with torch.no_grad():
            near = retrieve_decode(q_slc[:, :1], landmarks, lengths, 3, chunk_size=S, recency=recency, recency_span=4)
        return scores, indices, *near

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for T in (90, 91):
        leaves = [x.requires_grad_() for x in (torch.randn(1, T, 2, 16), torch.randn(1, 5, 2, 16), torch.rand(2))]
        results = [f(*leaves) for f in (step, compiled)]
        gradients = [torch.autograd.grad(x[0].clamp(min=-9).sum(), leaves) for x in results]
        for one, other in (results, gradients):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_is_linear_in_tokens(monkeypatch):
    """Forward and backward hold no (T, N) matrix, not of bytes, and no (T, span - 1) matrix of scores."""
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 1 << 14)
    monkeypatch.setattr(near, "BLOCK_ELEMENTS", 1 << 14)
    T, N = 4096, 256
    leaves = [x.requires_grad_() for x in (*_inputs(1, T, N, 1, low=-9, high=9), torch.ones(1))]

    def step():
        scores, _ = retrieve_chunks(*leaves[:2], 4, chunk_size=S, recency=leaves[2], recency_span=N)
        torch.autograd.grad(scores, leaves, torch.ones_like(scores))
        with torch.no_grad():
            joined(*leaves, 4, chunk_size=S, recency_span=N)

    assert largest_allocation(step) <= T * N // 2


@hypothesis.given(
    B=st.integers(1, 3), T=st.integers(1, 3), R=st.integers(1, 2), N=st.integers(1, 200), topk=st.integers(1, 40),
    window=st.sampled_from((0, 1, S, 50)), span=spans, two_level=st.booleans(), held=st.booleans(), seed=seeds,
    data=st.data(),
)  # fmt: skip
def test_decode_selects_what_retrieve_chunks_selects(B, T, R, N, topk, window, span, two_level, held, seed, data):
    """Ragged lengths, tokens on both sides of a chunk's end, sequences that hold fewer chunks; the same bits."""
    q_slc, landmarks = _inputs(B, T, N, R, seed=seed)
    lengths = int32(*(data.draw(st.integers(0, N * S + S)) for _ in range(B)))
    chunks = int32(*(data.draw(st.integers(0, N)) for _ in range(B))) if held else None
    options = {"chunk_size": S, "exclude_window": window, "recency": integers(R, seed), "recency_span": span}
    bounds = landmark_bounds(landmarks) if two_level else None
    got = retrieve_decode(q_slc, landmarks, lengths, topk, chunks=chunks, bounds=bounds, **options)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        there = landmarks[one, : chunks[b] if held else N]
        want = retrieve_chunks(q_slc[one], there, topk, q_start=n, **options)
        assert torch.equal(got[1][one], want[1]) and torch.equal(got[0][one], want[0])


@pytest.mark.parametrize("impl", KERNELS)
def test_decode_of_every_kernel_selects_the_same(impl):
    q_slc, landmarks = _inputs(3, 3, 100, 2)
    for lengths, span in ((int32(1600, 47, 0), 16), (int32(15, 1000, 800), 4), (int32(1600, 1601, 300), 1000)):
        options = {"chunk_size": S, "recency": integers(2), "recency_span": span, "chunks": int32(100, 99, 17)}
        got, want = (retrieve_decode(q_slc, landmarks, lengths, 5, impl=x, **options) for x in (impl, "reference"))
        assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


@pytest.mark.parametrize("two_level", (False, True))
def test_decode_gives_the_bits_of_a_prefill(two_level):
    """Scores with rounding: one-shot, a few tokens and one token at a time."""
    T, N = 48, 500
    q_slc, landmarks, start = torch.randn(2, T, 2, 64), torch.randn(2, N, 2, 64), N * S - T
    bounds = landmark_bounds(landmarks) if two_level else None
    options = {"chunk_size": S, "recency": torch.tensor([0.3, 2.0])}
    whole = retrieve_chunks(q_slc, landmarks, 16, q_start=start, **options)
    for step in (1, 3, 16):
        parts = [
            retrieve_decode(
                q_slc[:, t : t + step], landmarks, int32(start + t, start + t), 16, bounds=bounds, **options
            )
            for t in range(0, T, step)
        ]
        scores, indices = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        assert torch.equal(indices, whole[1]) and torch.equal(scores, whole[0])


def decode(**changes):
    arguments = {"q_slc": torch.zeros(2, 1, 2, 8), "landmarks": torch.zeros(2, 5, 2, 8), "lengths": int32(1, 2)}
    return retrieve_decode(**(arguments | {"topk": 2} | changes))


def chunks(**changes):
    return retrieve_chunks(
        **({"q_slc": torch.zeros(2, 9, 2, 8), "landmarks": torch.zeros(2, 5, 2, 8), "topk": 2} | changes)
    )


@pytest.mark.parametrize("function", (chunks, decode))
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"recency": torch.zeros(3)}, r"recency must have shape \[2\] to match q_slc, got shape \[3\]"),
        ({"recency": torch.zeros(2, 1)}, r"recency must have 1 dimensions, got shape \[2, 1\]"),
        ({"recency": int32(1, 2)}, r"recency must have dtype bfloat16, float16, float32 or float64, got torch.int32"),
        ({"recency": torch.zeros(2, device="meta")}, r"recency must be on cpu like the other tensors, got meta"),
        ({"recency": torch.tensor([1.0, -0.5])}, r"recency must be finite and at least 0, got \[1.0, -0.5\]"),
        ({"recency": torch.tensor([1.0, torch.nan])}, r"recency must be finite and at least 0, got \[1.0, nan\]"),
        ({"recency": torch.tensor([torch.inf, 1.0])}, r"recency must be finite and at least 0, got \[inf, 1.0\]"),
        ({"recency_span": 1}, r"recency_span must be at least 2, got 1"),
        ({"recency_span": 2**24}, r"recency_span must be less than 2\^24, got 16777216"),
    ],
)
def test_bad_input(function, changes, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        function(**changes)


@pytest.mark.parametrize("function", (chunks, decode))
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"recency": 0.5}, r"recency must be a torch.Tensor, got float"),
        ({"recency_span": 16.0}, r"recency_span must be an int, got float"),
    ],
)
def test_bad_types(function, changes, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        function(**changes)
