"""The pair index: every way to sort it against a plain loop, and the windows of tokens over it."""

import itertools
from dataclasses import replace
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from hsa_tl import build_pairs, cases, pairs, selection_overlap
from hsa_tl.impl import tilelang
from hsa_tl.pairs import partial_window, sort_pairs, windows
from hsa_tl.testing import make_selection


def plain_pairs(indices: torch.Tensor, num_chunks: int) -> tuple[list[int], list[int]]:
    """The pairs of (b, h, c) in order of (t, slot), and where each group ends."""
    B, T, H, K = indices.shape
    pair, offsets = [], [0]
    for b in range(B):
        for h in range(H):
            for c in range(num_chunks):
                pair += [t * K + i for t in range(T) for i in range(K) if indices[b, t, h, i] == c]
                offsets.append(len(pair))
    return pair, offsets


@given(
    st.tuples(st.integers(1, 2), st.integers(0, 9), st.integers(1, 3), st.integers(1, 5)),
    st.integers(0, 5),
    st.booleans(),
    seeds,
)
def test_equals_a_plain_loop(shape, num_chunks, strided, seed):
    indices = torch.randint(-1, num_chunks, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    if strided:
        indices = indices.transpose(1, 3).contiguous().transpose(1, 3)
    pair, offsets = build_pairs(indices, num_chunks)
    expected_pair, expected_offsets = plain_pairs(indices, num_chunks)
    assert pair.shape == (indices.numel(),) and pair.dtype == torch.int32
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == expected_offsets
    assert pair[: offsets[-1]].tolist() == expected_pair
    # Every slot stands once: the empty ones come after the last offset.
    empty = [(indices[b, :, h].flatten() < 0).nonzero().flatten() for b in range(shape[0]) for h in range(shape[2])]
    assert pair[offsets[-1] :].tolist() == torch.cat(empty).tolist()


def test_distinct():
    indices = torch.tensor([[[[3, 1, -1, 3, 7, -2, 1]], [[0, 2, 4, 5, -1, -1, -1]]]], dtype=torch.int32)
    once = pairs.distinct(indices, 5)
    assert once.dtype == torch.int32
    assert once.flatten(0, 2).tolist() == [[1, -1, 3, -1, -1, -1, -1], [0, 2, 4, -1, -1, -1, -1]]


@pytest.mark.parametrize("value", (4, -2, 2**31 - 1, -(2**31)))
def test_out_of_range(value):
    indices = torch.zeros(1, 3, 2, 2, dtype=torch.int32)
    indices[0, 2, 1, 0] = value
    with pytest.raises(ValueError, match=rf"indices must lie in \[-1, 4\).*got {value} at \[0, 2, 1, 0\]"):
        build_pairs(indices, 4)


def make_indices(shape, num_chunks: int, seed: int) -> torch.Tensor:
    """Any of [-2, num_chunks + 2): empty slots, duplicates, and what counts as empty without validation."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, num_chunks + 2, shape, generator=g, dtype=torch.int32)


def assert_same(actual, expected) -> None:
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("sort", (sort_pairs, tilelang.sort_pairs), ids=("torch", "tilelang"))
def test_every_sort_equals_a_plain_loop(sort):
    """Stable in (t, slot), out of range is empty; few K, since TileLang compiles for each."""

    @hypothesis.settings(max_examples=20)
    @given(
        st.tuples(st.integers(1, 2), st.integers(0, 40), st.integers(1, 3), st.sampled_from((2, 5))),
        st.integers(0, 5),
        seeds,
    )
    def holds(shape, num_chunks, seed):
        indices = make_indices(shape, num_chunks, seed)
        with mock.patch.object(tilelang, "SORT_TOKENS", 2):  # several blocks
            pair, offsets = sort(indices, num_chunks)
        expected_pair, expected_offsets = plain_pairs(indices, num_chunks)
        assert (pair.dtype, offsets.dtype) == (torch.int32, torch.int64)
        assert offsets.tolist() == expected_offsets and pair[: offsets[-1]].tolist() == expected_pair
        # The empty slots stand last, by (b, h), and are as stable.
        empty = ((indices < 0) | (indices >= num_chunks)).transpose(1, 2).flatten(2).nonzero()[:, 2]
        assert pair[offsets[-1] :].tolist() == empty.tolist()

    holds()


@pytest.mark.parametrize("num_chunks", (3, 200))
def test_a_block_of_the_counting_sort_walks_many_tokens(num_chunks):
    """Few chunks: a block of many tokens. Many chunks: few blocks, or their counts would outgrow the pairs."""
    indices = make_indices((1, 700, 2, 5), num_chunks, seed=0)
    assert_same(tilelang.sort_pairs(indices, num_chunks), sort_pairs(indices, num_chunks))


@pytest.mark.parametrize("num_chunks", (2**15 - 1, 2**15))
def test_the_width_of_the_key_changes_nothing(num_chunks):
    """The last chunk, and the key of empty slots behind it, at the largest 16-bit key and one past it."""
    indices = torch.tensor([num_chunks - 1, -1, 0, num_chunks, num_chunks - 1]).int().view(1, 5, 1, 1)
    pair, offsets = sort_pairs(indices, num_chunks)
    assert pair.tolist() == [2, 0, 4, 1, 3]
    assert offsets[:2].tolist() == [0, 1] and offsets[-2:].tolist() == [1, 3] and len(offsets) == num_chunks + 1


@given(
    st.tuples(st.integers(1, 2), st.integers(0, 20), st.integers(1, 3), st.integers(1, 5)),
    st.integers(0, 5),
    st.integers(1, 25),
    seeds,
)
def test_windows_partition_the_pairs_by_token(shape, num_chunks, tokens, seed):
    indices = make_indices(shape, num_chunks, seed)
    index = sort_pairs(indices, num_chunks)
    begin, stop = index.offsets[:-1], 0
    for window in windows(indices, num_chunks, index, tokens):
        assert window.start == stop and 0 < window.stop - window.start <= tokens
        assert window.begin.dtype == window.end.dtype == torch.int64
        assert torch.equal(window.begin, begin)
        for i in range(len(begin)):
            t = index.pair[index.offsets[i] : index.offsets[i + 1]] // shape[3]
            inside = index.offsets[i] + ((t >= window.start) & (t < window.stop)).nonzero().flatten()
            assert list(range(window.begin[i], window.end[i])) == inside.tolist()
        begin, stop = window.end, window.stop
    assert stop == shape[1]
    assert not stop or torch.equal(begin, index.offsets[1:])


@given(st.integers(1, 2), st.integers(0, 2000), st.integers(1, 3), st.integers(1, 2**24))
def test_a_partial_window_fits(B, T, H, limit):
    problem = replace(cases.at_length(cases.case("paper-d64").problem, T), B=B, H=H, HQ=16 * H, K=7)
    tokens = partial_window(problem, limit)
    row = problem.G * problem.D * problem.itemsize

    def fits(tokens):
        return B * H * tokens * problem.K * row <= limit

    assert 1 <= tokens <= max(1, T) and (tokens == 1 or fits(tokens))
    if tokens < T:  # whole chunks, as many as fit; less than one only where one does not
        assert not fits(tokens + (1 if tokens < problem.S else problem.S))
        assert tokens < problem.S or tokens % problem.S == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape, num_chunks", [((1, 4096, 1, 64), 64), ((2, 777, 3, 5), 13), ((1, 333, 2, 100), 9)])
def test_the_counting_sort_equals_the_torch_sort_on_a_gpu(shape, num_chunks):
    indices = make_indices(shape, num_chunks, seed=0)
    actual = tilelang.sort_pairs(indices.cuda(), num_chunks)
    assert_same((x.cpu() for x in actual), sort_pairs(indices, num_chunks))
    valid = indices.clamp(-1, num_chunks - 1)
    index = build_pairs(valid.cuda(), num_chunks)
    expected = windows(valid, num_chunks, sort_pairs(valid, num_chunks), 100)
    for window, other in zip(windows(valid.cuda(), num_chunks, index, 100), expected, strict=True):
        assert_same((window.begin.cpu(), window.end.cpu()), (other.begin, other.end))


@pytest.mark.parametrize("asked", (0.5, 0.9))
def test_random_selections_overlap_as_asked(asked):
    """But for a fresh chunk that is the predecessor's by chance."""
    made = selection_overlap(make_selection(1, 3200, 1, 8, 16, kind="overlap", overlap=asked))
    assert asked - 0.02 < made < asked + 0.1


@pytest.mark.parametrize("compared", (1, 500, pairs.COMPARED))
def test_selection_overlap_counts_chosen_chunks(monkeypatch, compared):
    """Of both heads and sequences, slot by slot; empty slots do not count, nor does the first token."""
    monkeypatch.setattr(pairs, "COMPARED", compared)
    indices = torch.randint(-1, 6, (2, 40, 2, 4), dtype=torch.int32)
    shared = chosen = 0
    for b, t, h in itertools.product(range(2), range(1, 40), range(2)):
        now, before = (indices[b, i, h].tolist() for i in (t, t - 1))
        shared += sum(c >= 0 and c in before for c in now)
        chosen += sum(c >= 0 for c in now)
    assert selection_overlap(indices) == shared / chosen
    assert selection_overlap(indices[:, :1]) == 0 and selection_overlap(torch.full_like(indices, -1)) == 0
    assert selection_overlap(torch.arange(4).int().expand(2, 40, 2, 4)) == 1
    with pytest.raises(ValueError, match="indices must have dtype int32"):
        selection_overlap(indices.long())
