"""Which chunks of a sequence stay where a budget leaves so many: those that tokens read most.

A chunk's mass is the sum of the retrieval weights that it got. It is worth its mass over the chunks of tokens that
could read it: by the mass alone the first chunks would stay for good, since they have had the longest time to gather
it. The mass of a pinned chunk is infinite.
"""

import torch
import torch.nn.functional as F

from hsa_tl.model.pages import best_slots
from hsa_tl.validation import require

SCORES = 1 << 24  # held at once


def per_layer(budget: int | tuple[int, ...] | None, config) -> list[int | None]:
    """Budgets of layers that keep chunks of their own: one for all, or one of each; 1 for those that choose none.
    ValueError: another number."""
    each = list(budget) if isinstance(budget, tuple | list) else [budget] * config.layers
    ok = len(each) == config.layers and (budget is None or all(type(n) is int and n > 0 for n in each))
    require(ok, "budget", f"be a positive int, or one of each of {config.layers} layers", repr(budget))
    return [n if config.chooses(layer) else 1 for layer, n in enumerate(each)]


def worst(mass: torch.Tensor, age: torch.Tensor, excess: int) -> torch.Tensor:
    """Which of the chunks [n] go, `excess` at most: those of least worth, of equal ones the first. age: chunks behind
    each; the one of age 0, which no token may have read yet, and pinned ones stay, whatever the budget."""
    worth = (mass / age).masked_fill(age == 0, torch.inf)
    least = worth.argsort(stable=True)[:excess]
    return least[worth[least] < torch.inf]


def evict(memory, sequence: int) -> None:
    """Brings a sequence of a `PagedMemory` down to its budget."""
    pages = memory.host_table[sequence, : memory.held[sequence]].clone()
    held = (pages >= 0).nonzero()[:, 0]
    if (excess := len(held) - memory.budget) > 0:
        gone = held[worst(memory.mass[sequence].cpu()[held], len(pages) - 1 - held, excess)]
        memory.release(pages[gone])
        pages[gone] = -1
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
    require(weights is not None, "weights", "be given to a memory with a budget, which goes by them", None)
    mass = memory.mass
    valid = (indices >= 0) & (indices < mass.shape[1])
    weights = weights.unflatten(2, (indices.shape[2], -1)).mean(3).masked_fill(~valid, 0).nan_to_num(0)
    mass.scatter_add_(1, indices.masked_fill(~valid, 0).flatten(1).long(), weights.flatten(1).to(mass.dtype))


def retrieve_kept(memory, q_slc, lengths: torch.Tensor | int, topk: int, *, impl: str = "auto", **options):
    """`PagedMemory.retrieve` where chunks were evicted: by the scores of all chunks, a block of tokens at a time."""
    if impl not in ("auto", "reference"):
        raise NotImplementedError(f"impl must be auto or reference where chunks were evicted, got {impl!r}")
    (B, T, R, _), parts = q_slc.shape, []
    step = max(1, SCORES // (B * R * memory.longest))
    for a in range(0, max(1, T), step):
        scores = memory.scores(q_slc[:, a : a + step], lengths + a, **options)
        scores = F.pad(scores, (0, max(0, topk - memory.longest)), value=-torch.inf)
        every = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        parts.append(best_slots(scores, torch.where(scores == -torch.inf, -1, every), topk))
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))
