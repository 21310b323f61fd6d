"""The chunk memory of a cache as an HSA layer reads it for a segment of its sequences' tokens.

Shape suffixes: as in hsa_tl.model.cache.
"""

from typing import NamedTuple

import torch

from hsa_tl import retrieve_chunks
from hsa_tl.model.budget import count
from hsa_tl.model.chunk_memory import ChunkMemory
from hsa_tl.model.memory import PagedMemory
from hsa_tl.model.selected import FEW

GATHERED = 1 << 26  # elements of keys that a segment gathers at once, and as many of values


class SegmentMemory(NamedTuple):
    """The Memory that an HSA layer reads, of a segment with counts[b] tokens in row b: few tokens decode through the
    memory's pages, many share what they gather."""

    paged: PagedMemory
    counts: list[int]

    def retrieve(self, q_BTRE, start, topk: int, **options):
        B, T, R, _ = q_BTRE.shape
        if T <= FEW or any(self.paged.evicted):
            scores, indices = self.paged.retrieve(q_BTRE, start, topk, **options)
            if self.paged.budget is not None and min(self.counts) < T:  # what is no token must not count
                behind = self._behind(q_BTRE)
                scores, indices = scores.masked_fill(behind, -torch.inf), indices.masked_fill(behind, -1)
            return scores, indices
        dtype = torch.promote_types(q_BTRE.dtype, torch.float32)
        scores = torch.full((B, T, R, topk), -torch.inf, dtype=dtype, device=q_BTRE.device)
        indices = torch.full((B, T, R, topk), -1, dtype=torch.int32, device=q_BTRE.device)
        starts = [start] * B if isinstance(start, int) else start.tolist()
        for b, (first, n) in enumerate(zip(starts, self.counts, strict=True)):
            scores[b, :n], indices[b, :n] = retrieve_chunks(
                q_BTRE[b : b + 1, :n], self.paged.landmarks(b)[None], topk, chunk_size=self.paged.spec.chunk_size,
                q_start=first, **options,
            )  # fmt: skip
        return scores, indices

    def scores(self, q_BTRE, start, **options) -> torch.Tensor:
        return self.paged.scores(q_BTRE, start, **options).masked_fill_(self._behind(q_BTRE), -torch.inf)

    def _behind(self, q_BTRE) -> torch.Tensor:
        """[B, T, 1, 1]: which are no tokens."""
        behind = torch.arange(q_BTRE.shape[1]) >= torch.tensor(self.counts)[:, None]
        return behind.to(q_BTRE.device)[..., None, None]

    def attend(self, q_BTAD, weights, indices_BTHK, *, impl: str = "auto", overlap: float = 0.9) -> torch.Tensor:
        if q_BTAD.shape[1] <= FEW:
            return self.paged.attend(q_BTAD, weights, indices_BTHK, impl=impl)
        count(self.paged, weights, indices_BTHK)
        return self._gathered("attend", indices_BTHK, q_BTAD, weights, impl=impl, overlap=overlap)

    def masses(self, q_BTAD, indices_BTHK, *, impl: str = "auto") -> torch.Tensor:
        if q_BTAD.shape[1] <= FEW:
            return self.paged.masses(q_BTAD, indices_BTHK, impl=impl)
        return self._gathered("masses", indices_BTHK, q_BTAD, impl=impl)

    def _gathered(self, method: str, indices_BTHK, *rows_BT, **options) -> torch.Tensor:
        """ChunkMemory's method over the pages that are read. All sequences share them, so the batch is one row."""
        every = self.paged.pages_of(indices_BTHK), *rows_BT
        rows = (None if x is None else x.flatten(0, 1)[None] for x in every)
        return self._one_row(method, *rows, **options)[0].unflatten(0, indices_BTHK.shape[:2])

    def _one_row(self, method: str, page, *rows, **options) -> torch.Tensor:
        """page [1, T, H, K]: every page is gathered once, for so many tokens at a time as their pages allow."""
        named, at = page.unique(return_inverse=True)
        empty = int(named[0] < 0)  # -1 comes first
        spec, half = self.paged.spec, page.shape[1] // 2
        if half and (len(named) - empty) * spec.chunk_size * spec.heads * spec.head_dim > GATHERED:
            ends = slice(half), slice(half, None)
            halves = ([None if x is None else x[:, part] for x in (page, *rows)] for part in ends)
            return torch.cat([self._one_row(method, *x, **options) for x in halves], 1)
        named = named[empty:] if len(named) > empty else torch.zeros_like(named)  # some page: none of it is read
        k, v = (x.flatten(0, 1)[None] for x in self.paged.gather(named))
        chunks = ChunkMemory(k, v, k.new_empty(1, len(named), 0, 0))
        return getattr(chunks, method)(*rows, (at - empty).int(), **options)
