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


def write_pages(slabs: list[torch.Tensor], pages: list[int], x: torch.Tensor) -> None:
    """Rows `pages` of the slabs taken together = x, a run of neighbours at a time."""
    begin = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            write_rows(slabs, pages[begin], x[begin:end])
            begin = end


class PageCounts:
    """Which pages are in use, and by how many sequences each."""

    def __init__(self, references: list[int] | None = None):
        self.references = [] if references is None else references
        self.free = [page for page, n in enumerate(self.references) if not n]

    @property
    def used(self) -> int:
        return len(self.references) - len(self.free)

    def take(self, n: int) -> list[int]:
        """n pages of one sequence: those that were given back first."""
        taken, self.free = self.free[:n], self.free[n:]
        fresh = range(len(self.references), len(self.references) + n - len(taken))
        self.references.extend(0 for _ in fresh)
        taken += fresh
        self.share(taken)
        return taken

    def share(self, pages: list[int]) -> None:
        """One more sequence holds them."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: list[int]) -> list[int]:
        """One sequence less holds them; those that none holds any more."""
        for page in pages:
            self.references[page] -= 1
        freed = [page for page in pages if not self.references[page]]
        self.free = sorted(self.free + freed)
        return freed
