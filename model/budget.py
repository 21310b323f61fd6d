"""Which chunks of a `PagedMemory` stay: those that tokens read most, by the weights that retrieval gave them."""

import torch
import torch.nn.functional as F

from hsa_tl.model.pages import merge

SCORES = 1 << 24  # held at once


class Budget:
    """At most `chunks` of each sequence, and the mass [B, chunks] of all: the retrieval weights that each got, summed.

    A chunk is worth its mass over the chunks of tokens that could read it. By the mass alone the first chunks would
    stay for good: they have had the longest time to gather it. The mass of a pinned chunk is infinite.
    """

    def __init__(self, chunks: int, batch: int, device: torch.device):
        self.chunks = chunks
        self.mass = torch.zeros(batch, 0, dtype=torch.float64, device=device)

    def reserve(self, chunks: int) -> None:
        """Makes room for so many chunks of each sequence."""
        self.mass = F.pad(self.mass, (0, chunks - self.mass.shape[1]))


def per_layer(budget: int | tuple[int, ...] | None, layers: int) -> list[int | None]:
    """Budgets of layers that keep chunks of their own: one for all, or one of each. ValueError: another number."""
    each = list(budget) if isinstance(budget, tuple | list) else [budget] * layers
    if len(each) != layers or (budget is not None and any(type(n) is not int or n < 1 for n in each)):
        raise ValueError(f"budget must be a positive int, or one of each of {layers} layers, got {budget!r}")
    return each


def pin(memory, sequence: int, chunks: list[int]) -> None:
    """See `PagedMemory.pin`."""
    if memory.budget is None:
        raise ValueError(f"chunks must be pinned in a memory with a budget, got {chunks} in one without")
    held, evicted = memory.held[sequence], memory.evicted[sequence]
    for chunk in chunks:
        if chunk in evicted or not 0 <= chunk < held:
            why = ", which it evicted" if chunk in evicted else f" of {held}"
            raise ValueError(f"chunks must be such as sequence {sequence} holds, got {chunk}{why}")
    memory.budget.mass[sequence, chunks] = torch.inf


def evict(memory, sequence: int) -> None:
    """Brings a sequence down to the memory's budget: the chunks of least worth go, of equal ones the older, and never
    the last one, which no token may have read yet."""
    pages = memory.host_table[sequence, : memory.held[sequence]].clone()
    excess = int((pages >= 0).sum()) - memory.budget.chunks
    if excess <= 0:
        return
    worth = memory.budget.mass[sequence, : len(pages)].cpu() / torch.arange(len(pages) - 1, -1, -1)
    worth[pages < 0] = worth[-1] = torch.inf
    worst = worth.argsort(stable=True)[:excess]
    worst = worst[worth[worst] < torch.inf]  # a pinned chunk stays, whatever the budget
    memory.release(pages[worst])
    pages[worst] = -1
    memory.hold(sequence, 0, pages)


def count(memory, weights: torch.Tensor | None, indices: torch.Tensor) -> None:
    """Adds weights [B, T, H or HQ, K] to the mass of the chunks [B, T, H, K] that are read.

    ValueError: no weights; on a CPU, a chunk that was evicted."""
    if any(memory.evicted) and memory.device.type == "cpu":
        gone = (memory.pages_of(indices) < 0) & (indices >= 0) & (indices < memory.chunks[:, None, None, None])
        if gone.any():
            chunk, sequence = int(indices[gone][0]), int(gone.nonzero()[0, 0])
            raise ValueError(f"indices must name chunks that are held, got {chunk}, which sequence {sequence} evicted")
    if memory.budget is None:
        return
    if weights is None:
        raise ValueError("weights must be given to a memory with a budget, which goes by them, got None")
    mass = memory.budget.mass
    valid = (indices >= 0) & (indices < mass.shape[1])
    weights = weights.unflatten(2, (indices.shape[2], -1)).mean(3).masked_fill(~valid, 0)
    mass.scatter_add_(1, indices.masked_fill(~valid, 0).flatten(1).long(), weights.flatten(1).to(mass.dtype))


def retrieve_kept(memory, q_slc, lengths: torch.Tensor, topk: int, *, impl: str = "auto", **options):
    """`PagedMemory.retrieve` where chunks were evicted: by the scores of all chunks, a block of tokens at a time."""
    if impl not in ("auto", "reference"):
        raise NotImplementedError(f"impl must be auto or reference where chunks were evicted, got {impl!r}")
    (B, T, R, _), parts = q_slc.shape, []
    step = max(1, SCORES // (B * R * memory.longest))
    for a in range(0, T, step):
        scores = memory.scores(q_slc[:, a : a + step], lengths + a, **options)
        # At least one more than topk: merge then moves the slots of evicted chunks behind the others.
        scores = F.pad(scores, (0, max(0, topk + 1 - memory.longest)), value=-torch.inf)
        every = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        parts.append(merge([(0, (scores, torch.where(scores == -torch.inf, -1, every)))], topk))
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
