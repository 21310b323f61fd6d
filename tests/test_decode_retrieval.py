"""retrieve_decode: what retrieve_chunks selects, sequence by sequence; bounds change nothing."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from strategies import largest_allocation, seeds

from hsa_tl import decode_retrieval, landmark_bounds, retrieve_chunks, retrieve_decode
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.impl import triton_retrieval
from hsa_tl.oracle import retrieve_oracle

S = 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(B, T, R, D_r, N, seed, integers=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    q, landmarks = torch.randn(B, T, R, D_r, generator=g), torch.randn(B, N, R, D_r, generator=g)
    if integers:  # many exact ties
        q, landmarks = q.round(), landmarks.round()
    return q.to(dtype), landmarks.to(dtype)


def by_sequence(q, landmarks, lengths, topk, function=retrieve_chunks, **options):
    parts = [
        function(q[b : b + 1], landmarks[b : b + 1], topk, chunk_size=S, q_start=n, **options)
        for b, n in enumerate(lengths.tolist())
    ]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


@hypothesis.given(
    B=st.integers(1, 3), T=st.integers(1, 3), R=st.integers(1, 2), D_r=st.sampled_from((1, 8, 20)),
    N=st.integers(1, 200), topk=st.integers(1, 70), window=st.sampled_from((0, 1, S, 50)), integers=st.booleans(),
    two_level=st.booleans(), seed=seeds, data=st.data(),
)  # fmt: skip
def test_selects_what_retrieve_chunks_selects(B, T, R, D_r, N, topk, window, integers, two_level, seed, data):
    q, landmarks = make(B, T, R, D_r, N, seed, integers)
    near = st.integers(0, N * S + S) | st.sampled_from(
        (0, S - 1, S, 2 * S - 1, *(max(0, window + i) for i in (-2, 0, S)))
    )
    lengths = int32(*(data.draw(near) for _ in range(B)))
    bounds = landmark_bounds(landmarks) if two_level else None
    scores, indices = retrieve_decode(q, landmarks, lengths, topk, chunk_size=S, exclude_window=window, bounds=bounds)
    want = by_sequence(q, landmarks, lengths, topk, exclude_window=window)
    assert torch.equal(indices, want[1]) and indices.dtype == torch.int32
    wanted = expect(
        lambda q, m: by_sequence(q, m, lengths, topk, retrieve_oracle, exclude_window=window)[0], q, landmarks
    )
    assert_accurate("scores", scores, wanted)


@pytest.mark.parametrize("two_level", (False, True))
def test_a_token_does_not_depend_on_its_company(two_level):
    """One-shot, a few tokens and one token at a time: the same bits."""
    B, T, R, N, topk = 2, 48, 2, 500, 16
    q, landmarks = make(B, T, R, 64, N, 0)
    bounds = landmark_bounds(landmarks) if two_level else None
    start = N * S - T
    whole = retrieve_chunks(q, landmarks, topk, chunk_size=S, q_start=start)
    for step in (1, 3, 16):
        parts = [
            retrieve_decode(
                q[:, t : t + step], landmarks, int32(start + t, start + t), topk, chunk_size=S, bounds=bounds
            )
            for t in range(0, T, step)
        ]
        scores, indices = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        assert torch.equal(indices, whole[1])
        assert torch.equal(scores, whole[0])


@pytest.mark.parametrize("N", (0, 1, 63, 64, 65, 200))
def test_bounds_hold_their_landmarks(N):
    _, landmarks = make(2, 1, 2, 5, N, 9)
    bounds = landmark_bounds(landmarks)
    assert bounds.shape == (2, -(-N // 64), 2, 2, 5)
    for i, block in enumerate(landmarks.split(64, 1) if N else ()):
        assert torch.equal(bounds[:, i, 0], block.amin(1)) and torch.equal(bounds[:, i, 1], block.amax(1))


def test_chunks_that_a_sequence_does_not_hold_are_hidden():
    q, landmarks = make(3, 2, 2, 8, 40, 1)
    held = int32(0, 7, 40)
    for b, n in enumerate(held.tolist()):
        landmarks[b, n:] = torch.nan
    for bounds in (None, landmark_bounds(landmarks.nan_to_num(nan=0.0))):
        scores, indices = retrieve_decode(q, landmarks, int32(*[1000] * 3), 8, chunk_size=S, chunks=held, bounds=bounds)
        assert (indices < held.view(3, 1, 1, 1)).all() and not scores.isnan().any()
        assert (indices[0] == -1).all() and ((indices[1] >= 0).sum(-1) == 7).all() and (indices[2] >= 0).all()


def test_alike_neighbours_leave_most_blocks_unread(monkeypatch):
    read = []
    score_blocks = decode_retrieval._score_blocks
    monkeypatch.setattr(decode_retrieval, "_score_blocks", lambda *x: read.append(x[2].numel()) or score_blocks(*x))
    q, means = make(1, 1, 1, 32, 256, 2)
    landmarks = means.repeat_interleave(64, 1) + 0.01 * torch.randn(1, 256 * 64, 1, 32)
    found = retrieve_decode(q, landmarks, int32(1 << 30), 16, chunk_size=S, bounds=landmark_bounds(landmarks))
    assert 0 < sum(read) < 10
    assert torch.equal(found[1], retrieve_decode(q, landmarks, int32(1 << 30), 16, chunk_size=S)[1])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_types(dtype):
    q, landmarks = make(2, 2, 2, 16, 3000, 3, dtype=dtype)
    lengths = int32(3000 * S, 500)
    got = retrieve_decode(q, landmarks, lengths, 12, chunk_size=S)
    want = by_sequence(q, landmarks, lengths, 12)
    assert got[0].dtype == want[0].dtype and torch.equal(got[1], want[1])
    two_level = retrieve_decode(q, landmarks, lengths, 12, chunk_size=S, bounds=landmark_bounds(landmarks))
    assert torch.equal(two_level[1], want[1])


def test_landmarks_converted_by_parts_give_the_same_bits(monkeypatch):
    """16-bit ones of a sequence whose bounds spare nothing."""
    q, landmarks = make(1, 2, 1, 16, 3000, 3, dtype=torch.bfloat16)
    arguments = q, landmarks, int32(3000 * S), 12
    want = retrieve_decode(*arguments, chunk_size=S)
    monkeypatch.setattr(decode_retrieval, "_CONVERTED", 1 << 12)
    for bounds in (None, landmark_bounds(landmarks)):
        got = retrieve_decode(*arguments, chunk_size=S, bounds=bounds)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_scan_copies_no_landmarks(dtype):
    """Of 16-bit ones it converts a block at a time."""
    q, landmarks = make(1, 1, 1, 128, 1 << 17, 4, dtype=dtype)
    assert largest_allocation(retrieve_decode, q, landmarks, int32(1 << 30), 16) < landmarks.nbytes // 2


def test_16m_tokens():
    """262144 chunks; both levels agree."""
    q, landmarks = make(1, 1, 2, 16, 1 << 18, 5)
    lengths = int32((1 << 24) + 5)
    scores, indices = retrieve_decode(q, landmarks, lengths, 64)
    two_level = retrieve_decode(q, landmarks, lengths, 64, bounds=landmark_bounds(landmarks))
    assert torch.equal(indices, two_level[1]) and torch.equal(scores, two_level[0])
    every = torch.einsum("bnrd,btrd->btrn", landmarks.double(), q.double()) / 4
    least = scores.double().amin(-1, keepdim=True)
    assert ((every > least + 1e-5).sum(-1) < 64).all() and (indices.diff(dim=-1) > 0).all()


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    q, landmarks = make(2, 1, 2, 8, 40, 6)
    step = lambda *x: retrieve_decode(*x, 4, chunk_size=S)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (int32(600, 40), int32(601, 41)):
        want = step(q, landmarks, lengths)
        for a, b in zip(compiled(q, landmarks, lengths), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"q_slc": torch.zeros(2, 2, 8)}, r"q_slc must have 4 dimensions, got shape \[2, 2, 8\]"),
        (
            dict.fromkeys(("q_slc", "landmarks"), torch.zeros(2, 5, 2, 8, dtype=torch.int32)),
            r"q_slc must have dtype bfloat16, float16, float32 or float64, got torch.int32",
        ),
        ({"lengths": int32(1)}, r"lengths must have shape \[2\] to match q_slc, got shape \[1\]"),
        ({"lengths": int32(1, 2).long()}, r"lengths must have dtype int32"),
        ({"chunks": int32(1, 2, 3)}, r"chunks must have shape \[2\]"),
        ({"landmarks": torch.zeros(2, 5, 3, 8)}, r"landmarks must have shape \[2, N, 2, 8\]"),
        ({"bounds": torch.zeros(2, 0, 2, 2, 8)}, r"bounds must have 1 blocks"),
        ({"bounds": torch.zeros(2, 1, 2, 2, 4)}, r"bounds must have shape"),
        ({"topk": 0}, r"topk must be at least 1"),
        ({"exclude_window": -1}, r"exclude_window must be at least 0"),
        ({"chunk_size": 20}, r"chunk_size must be"),
    ],
)
def test_bad_input(changes, words):
    arguments = {"q_slc": torch.zeros(2, 1, 2, 8), "landmarks": torch.zeros(2, 5, 2, 8), "lengths": int32(1, 2)}
    with pytest.raises(ValueError, match=words):
        retrieve_decode(**(arguments | {"topk": 2} | changes))


@hypothesis.given(
    B=st.integers(1, 3), T=st.integers(1, 6), R=st.integers(1, 2), N=st.integers(1, 200),
    topk=st.sampled_from((5, 16, 33)), window=st.sampled_from((0, 1, S, 50)), seed=seeds, data=st.data(),
)  # fmt: skip
@pytest.mark.parametrize("impl", ("tilelang", "triton"))
def test_programs_select_the_same(impl, B, T, R, N, topk, window, seed, data):
    """Integers, so that every score is exact and many are equal; some sequences hold fewer chunks than there are."""
    q, landmarks = make(B, T, R, 16, N, seed, integers=True)
    held = int32(*(data.draw(st.integers(0, N)) for _ in range(B)))
    lengths = int32(*(data.draw(st.integers(0, N * S + S)) for _ in range(B)))
    options = {"chunk_size": S, "exclude_window": window, "chunks": held}
    got = retrieve_decode(q, landmarks, lengths, topk, impl=impl, **options)
    want = retrieve_decode(q, landmarks, lengths, topk, **options)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


@pytest.mark.parametrize("impl", ("tilelang", "triton"))
def test_programs_keep_special_values_in_order(impl, monkeypatch):
    """-0 equals 0, NaN and inf come first, -inf is a score like another; what is not held does not matter."""
    q = torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1.0
    landmarks = torch.zeros(1, 300, 1, 16)
    landmarks[0, :, 0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf]).repeat(50)
    landmarks[0, 7, 0, 0] = torch.nan
    landmarks[0, 290:] = torch.nan
    monkeypatch.setattr(triton_retrieval, "SPLIT_CHUNKS", 60)  # shares of 75
    for topk in (1, 40, 128):
        options = {"chunk_size": S, "chunks": int32(290)}
        got, want = (retrieve_decode(q, landmarks, int32(1 << 20), topk, impl=x, **options) for x in (impl, "auto"))
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "impl, words", (("triton", "topk must be at most 128"), ("tilelang", "topk must be at most 128"))
)
def test_an_implementation_that_cannot_says_why(impl, words):
    q, landmarks = make(1, 1, 1, 16, 300, 0)
    with pytest.raises(NotImplementedError, match=words):
        retrieve_decode(q, landmarks, int32(1000), 129, impl=impl)


@pytest.mark.parametrize("impl", ("tilelang", "triton"))
def test_programs_have_no_bounds(impl):
    q, landmarks = make(1, 1, 1, 16, 300, 0)
    with pytest.raises(NotImplementedError, match="cannot retrieve by bounds"):
        retrieve_decode(q, landmarks, int32(1000), 4, bounds=landmark_bounds(landmarks), impl=impl)
