"""What a `PagedMemory` is made of: rows in slabs one after the other, counts of pages in use, a cache of pages."""

import math
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

Slabs = list[torch.Tensor]
# Of whoever reads fetched pages: no other thread fetches into their place. One for all, as memories can be copied.
FETCHED = threading.Lock()


def placed(slabs: Slabs) -> Iterator[tuple[int, torch.Tensor]]:
    """Each slab and the number of its first row among all."""
    first = 0
    for slab in slabs:
        yield first, slab
        first += len(slab)


def pieces(slabs: Slabs, start: int, stop: int) -> Slabs:
    """Rows [start, stop) of the slabs taken together: a view of each slab, some of them empty."""
    return [slab[max(0, start - first) : max(0, stop - first)] for first, slab in placed(slabs)]


def write(slabs: Slabs, rows: Sequence[int], x: torch.Tensor) -> None:
    """These rows of the slabs taken together = x, a run of neighbours at a time."""
    begin = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            views = pieces(slabs, rows[begin], rows[begin] + end - begin)
            for view, part in zip(views, x[begin:end].split(list(map(len, views))), strict=True):
                view.copy_(part)
            begin = end


def read(slabs: Slabs, rows: torch.Tensor) -> torch.Tensor:
    """These rows of the slabs taken together."""
    at, x = rows.to(slabs[0].device), slabs[0].new_empty(len(rows), *slabs[0].shape[1:])
    for first, slab in placed(slabs):
        here = ((at >= first) & (at < first + len(slab))).nonzero()[:, 0]
        x[here] = slab[at[here] - first]
    return x


def best_slots(scores: torch.Tensor, indices: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The topk of slots [.., n] that ascend by chunk; empty ones come last."""
    # A stable sort lets the lower of two equal chunks win.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    scores, indices = scores.gather(-1, best), indices.gather(-1, best)
    order = torch.where(indices >= 0, indices, torch.iinfo(torch.int32).max).argsort(-1)
    return scores.gather(-1, order), indices.gather(-1, order)


def each_part(memory, indices: torch.Tensor, attend: Callable) -> list:
    """attend(k, v, chunks, their places in k) of disjoint parts of a selection of a `PagedMemory`."""
    page = None if memory.cache is None and len(memory.k_slabs) == 1 else memory.pages_of(indices)
    if page is None:
        return [attend(memory.k_slabs[0], memory.v_slabs[0], indices, memory.page_table)]
    if memory.cache is None:
        parts = []
        for (first, k), v in zip(placed(memory.k_slabs), memory.v_slabs, strict=True):
            elsewhere = (page >= 0) & ((page < first) | (page >= first + len(k)))
            parts.append(attend(k, v, torch.where(elsewhere, -1, indices), memory.page_table - first))
        return parts
    if memory.device.type == "cpu" and bool(((page < 0) & (indices != -1)).any()):
        raise ValueError(f"indices must lie in [-1, chunks), the chunks that each sequence holds: {memory.held}")
    with FETCHED:
        return [attend(*part) for part in memory.cache.parts(page, memory.k_slabs, memory.v_slabs)]


def mapped(directory: Path | str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file that has no name any more: it goes with the tensor."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


class PageCounts:
    """Which pages are in use, and by how many sequences each."""

    def __init__(self, references: Sequence[int] = ()):
        self.references = list(references)
        self.free = [page for page, n in enumerate(self.references) if not n]

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


class PageCache:
    """`size` pages on the device of those in host memory: least recently used out first."""

    def __init__(self, page: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device):
        self.size = size
        self.k, self.v = (torch.empty(size, *page, dtype=dtype, device=device) for _ in range(2))
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # page -> slot, least recently used first
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.hits = self.misses = 0

    def fetch(self, pages: list[int], k_slabs: Slabs, v_slabs: Slabs) -> list[int]:
        """Slots of at most `size` distinct pages; starts to copy those that are missing from the slabs.

        On a GPU the copies run on a stream of their own: `wait` before reading the slots.
        """
        assert len(pages) <= self.size
        missing = [page for page in pages if page not in self.slot_of]
        for page in pages:
            if page in self.slot_of:
                self.slot_of.move_to_end(page)
        self.hits, self.misses = self.hits + len(pages) - len(missing), self.misses + len(missing)
        if self.stream is not None and missing:  # what is running may still read the pages that go
            self.stream.wait_stream(torch.cuda.current_stream(self.k.device))
        with torch.cuda.stream(self.stream):  # None: does nothing
            for page in missing:
                # All pages of the call that were here are the most recent: none of them goes.
                full = len(self.slot_of) == self.size
                slot = self.slot_of.popitem(last=False)[1] if full else len(self.slot_of)
                self.slot_of[page] = slot
                for to, slabs in ((self.k, k_slabs), (self.v, v_slabs)):
                    for x in pieces(slabs, page, page + 1):
                        to[slot : slot + len(x)].copy_(x, non_blocking=True)
        return [self.slot_of[page] for page in pages]

    def parts(self, page: torch.Tensor, k_slabs: Slabs, v_slabs: Slabs):
        """Of pages [B, T, H, K], -1 for none, as many at a time as fit: k, v, where each is in the table, the table."""
        named, inverse = page.unique(return_inverse=True)
        named = named.tolist()
        empty = int(bool(named) and named[0] < 0)
        for start in range(empty, max(len(named), empty + 1), self.size):
            group = named[start : start + self.size]
            slots = self.fetch(group, k_slabs, v_slabs) or [0]
            self.wait()
            table = torch.tensor(slots, dtype=torch.int32).to(self.k.device, non_blocking=True)
            mine = (inverse >= start) & (inverse < start + len(group))
            part = torch.where(mine, inverse - start, -1).int()
            yield self.k, self.v, part, table.expand(len(page), -1)

    def forget(self, pages: list[int]) -> None:
        """Pages whose content goes: their slots are the next to be used."""
        for page in pages:
            if (slot := self.slot_of.pop(page, None)) is not None:
                self.slot_of[-1 - slot] = slot  # a name that no page has
                self.slot_of.move_to_end(-1 - slot, last=False)

    def wait(self) -> None:
        """The current stream, not the host, waits for all copies that were started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.k.device).wait_stream(self.stream)
