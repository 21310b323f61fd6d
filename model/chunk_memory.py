"""The chunks that an HSA layer reads: keys, values and landmarks; in training, those of other sequences too, and in a
cache those of a PagedMemory.

Shape suffixes: as in hsa_tl.model.hsa.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch

from hsa_tl import hsa_attention, retrieve_chunks, selected_attention
from hsa_tl.model.attention import positions
from hsa_tl.model.budget import count
from hsa_tl.validation import require

FEW = 8  # tokens of a sequence that decode as one; more are a segment
GATHERED = 1 << 26  # elements of keys that a segment gathers at once, and as many of values


class Memory(Protocol):
    """What an HSA layer reads: a ChunkMemory in training, a PagedMemory in inference."""

    def retrieve(self, q_slc, start, topk: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
        """scores, indices [B, T, R, topk]; start: position of the first query, int or int32 [B]; options of
        `hsa_tl.retrieve_chunks`: exclude_window, recency, recency_span, impl."""

    def scores(self, q_slc, start, **options) -> torch.Tensor:
        """[B, T, R, N] of every chunk, -inf where a token does not see it: what top-k "all" has instead. Options as
        those of `retrieve`, without impl."""

    def attend(self, q, weights, indices, *, impl: str = "auto", overlap: float = 0.9) -> torch.Tensor:
        """out [B, T, A, D]; weights None: one softmax over the keys of all chosen chunks. overlap: of neighbouring
        tokens' selections, by which programs are chosen."""

    def masses(self, q, indices, *, impl: str = "auto") -> torch.Tensor:
        """[B, T, A, K]: of each chosen chunk the log-sum-exp of its own keys' scaled scores; -inf for an empty slot.
        Differentiable where `attend` is."""


def visible(position: torch.Tensor, chunks: int, chunk_size: int, exclude_window: int = 0) -> torch.Tensor:
    """bool [.., chunks]: which chunks the tokens at these positions see, as `hsa_tl.retrieve_chunks` has it."""
    first, position = torch.arange(chunks, device=position.device) * chunk_size, position[..., None]
    return (first + chunk_size <= position) & (first <= position - exclude_window)


def recency_share(between: torch.Tensor, span: int, dtype: torch.dtype) -> torch.Tensor:
    """Of recency, what a chunk loses with so many between it and the token's own, see `hsa_tl.retrieve_chunks`."""
    return (between.clamp(min=0).to(dtype).log1p() / math.log(span)).clamp(max=1)


def chunk_scores(
    q_slc, landmarks, start, chunk_size: int, *, exclude_window: int = 0, recency=None, recency_span: int = 16,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """`Memory.scores` of these landmarks [B, N, R, E]; no autocast."""
    scale = q_slc.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q_slc.dtype, torch.float32)
    with torch.autocast(q_slc.device.type, enabled=False):
        scores = torch.einsum("btre,bnre->btrn", q_slc.to(dtype), landmarks.to(dtype)).mul_(scale)
    position = positions(start, q_slc)
    if recency is not None:
        between = position[..., None] // chunk_size - 1 - torch.arange(landmarks.shape[1], device=q_slc.device)
        scores = scores - recency.to(dtype)[:, None] * recency_share(between, recency_span, dtype)[..., None, :]
    seen = visible(position, landmarks.shape[1], chunk_size, exclude_window)
    return scores.masked_fill_(~seen[..., None, :], -torch.inf)


def with_rolled(x: torch.Tensor, sequences: int) -> torch.Tensor:
    """x [B, n, ..] of so many other sequences of the batch before each one's own: [B, (sequences + 1) * n, ..]."""
    return torch.cat([x.roll(i, 0) for i in range(sequences, -1, -1)], 1)


def in_one_row(read: Callable, *rows: torch.Tensor | None, **options) -> torch.Tensor:
    """read(*rows, **options) of rows [B, T, ..] with the whole batch as one sequence [1, B * T, ..]. None stays."""
    flat = (None if x is None else x.flatten(0, 1)[None] for x in rows)
    return read(*flat, **options).unflatten(1, rows[0].shape[:2])[0]


def of_slots(lse: Callable, q, indices) -> torch.Tensor:
    """[B, T, A, K]: lse(q, indices) [B, T * K, A] where every slot is a token of its own. What `masses` are."""
    slots = indices.transpose(2, 3).flatten(1, 2)[..., None]
    found = lse(q.repeat_interleave(indices.shape[3], 1), slots)
    return found.unflatten(1, (-1, indices.shape[3])).transpose(2, 3)


class ChunkMemory(NamedTuple):
    """Keys and values of chunks, and landmarks: what `ChunkEncoder` returns and `HSALayer` reads. Differentiable.

    Args:
        k (Tensor [B, N * S, H, D]): keys.
        v (Tensor [B, N * S, H, D]): values.
        landmarks (Tensor [B, N, R, D_r]): what `retrieve_chunks` scores.
    """

    k: torch.Tensor  # [B, N * S, H, D]
    v: torch.Tensor  # [B, N * S, H, D]
    landmarks: torch.Tensor  # [B, N, R, E]

    @property
    def chunk_size(self) -> int:
        return self.k.shape[1] // self.landmarks.shape[1]

    def retrieve(self, q_slc, start: int, topk: int, **options):
        """`hsa_tl.retrieve_chunks` over the landmarks.

        Args:
            q_slc (Tensor [B, T, R, D_r]): retrieval queries.
            start (int): position of the first query.
            topk (int): K.
            options: exclude_window, scale, recency, recency_span, impl and validate, as there.

        Returns:
            scores [B, T, R, K] float32 and indices [B, T, R, K] int32.
        """
        return retrieve_chunks(q_slc, self.landmarks, topk, chunk_size=self.chunk_size, q_start=start, **options)

    def scores(self, q_slc: torch.Tensor, start: int, **options) -> torch.Tensor:
        return chunk_scores(q_slc, self.landmarks, start, self.chunk_size, **options)

    def attend_all(self, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """out [B, T, A, D] of q [B, T, A, D] and weights [B, T, R or A, N] of every chunk, by matrix products alone.

        The operator's mathematics without a selection, for contexts of some hundred tokens: holds [B, A, T, N * S].
        """
        T, A, H = *q.shape[1:3], self.k.shape[2]
        w = weights.repeat_interleave(A // weights.shape[2], 2).transpose(1, 2).unflatten(1, (H, A // H)).flatten(2, 3)
        p = self._logits(q).softmax(-1)
        out = (p * w[..., None].to(p.dtype)).flatten(-2) @ self.v.transpose(1, 2)
        return out.unflatten(2, (A // H, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def masses_all(self, q: torch.Tensor) -> torch.Tensor:
        """`masses` [B, T, A, N] of every chunk, likewise."""
        T, A, H = *q.shape[1:3], self.k.shape[2]
        return self._logits(q).logsumexp(-1).unflatten(2, (A // H, T)).flatten(1, 2).transpose(1, 2)

    def _logits(self, q) -> torch.Tensor:
        """Scaled scores [B, H, G * T, N, S] of all keys."""
        H = self.k.shape[2]
        q = q.unflatten(2, (H, q.shape[2] // H)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, H, G * T, D]
        return (q * q.shape[-1] ** -0.5 @ self.k.transpose(1, 2).mT).unflatten(-1, (-1, self.chunk_size))

    def attend(self, q, weights, indices, *, impl: str = "auto", overlap: float = 0.9) -> torch.Tensor:
        """`hsa_tl.hsa_attention` over the chosen chunks.

        Args:
            q (Tensor [B, T, HQ, D]): queries.
            weights (Tensor [B, T, H or HQ, K], float32): of the slots; None for `hsa_tl.selected_attention`.
            indices (Tensor [B, T, H, K], int32): chosen chunks.
            impl (str): default: "auto".
            overlap (float): see `hsa_tl.selection_overlap`. Default: 0.9.

        Returns:
            Tensor [B, T, HQ, D].
        """
        config, S = {"overlap": overlap}, self.chunk_size
        if weights is None:
            return selected_attention(q, self.k, self.v, indices, chunk_size=S, impl=impl, config=config)[0]
        return hsa_attention(q, self.k, self.v, weights, indices, chunk_size=S, impl=impl, config=config)

    def masses(self, q: torch.Tensor, indices: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
        attend = partial(selected_attention, chunk_size=self.chunk_size, impl=impl)
        return of_slots(lambda q, slots: attend(q, self.k, self.v, slots)[1], q, indices)


class BatchMemory:
    """A Memory whose sequences see the chunks of so many others of the batch too, before their own. Nothing but
    landmarks is copied, and gradients add up.
    """

    def __init__(self, own: ChunkMemory, others: int):
        B = len(own.k)
        require(others < B, "distractors", f"be below the batch's {B} sequences", others)
        self.own, self.others, self.landmarks = own, others, with_rolled(own.landmarks, others)
        self.chunk_size = own.chunk_size

    retrieve, scores = ChunkMemory.retrieve, ChunkMemory.scores

    def attend(self, q, weights, indices, **options) -> torch.Tensor:
        return in_one_row(self._batch().attend, q, weights, self._in_batch(indices), **options)

    def masses(self, q, indices, **options) -> torch.Tensor:
        return in_one_row(self._batch().masses, q, self._in_batch(indices), **options)

    def _batch(self) -> ChunkMemory:
        return ChunkMemory(*(x.flatten(0, 1)[None] for x in self.own))

    def _in_batch(self, indices: torch.Tensor) -> torch.Tensor:
        """Chunks that each sequence counts from the first of the others on, as the whole batch counts them."""
        B, N = self.own.landmarks.shape[:2]
        sequence = torch.arange(B, device=indices.device)[:, None, None, None] - self.others + indices // N
        return torch.where(indices < 0, -1, sequence % B * N + indices % N).int()


class SegmentMemory(NamedTuple):
    """A cache's PagedMemory as an HSA layer reads it, for a segment with counts[b] tokens in row b: few tokens decode
    through the memory's pages, many share what they gather."""

    paged: object  # a PagedMemory
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
        read, page = partial(self._gathered, "attend"), self.paged.pages_of(indices_BTHK)
        return in_one_row(read, page, q_BTAD, weights, impl=impl, overlap=overlap)

    def masses(self, q_BTAD, indices_BTHK, *, impl: str = "auto") -> torch.Tensor:
        if q_BTAD.shape[1] <= FEW:
            return self.paged.masses(q_BTAD, indices_BTHK, impl=impl)
        return in_one_row(partial(self._gathered, "masses"), self.paged.pages_of(indices_BTHK), q_BTAD, impl=impl)

    def _gathered(self, method: str, page, *rows, **options) -> torch.Tensor:
        """ChunkMemory's method over the pages [1, T, H, K] that are read, which all sequences share: every page is
        gathered once, for so many tokens at a time as their pages allow."""
        named, at = page.unique(return_inverse=True)
        empty = int(named[0] < 0)  # -1 comes first
        spec, half = self.paged.spec, page.shape[1] // 2
        if half and (len(named) - empty) * spec.chunk_size * spec.heads * spec.head_dim > GATHERED:
            ends = slice(half), slice(half, None)
            halves = ([None if x is None else x[:, part] for x in (page, *rows)] for part in ends)
            return torch.cat([self._gathered(method, *x, **options) for x in halves], 1)
        named = named[empty:] if len(named) > empty else torch.zeros_like(named)  # some page: none of it is read
        k, v = (x.flatten(0, 1)[None] for x in self.paged.gather(named))
        chunks = ChunkMemory(k, v, k.new_empty(1, len(named), 0, 0))
        return getattr(chunks, method)(*rows, (at - empty).int(), **options)
