"""Rows that lie in several slabs, one after the other: what a `PagedMemory` stores."""

import math
import tempfile
from pathlib import Path

import torch


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]], topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The topk of what each slab gave, scores and indices [.., topk]; slots ascend by chunk."""
    if len(parts) == 1:
        return parts[0]
    scores, indices = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    # Slots ascend by chunk, so that a stable sort lets the lower of two equal chunks win.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    scores, indices = scores.gather(-1, best), indices.gather(-1, best)
    order = torch.where(indices >= 0, indices, torch.iinfo(torch.int32).max).argsort(-1)
    return scores.gather(-1, order), indices.gather(-1, order)


def mapped(directory: Path | str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file that has no name any more: it goes with the tensor."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def write_rows(slabs: list[torch.Tensor], start: int, x: torch.Tensor) -> None:
    """Rows start.. of the slabs taken together = x."""
    for slab in slabs:
        a, b = max(0, start), min(len(slab), start + len(x))
        if a < b:
            slab[a:b].copy_(x[a - start : b - start])
        start -= len(slab)


def first_rows(slabs: list[torch.Tensor], n: int) -> list[torch.Tensor]:
    """The first n rows of the slabs taken together."""
    parts = []
    for slab in slabs:
        parts.append(slab[: max(0, n)])
        n -= len(slab)
    return parts
