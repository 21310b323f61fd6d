"""The inverted index: (token, slot) pairs sorted by chunk, for chunk-stationary programs: no (T, N) mask."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hsa_tl.problem import Problem
from hsa_tl.validation import require_tensor

COMPARED = 1 << 26  # slots with slots at once, by selection_overlap


class Pairs(NamedTuple):
    """The pairs of a selection `indices` [B, T, H, K], grouped by (batch, head, chunk); what `build_pairs` returns.

    The pairs of (b, h, c) are pair[offsets[i] : offsets[i + 1]] with i = (b * H + h) * N + c.

    Args:
        pair (Tensor [B * T * H * K], int32): t * K + slot, sorted by (b, h, chunk) and stable in (t, slot); empty slots
            stand last, behind offsets[-1].
        offsets (Tensor [B * H * N + 1], int64): where the pairs of each (b, h, c) begin.
    """

    pair: torch.Tensor
    offsets: torch.Tensor


def sort_pairs(indices: torch.Tensor, num_chunks: int) -> Pairs:
    """Stable sort of every slot by (b, h, chunk); an index outside [0, num_chunks) counts as an empty slot."""
    B, T, H, K = indices.shape
    segments = B * H * num_chunks
    # A radix sort, whose time goes with the width of its keys.
    dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if segments <= torch.iinfo(d).max)
    key, order = torch.sort(_segment(indices, num_chunks).transpose(1, 2).flatten().to(dtype), stable=True)
    offsets = torch.searchsorted(key, torch.arange(segments + 1, dtype=dtype, device=key.device))
    if B * H > 1:
        order %= max(1, T * K)
    return Pairs(order.int(), offsets)


def distinct(indices: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Each row's chunks once, ascending; other slots are empty, also those of an index outside [0, num_chunks)."""
    chosen = torch.where((indices >= 0) & (indices < num_chunks), indices, num_chunks).sort(-1).values
    repeated = torch.nn.functional.pad(chosen[..., 1:] == chosen[..., :-1], (1, 0))
    return chosen.masked_fill_(repeated | (chosen == num_chunks), -1)


def selection_overlap(indices: torch.Tensor) -> float:
    """The share of a token's chunks that its predecessor chose too: how much neighbours' selections are alike.

    It tells how often a tile of neighbouring tokens reads a chunk, hence which program is fast, see `hsa_attention`'s
    config={"overlap": x}. Read on the host.

    Args:
        indices (Tensor [B, T, H, K], int32): chosen chunks; -1 is an empty slot and does not count.

    Returns:
        float: from 0 to 1, over all tokens but each sequence's first; 0 if these chose none.

    Raises:
        ValueError, TypeError: indices of another dtype or shape.

    Example:
        >>> selection_overlap(torch.tensor([[[[0, 1]], [[1, 2]], [[1, 2]]]], dtype=torch.int32))
        0.75
    """
    require_tensor("indices", indices, 4, dtype=torch.int32)
    shared = chosen = 0
    block = max(1, COMPARED // max(1, indices[:, :1].numel() * indices.shape[3]))  # tokens
    for start in range(1, indices.shape[1], block):
        now = indices[:, start : start + block]
        before = indices[:, start - 1 : start - 1 + now.shape[1]]
        valid = now >= 0
        shared += int(((now[..., :, None] == before[..., None, :]).any(-1) & valid).sum())
        chosen += int(valid.sum())
    return shared / max(1, chosen)


def _segment(indices: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """[B, T, H, K]: the (b, h, chunk) of each slot as its place in `offsets`, B * H * N for an empty slot."""
    (B, _, H, _), N = indices.shape, num_chunks
    dtype = torch.int32 if B * H * N < 2**31 else torch.int64
    first = torch.arange(B * H, dtype=dtype, device=indices.device).view(B, 1, H, 1) * N
    return torch.where((indices >= 0) & (indices < N), indices + first, B * H * N)


class Window(NamedTuple):
    """Tokens [start, stop) and, for each (b, h, chunk), where its pairs of them stand: pair[begin : end]."""

    start: int
    stop: int
    pair: torch.Tensor  # as in Pairs
    begin: torch.Tensor  # [B * H * N] int64
    end: torch.Tensor  # [B * H * N] int64


def windows(indices: torch.Tensor, num_chunks: int, pairs: Pairs, tokens_per_window: int) -> Iterator[Window]:
    """The pairs of `indices` [B, T, H, K] by consecutive windows of tokens. Exact integers, no host synchronisation.

    A chunk's pairs ascend in t, so its pairs of a window follow those of the window before: counting the window's
    slots by chunk gives their end. A window takes O(tokens_per_window * H * K + N) work and memory.
    """
    T = indices.shape[1]
    begin, last = pairs.offsets[:-1], pairs.offsets[1:]
    for start in range(0, T, tokens_per_window):
        stop = min(T, start + tokens_per_window)
        if stop == T:
            end = last
        else:
            key = _segment(indices[:, start:stop], num_chunks).flatten()
            end = torch.cat([begin, begin.new_zeros(1)]).index_add_(0, key, begin.new_ones(1).expand(len(key)))[:-1]
        yield Window(start, stop, pairs.pair, begin, end)
        begin = end


def partial_window(problem: Problem, limit_bytes: int) -> int:
    """Tokens whose partial rows [B, H, tokens * K, G, D] fit in limit_bytes: whole chunks if one fits, at least 1."""
    p = problem
    tokens = max(1, limit_bytes // (p.B * p.HQ * p.K * p.D * p.itemsize))
    if tokens >= p.T:
        return max(1, p.T)
    return tokens // p.S * p.S or tokens


def within(x: torch.Tensor, least: int, limit: int) -> bool:
    """Whether all of x lies in [least, limit); read on the host."""
    low, high = x.aminmax() if x.numel() else (least, limit - 1)
    return int(low) >= least and int(high) < limit


def check_range(indices: torch.Tensor, limit: torch.Tensor | int) -> None:
    """Raises ValueError if an index is outside [-1, limit); limit is a number or broadcasts against indices."""
    if isinstance(limit, int) and within(indices, -1, limit):  # in one pass
        return
    bad = (indices < -1) | (indices >= limit)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        bound = limit if isinstance(limit, int) else int(limit.expand_as(indices)[tuple(where)])
        value = int(indices[tuple(where)])
        raise ValueError(f"indices must lie in [-1, {bound}), the chunks there are, got {value} at {where}")


def check_pages(indices: torch.Tensor, page_table: torch.Tensor, num_pages: int) -> None:
    """Raises ValueError if an index [B, T, H, K] is outside [-1, max_chunks) of page_table [B, max_chunks], or if the
    page of a chosen chunk is outside [0, num_pages)."""
    check_range(indices, page_table.shape[1])
    page = page_table.gather(1, indices.flatten(1).clamp(min=0).long()).view(indices.shape)
    if within(page, 0, num_pages):
        return
    bad = (indices >= 0) & ((page < 0) | (page >= num_pages))
    if bad.any():
        where = bad.nonzero()[0].tolist()
        at = [where[0], int(indices[tuple(where)])]
        value = int(page[tuple(where)])
        raise ValueError(f"page_table must lie in [0, {num_pages}) for the chosen chunks, got {value} at {at}")
