"""The chunk memory of decode: a growing, paged store of keys, values and landmarks, on the device or offloaded.

A page holds a chunk's keys and values. Pages lie in slabs, each as large as all before it: growing allocates, and
copies of what is stored the landmarks alone.
`attend` calls hsa_decode for each slab and adds up, since HSA's output is a sum over chunks. A memory of the right
capacity has one slab, and then neither costs anything.

Shapes: as in hsa_tl.model.hsa; C chunks.
"""

from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F

from hsa_tl import hsa_decode, landmark_bounds, merge_attention, retrieve_decode, selected_decode
from hsa_tl.model import memory_file
from hsa_tl.model.budget import count, evict, retrieve_kept
from hsa_tl.model.chunk_memory import chunk_scores, of_slots
from hsa_tl.model.memory_file import MemorySpec
from hsa_tl.model.pages import FETCHED, PageCache, PageCounts, Slabs, each_part, mapped, read, write
from hsa_tl.validation import require

BLOCK = 64  # landmarks that share a bound
NO_BOUNDS = torch.tensor([torch.inf, -torch.inf]).view(2, 1, 1)  # of a block without landmarks


class PagedMemory:
    """The chunk memory of decode: keys, values and landmarks of `spec.batch` sequences of any lengths.

    A stored chunk never changes. Sequences grow (`append`), end (`crop`, `free`) and branch (`fork`, which shares
    pages); a page is used again when no sequence holds it any more.

    Without offload and two_level, `retrieve` and `attend` do not wait for the device, and a captured graph of them
    holds until `append` makes room or evicts.

    With a budget, `append` first brings the sequence down to it, see hsa_tl.model.budget. `retrieve` never chooses a
    chunk that is in `evicted`; to `attend` it is an error on a CPU, an empty slot elsewhere.

    Args:
        spec (MemorySpec): dims and dtype.
        device (torch.device or str): where landmarks are and queries come from. Default: "cpu".
        capacity (int): chunks of a sequence for which there is room at first; more are allowed. Default: 256.
        pages (int): of the first slab of keys and values. Default: batch * capacity.
        offload (bool): keep keys and values in host memory, pinned where there is a GPU; `attend` fetches the chosen
            pages into a cache on the device, least recently used out first. Default: False.
        cache_pages (int): of that cache. Default: None, 1024.
        two_level (bool): keep bounds of landmarks and let `retrieve` skip blocks, see `hsa_tl.retrieve_decode`.
            Default: False.
        directory (str or Path): keep keys and values, and landmarks on a CPU, in memory-mapped files there, which go
            with the memory; on a GPU with offload only. Default: None.
        budget (int): chunks of a sequence that stay when more are appended. Default: None, all.

    Raises:
        ValueError: a size that is not a positive int, or a directory on a GPU without offload.
    """

    @torch.inference_mode(False)  # its tensors are changed in place, outside of that mode too
    def __init__(
        self, spec: MemorySpec, *, device: torch.device | str = "cpu", capacity: int = 256,
        pages: int | None = None, offload: bool = False, cache_pages: int | None = None, two_level: bool = False,
        directory: Path | str | None = None, budget: int | None = None,
    ):  # fmt: skip
        pages = spec.batch * capacity if pages is None else pages
        sizes = {"capacity": capacity, "pages": pages}
        optional = {n: x for n, x in (("cache_pages", cache_pages), ("budget", budget)) if x is not None}
        for name, value in (sizes | optional).items():
            require(type(value) is int and value >= 1, name, "be a positive int", repr(value))
        require(offload or cache_pages is None, "cache_pages", "be left out without offload", cache_pages)
        if directory is not None and torch.device(device).type != "cpu" and not offload:
            raise ValueError(f"directory must come with offload=True on {device}, got {directory}")
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
        self.spec, self.device, self.two_level, self.directory = spec, torch.device(device), two_level, directory
        self.cache = PageCache(spec.page, cache_pages or 1024, spec.dtype, self.device) if offload else None
        self.k_slabs: Slabs = []  # [pages, S, H, D]
        self.v_slabs: Slabs = []
        kind = {"dtype": spec.dtype, "device": self.device}
        self.marks = torch.empty(spec.batch, 0, *spec.landmark, **kind)  # [B, chunks, R, E]
        self.bounds = torch.empty(spec.batch, 0, 2, *spec.landmark, **kind)  # [B, chunks / BLOCK, 2, R, E] if two_level
        self.held = [0] * spec.batch  # chunks, with those that were evicted
        self.evicted: list[list[int]] = [[] for _ in range(spec.batch)]
        self.budget = budget
        self.mass = torch.zeros(spec.batch, 0, dtype=torch.float64, device=self.device)  # see hsa_tl.model.budget
        self.counts = PageCounts()
        self.host_table = torch.empty(spec.batch, 0, dtype=torch.int32)  # on the device: page_table
        self.chunks = torch.zeros(spec.batch, dtype=torch.int32, device=self.device)
        self.reserve(pages, capacity)

    @property
    def nbytes(self) -> int:
        """Of keys, values and landmarks, with what is reserved."""
        return sum(x.nbytes for x in (*self.k_slabs, *self.v_slabs, self.marks, self.bounds))

    @property
    def pages(self) -> int:
        """Pages in use; one that sequences share counts once."""
        return len(self.counts.references) - len(self.counts.free)

    @property
    def longest(self) -> int:
        """Chunks of the longest sequence."""
        return max(self.held)

    @torch.inference_mode(False)
    def reserve(self, pages: int, chunks: int) -> None:
        """Makes room for so many pages, and for so many chunks of each sequence."""
        B, dtype = self.spec.batch, self.spec.dtype

        def new(*shape: int, device: torch.device = self.device) -> torch.Tensor:
            if self.directory is not None and device.type == "cpu":
                return mapped(self.directory, shape, dtype)
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=device != self.device)

        while (room := sum(map(len, self.k_slabs))) < pages:
            for slabs in (self.k_slabs, self.v_slabs):
                home = self.device if self.cache is None else torch.device("cpu")
                slabs.append(new(room or pages, *self.spec.page, device=home))
        if (room := self.host_table.shape[1]) < chunks:
            blocks = -(-max(chunks, 2 * room) // BLOCK)
            old, self.marks = self.marks, new(B, blocks * BLOCK, *self.spec.landmark)
            self.marks[:, :room] = old
            if self.two_level:
                old, self.bounds = self.bounds, new(B, blocks, 2, *self.spec.landmark).copy_(NO_BOUNDS)
                self.bounds[:, : room // BLOCK] = old
            self.host_table = F.pad(self.host_table, (0, blocks * BLOCK - room), value=-1)
            self.page_table = self.host_table.to(self.device, copy=True)
            self.mass = F.pad(self.mass, (0, blocks * BLOCK - room))

    def append(self, sequence: int, k: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> None:
        """Adds whole chunks to a sequence; nothing is stored if an argument is wrong.

        Args:
            sequence (int): which one, in [0, batch).
            k (Tensor [C, S, H, D] or [C * S, H, D]): keys of C chunks.
            v (Tensor, like k): values.
            landmarks (Tensor [C, R, D_r]): of the chunks.

        Raises:
            ValueError: a sequence that is not there; shapes or dtypes that disagree.
        """
        self._check_sequence("sequence", sequence)
        self.spec.check(k, v, landmarks)
        if self.budget is not None:
            evict(self, sequence)
        pages, start = self.counts.take(len(landmarks)), self.held[sequence]
        self.reserve(len(self.counts.references), start + len(pages))
        self.hold(sequence, start, torch.tensor(pages, dtype=torch.int32))
        self._store(sequence, start, k, v, landmarks)

    def replace(self, sequence: int, k: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor, start: int) -> None:
        """Puts other chunks in the place of those from `start` on.

        Args:
            sequence, k, v, landmarks: as for `append`.
            start (int): the first of them.

        Raises:
            ValueError: as in `append`; a chunk that the sequence does not hold or has evicted, or that another one
                shares.
        """
        self._check_sequence("sequence", sequence)
        self.spec.check(k, v, landmarks)
        pages = self.host_table[sequence, start : start + len(landmarks)].tolist()
        shared = any(page < 0 or self.counts.references[page] > 1 for page in pages)
        if shared or not 0 <= start <= self.held[sequence] - len(landmarks):
            raise ValueError(f"start must be of chunks that the sequence holds, and alone, got {start}")
        if self.cache is not None:
            self.cache.forget(pages)
        self.mass[sequence, start : start + len(pages)] = 0
        self._store(sequence, start, k, v, landmarks)

    def _store(self, sequence: int, start: int, k, v, landmarks) -> None:
        pages = self.host_table[sequence, start : start + len(landmarks)].tolist()
        for slabs, x in ((self.k_slabs, k), (self.v_slabs, v)):
            write(slabs, pages, x.detach().reshape(-1, *self.spec.page))
        self.marks[sequence, start : start + len(pages)] = landmarks.detach()
        self.bound(sequence, start)

    def landmarks(self, sequence: int) -> torch.Tensor:
        """[chunks, R, E] of one sequence."""
        return self.marks[sequence, : self.held[sequence]]

    def _check_sequence(self, name: str, sequence: int) -> None:
        if type(sequence) is not int or not 0 <= sequence < self.spec.batch:
            raise ValueError(f"{name} must be an int in [0, {self.spec.batch}), got {sequence!r}")

    def hold(self, sequence: int, start: int, pages: torch.Tensor) -> None:
        """From chunk `start` on, the sequence holds these pages and no more; -1 is an evicted chunk."""
        self.held[sequence] = end = start + len(pages)
        before = [chunk for chunk in self.evicted[sequence] if chunk < start]
        self.evicted[sequence] = before + (start + (pages < 0).nonzero()[:, 0]).tolist()
        self.host_table[sequence, start:] = -1
        self.host_table[sequence, start:end] = pages
        self.page_table[sequence, start:] = self.host_table[sequence, start:].to(self.device)
        self.chunks[sequence] = end

    def release(self, pages: torch.Tensor) -> None:
        """One sequence less holds these pages."""
        freed = self.counts.release(pages[pages >= 0].tolist())
        if self.cache is not None:
            self.cache.forget(freed)

    def pin(self, sequence: int, chunks: list[int]) -> None:
        """Keeps these chunks whatever the budget; they count towards it.

        Args:
            sequence (int): which one, in [0, batch).
            chunks (list of int): that it holds.

        Raises:
            ValueError: a memory without a budget, a sequence that is not there, or a chunk that it does not hold.
        """
        self._check_sequence("sequence", sequence)
        require(self.budget is not None, "chunks", "be pinned in a memory with a budget", f"{chunks} in one without")
        held, evicted = self.held[sequence], self.evicted[sequence]
        for chunk in chunks:
            if chunk in evicted or chunk not in range(held):
                why = ", which it evicted" if chunk in evicted else f" of {held}"
                raise ValueError(f"chunks must be such as sequence {sequence} holds, got {chunk}{why}")
        self.mass[sequence, chunks] = torch.inf

    def crop(self, sequence: int, chunks: int) -> None:
        """Takes a sequence's chunks from `chunks` on away.

        Args:
            sequence (int): which one, in [0, batch).
            chunks (int): that it still holds.

        Raises:
            ValueError: a sequence that is not there, or more chunks than it holds.
        """
        self._check_sequence("sequence", sequence)
        held = self.held[sequence]
        if type(chunks) is not int or not 0 <= chunks <= held:
            raise ValueError(f"chunks must be an int from 0 to {held}, what the sequence holds, got {chunks!r}")
        self.release(self.host_table[sequence, chunks:held])
        self.hold(sequence, chunks, torch.empty(0, dtype=torch.int32))
        self.mass[sequence, chunks:] = 0
        # From the first block without a landmark on; the bounds of one that keeps some stay wide.
        self.bounds[sequence, -(-chunks // BLOCK) :] = NO_BOUNDS

    def free(self, sequence: int) -> None:
        """Takes all of a sequence's chunks away, so that another one can take its place.

        Args:
            sequence (int): which one, in [0, batch).
        """
        self.crop(sequence, 0)

    def fork(self, source: int, target: int) -> None:
        """Lets `target` begin with all that `source` holds: pages are shared, landmarks copied.

        Args:
            source (int): the sequence that goes on as it is.
            target (int): an empty one.

        Raises:
            ValueError: a sequence that is not there, or a target that is not empty.
        """
        for name, sequence in (("source", source), ("target", target)):
            self._check_sequence(name, sequence)
        require(not self.held[target], "target", "be empty, `free` it first", f"{self.held[target]} chunks")
        pages = self.host_table[source, : self.held[source]]
        self.counts.share(pages[pages >= 0].tolist())
        for x in (self.marks, self.bounds, self.mass):
            x[target] = x[source]
        self.hold(target, 0, pages)

    def bound(self, sequence: int, start: int) -> None:
        """Brings the bounds of a sequence's landmarks up to date, from chunk `start` on."""
        if self.two_level:
            first = start // BLOCK
            new = landmark_bounds(self.landmarks(sequence)[None, first * BLOCK :])[0]
            self.bounds[sequence, first : first + len(new)] = new

    def retrieve(
        self, q_slc: torch.Tensor, lengths: torch.Tensor | int, topk: int, **options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hsa_tl.retrieve_decode` over the landmarks.

        Args:
            q_slc (Tensor [B, T, R, D_r]): retrieval queries.
            lengths (Tensor [B] int32, or int): tokens of each sequence before these.
            topk (int): K.
            options: exclude_window, scale, recency, recency_span and impl, as there.

        Returns:
            scores [B, T, R, K] and indices [B, T, R, K] int32.
        """
        if any(self.evicted):
            return retrieve_kept(self, q_slc, lengths, topk, **options)
        lengths = torch.full_like(self.chunks, lengths) if isinstance(lengths, int) else lengths
        own = {"chunk_size": self.spec.chunk_size, "bounds": self.bounds if self.two_level else None}
        return retrieve_decode(q_slc, self.marks, lengths, topk, chunks=self.chunks, **own, **options)

    def scores(self, q_slc: torch.Tensor, lengths: torch.Tensor | int, **options) -> torch.Tensor:
        """[B, T, R, longest] of every chunk, see hsa_tl.model.chunk_memory.Memory; one where no sequence holds any."""
        most = max(1, self.longest)
        scores = chunk_scores(q_slc, self.marks[:, :most], lengths, self.spec.chunk_size, **options)
        missing = self.page_table[:, :most] < 0  # not there yet, or evicted
        return scores.masked_fill_(missing[:, None, None], -torch.inf)

    def attend(
        self, q: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, *, scale: float | None = None,
        impl: str = "auto", overlap: float = 0.9,
    ) -> torch.Tensor:  # fmt: skip
        """`hsa_tl.hsa_decode` over the chosen chunks.

        Args:
            q (Tensor [B, T, HQ, D]): queries.
            weights (Tensor [B, T, H or HQ, K], float32): of the slots; None for `hsa_tl.selected_decode`.
            indices (Tensor [B, T, H, K], int32): chosen chunks.
            scale, impl: as there.
            overlap (float): as in a `ChunkMemory`; decoding shares no chunk between tokens. Default: 0.9.

        Returns:
            Tensor [B, T, HQ, D].
        """
        count(self, weights, indices)
        if weights is None:
            return self._one_softmax(q, indices, scale, impl)[0]
        attend = lambda k, v, *places: hsa_decode(q, k, v, weights, *places, scale=scale, impl=impl)  # noqa: E731
        return reduce(torch.add, each_part(self, indices, attend))

    def _one_softmax(self, q, indices, scale: float | None, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        attend = partial(selected_decode, q, scale=scale, impl=impl)
        return merge_attention(*each_part(self, indices, attend))

    def masses(
        self, q: torch.Tensor, indices: torch.Tensor, *, scale: float | None = None, impl: str = "auto"
    ) -> torch.Tensor:
        """[B, T, HQ, K], see hsa_tl.model.chunk_memory.Memory; by `hsa_tl.selected_decode`."""
        return of_slots(lambda q, slots: self._one_softmax(q, slots, scale, impl)[1], q, indices)

    def pages_of(self, indices: torch.Tensor) -> torch.Tensor:
        """[B, T, H, K]: the page of each slot, -1 for an empty one."""
        at = indices.flatten(1).clamp(0, self.page_table.shape[1] - 1).long()
        page = self.page_table.gather(1, at).view(indices.shape)
        return torch.where((indices >= 0) & (indices < self.page_table.shape[1]), page, -1)

    def gather(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [M, S, H, D] of pages [M], on the device."""
        return tuple(read(slabs, pages).to(self.device) for slabs in (self.k_slabs, self.v_slabs))

    def prefetch(self, indices: torch.Tensor) -> None:
        """Starts to fetch the chosen pages of an offloaded memory, as many as the cache holds.

        Waits for the selection, not for the pages: what is launched until `attend` runs beside the copies.
        """
        if self.cache is not None:
            pages = self.pages_of(indices).unique().tolist()
            with FETCHED:
                self.cache.fetch([p for p in pages if p >= 0][: self.cache.size], self.k_slabs, self.v_slabs)

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file; `path` then holds all of it or what it held before.

        Args:
            path (str or Path): the file.
        """
        memory_file.write(Path(path), memory_file.contents(self), spec=self.spec.to_json())

    @classmethod
    def load(cls, path: Path | str, spec: MemorySpec | None = None, **options) -> "PagedMemory":
        """The memory that `save` wrote.

        Args:
            path (str or Path): the file.
            spec (MemorySpec): what it must hold. Default: None, whatever it holds.
            options: of the constructor; capacity and pages are at least what the file holds. What was evicted stays so.

        Returns:
            PagedMemory

        Raises:
            ValueError: a file that is no memory, truncated, inconsistent or of another spec.
            OSError: it cannot be read.
        """
        with memory_file.read(Path(path)) as file:
            spec = file.spec(spec)
            rows = file.pages(spec)
            room = {
                "capacity": max(options.get("capacity", 256), *map(len, rows)),
                "pages": max(options.get("pages") or 1, file.shape("k")[0]),
            }
            return file.fill(cls(spec, **options | room), rows)
