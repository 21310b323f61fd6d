"""The inverted index: (token, slot) pairs sorted by chunk, for chunk-stationary programs: no (T, N) mask."""

from typing import NamedTuple

import torch


class Pairs(NamedTuple):
    """Pairs of a selection `indices` [B, T, H, K], grouped by (batch, head, chunk).

    pair [B * T * H * K] int32: t * K + slot, sorted by (b, h, chunk), stable in (t, slot); empty slots stand last.
    offsets [B * H * N + 1] int64: those of (b, h, c) are pair[offsets[i] : offsets[i + 1]], i = (b * H + h) * N + c.
    """

    pair: torch.Tensor
    offsets: torch.Tensor


def sort_pairs(indices: torch.Tensor, num_chunks: int) -> Pairs:
    """Stable sort of every slot by (b, h, chunk); an index outside [0, num_chunks) counts as an empty slot."""
    B, T, H, K = indices.shape
    segments = B * H * num_chunks
    by_head = indices.permute(0, 2, 1, 3).reshape(B * H, T * K).long()
    first = torch.arange(B * H, device=indices.device)[:, None] * num_chunks
    valid = (by_head >= 0) & (by_head < num_chunks)
    key = torch.where(valid, by_head + first, segments).flatten()
    if segments < 2**31:
        key = key.int()
    order = torch.sort(key, stable=True).indices
    counts = torch.zeros(segments + 1, dtype=torch.int64, device=indices.device)
    counts.index_add_(0, key, torch.ones_like(key, dtype=torch.int64))
    offsets = torch.zeros_like(counts)
    torch.cumsum(counts[:segments], 0, out=offsets[1:])
    return Pairs((order % max(1, T * K)).int(), offsets)


def check_range(indices: torch.Tensor, limit: torch.Tensor | int, name: str = "indices") -> None:
    """Raises ValueError if an index is outside [-1, limit); limit is a number or broadcasts against indices."""
    bad = (indices < -1) | (indices >= limit)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        bound = limit if isinstance(limit, int) else int(limit.expand_as(indices)[tuple(where)])
        value = int(indices[tuple(where)])
        raise ValueError(f"{name} must lie in [-1, {bound}), the chunks there are, got {value} at {where}")
