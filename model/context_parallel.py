"""Context parallelism: the tokens of a sequence spread over ranks, the chunk memory with them.

Rank r of W holds tokens [r T / W, (r + 1) T / W), a whole number of chunks. A sliding window takes the keys that it
lacks from the ranks before. Chunks stay where they are: every rank serves the pairs of its own chunks for all tokens,
and since HSA's output is a sum over chunks, the partial outputs are reduce-scattered to the tokens' ranks. Landmarks
are few and are gathered, so retrieval is exact.

Every rank runs the same collectives in the same order, forward and backward, whatever it needs of them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hsa_tl import hsa_attention, retrieve_chunks
from hsa_tl.model.hsa import ChunkMemory, chunk_scores
from hsa_tl.model.model import Model, ModelOutput

IGNORE = -100
# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group)
    return torch.cat(out.chunk(ranks), 1)


def _scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = x.chunk(dist.get_world_size(group), 1)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    _reduce_scatter(out, torch.cat(parts), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx, dout):
        return _scatter_sum(dout, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx, dout):
        return _gather(dout, ctx.group), None


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, t, ...] of every rank, one after the other: [B, W t, ...]. Gradients add up at their rank."""
    return _Gather.apply(x, group)


def scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rank's part [B, t, ...] of the sum of all ranks' x [B, W t, ...]."""
    return _ScatterSum.apply(x, group)


class Neighbours:
    """A KeyCache: the keys before a rank's tokens that a window of `window` tokens reaches (None: all) come from the
    ranks before it."""

    def __init__(self, group: dist.ProcessGroup, window: int | None):
        self.group, self.window = group, window

    def extend(self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        T, rank = k_BTHD.shape[1], dist.get_rank(self.group)
        tail = T if self.window is None else min(T, self.window - 1)
        before = rank * tail if self.window is None else min(rank * tail, self.window - 1)
        both = torch.stack([k_BTHD, v_BTHD], 2)
        past = gather(both[:, T - tail :], self.group)[:, rank * tail - before : rank * tail]
        k, v = torch.cat([past, both], 1).unbind(2)
        return k, v, None


class ShardedMemory:
    """A Memory over the chunks of all ranks; see hsa_tl.model.hsa. `own`: this rank's."""

    def __init__(self, own: ChunkMemory, group: dist.ProcessGroup):
        self.own, self.group = own, group
        self.landmarks = gather(own.landmarks, group)  # [B, N, R, E]
        self.first = dist.get_rank(group) * own.longest

    def retrieve(self, q_slc, start: int, topk: int, *, exclude_window: int = 0, impl: str = "auto"):
        return retrieve_chunks(
            q_slc, self.landmarks, topk, chunk_size=self.own.chunk_size, q_start=start, exclude_window=exclude_window,
            impl=impl,
        )  # fmt: skip

    def scores(self, q_slc, start: int, *, exclude_window: int = 0):
        return chunk_scores(q_slc, self.landmarks, start, self.own.chunk_size, exclude_window)

    def attend(self, q, weights, indices, *, impl: str = "auto", overlap: float = 0.9) -> torch.Tensor:
        everyone = gather(indices, self.group) - self.first
        mine = torch.where((everyone >= 0) & (everyone < self.own.longest), everyone, -1).int()
        out = hsa_attention(
            gather(q, self.group), self.own.k, self.own.v, gather(weights, self.group), mine,
            chunk_size=self.own.chunk_size, impl=impl, config={"overlap": overlap},
        )  # fmt: skip
        return scatter_sum(out.float(), self.group).to(q.dtype)  # W 16-bit sums would lose what one process keeps


class ContextParallel(nn.Module):
    """`model`, with the tokens of each sequence spread over the ranks of `group`; parameters are the same everywhere.

    forward: input_ids, labels [B, T], the same on every rank, T a multiple of ranks * chunk_size -> ModelOutput with
    this rank's logits [B, T / W, V] and a loss. The mean of the ranks' losses is the model's loss, and the mean of
    their gradients its gradient: what FSDP2 and DistributedDataParallel compute. logits_to_keep=0: no logits.
    ValueError: another T. NotImplementedError: NSA, or impl "dense", whose memory is no sum over chunks here.
    """

    def __init__(self, model: Model, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.model, self.group = model, dist.group.WORLD if group is None else group

    def part(self, T: int) -> slice:
        """The tokens of this rank."""
        ranks, S = dist.get_world_size(self.group), self.model.config.chunk_size
        if T % (ranks * S):
            raise ValueError(f"input_ids must have a multiple of {ranks} ranks * {S} tokens, got {T}")
        start = T // ranks * dist.get_rank(self.group)
        return slice(start, start + T // ranks)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, logits_to_keep: int | None = None
    ) -> ModelOutput:
        model, part = self.model, self.part(input_ids.shape[1])
        if model.config.attention == "nsa" or model.config.impl == "dense":
            raise NotImplementedError(
                'context parallelism needs attention "hsa", "swa" or "full", and not impl="dense"'
            )
        past = None
        if model.conv is not None and part.start:
            past = model.embedding(input_ids[:, part.start - model.config.conv + 1 : part.start])
        x_BTC = model.embed(input_ids[:, part], past)
        caches = [Neighbours(self.group, layer.attention.window) for layer in model.layers]
        lower = model.config.lower_layers
        h_BTC, first_v_BTHD = model.lower(x_BTC, part.start, caches[:lower])
        own = model.encode(h_BTC, part.start)
        memory = None if own is None else ShardedMemory(own, self.group)
        h_BTC = model.upper(h_BTC, memory, first_v_BTHD, part.start, caches[lower:])
        logits = None if logits_to_keep == 0 else model.head(h_BTC)
        if labels is None:
            return ModelOutput(logits)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        ranks, total = dist.get_world_size(self.group), (targets != IGNORE).sum()
        return ModelOutput(logits, model.loss_sum(h_BTC, targets[:, part]) * ranks / total)
