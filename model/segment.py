"""A segment's view of the chunk memory: few tokens decode through its pages, many share what they gather.

Shape suffixes: B batch, T tokens, A query heads, H key/value heads, D head dim, R retrieval heads, K selected chunks.
"""

from typing import NamedTuple

import torch

from hsa_tl import hsa_attention, retrieve_chunks
from hsa_tl.model.memory import PagedMemory

FEW = 8  # tokens of a sequence that decode as one; more are a segment
GATHERED = 1 << 26  # elements of keys that a segment gathers at once, and as many of values


class SegmentMemory(NamedTuple):
    """The Memory that an HSA layer reads: row b asks for at most counts[b] tokens."""

    paged: PagedMemory
    counts: list[int]

    def retrieve(self, q_BTRE, start, topk: int, *, exclude_window: int = 0, impl: str = "auto"):
        B, T, R, _ = q_BTRE.shape
        if T <= FEW:
            return self.paged.retrieve(q_BTRE, start, topk, exclude_window=exclude_window, impl=impl)
        dtype = torch.promote_types(q_BTRE.dtype, torch.float32)
        scores = torch.full((B, T, R, topk), -torch.inf, dtype=dtype, device=q_BTRE.device)
        indices = torch.full((B, T, R, topk), -1, dtype=torch.int32, device=q_BTRE.device)
        starts = [start] * B if isinstance(start, int) else start.tolist()
        for b, (first, n) in enumerate(zip(starts, self.counts, strict=True)):
            scores[b, :n], indices[b, :n] = retrieve_chunks(
                q_BTRE[b : b + 1, :n], self.paged.landmarks(b)[None], topk, chunk_size=self.paged.spec.chunk_size,
                q_start=first, exclude_window=exclude_window, impl=impl,
            )  # fmt: skip
        return scores, indices

    def scores(self, q_BTRE, start, *, exclude_window: int = 0) -> torch.Tensor:
        scores, T = self.paged.scores(q_BTRE, start, exclude_window=exclude_window), q_BTRE.shape[1]
        behind = torch.arange(T) >= torch.tensor(self.counts)[:, None]
        return scores.masked_fill_(behind.to(scores.device)[..., None, None], -torch.inf)

    def attend(
        self, q_BTAD, weights, indices_BTHK, *, impl: str = "auto", overlap: float = 0.9
    ) -> torch.Tensor:  # fmt: skip
        if q_BTAD.shape[1] <= FEW:
            return self.paged.attend(q_BTAD, weights, indices_BTHK, impl=impl)
        page = self.paged.pages_of(indices_BTHK)
        # The pool is common to all sequences: to the operator, the batch is one long row of tokens.
        rows = (x.flatten(0, 1)[None] for x in (q_BTAD, weights, page))
        return self._attend(*rows, impl, {"overlap": overlap}).view_as(q_BTAD)

    def _attend(self, q, weights, page, impl, config):
        """q [1, T, A, D], weights [1, T, H or A, K], page [1, T, H, K]: every page is gathered once."""
        named, at = page.unique(return_inverse=True)
        empty = int(named[0] < 0)  # -1 comes first
        spec, half = self.paged.spec, q.shape[1] // 2
        if half and (len(named) - empty) * spec.chunk_size * spec.heads * spec.head_dim > GATHERED:
            halves = zip(*(x.split([half, x.shape[1] - half], 1) for x in (q, weights, page)), strict=True)
            return torch.cat([self._attend(*x, impl, config) for x in halves], 1)
        if len(named) == empty:
            return torch.zeros_like(q)
        k, v = (x.flatten(0, 1)[None] for x in self.paged.gather(named[empty:]))
        indices = (at - empty).int()
        return hsa_attention(q, k, v, weights, indices, chunk_size=spec.chunk_size, impl=impl, config=config)
