"""build_pairs against a plain loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from hsa_tl import build_pairs


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


@pytest.mark.parametrize("value", (4, -2, 2**31 - 1, -(2**31)))
def test_out_of_range(value):
    indices = torch.zeros(1, 3, 2, 2, dtype=torch.int32)
    indices[0, 2, 1, 0] = value
    with pytest.raises(ValueError, match=rf"indices must lie in \[-1, 4\).*got {value} at \[0, 2, 1, 0\]"):
        build_pairs(indices, 4)
