"""The chunk memory of decode: a growing, paged store of keys, values and landmarks, on the device or offloaded.

Shape suffixes and letters: B sequences, C chunks, S chunk size, H key/value heads, D head dim, R retrieval heads, E
retrieval dim. A page holds a chunk's keys and values.

Pages lie in slabs, each as large as all before it: growing allocates and copies nothing that is stored. `attend` calls
hsa_decode for each slab and adds up, since HSA's output is a sum over chunks, and `retrieve` merges the best of each
slab of landmarks. A memory of the right capacity has one slab, and then neither costs anything.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from hsa_tl import hsa_decode, landmark_bounds, retrieve_chunks, retrieve_decode
from hsa_tl.model import memory_file
from hsa_tl.model.memory_file import MemorySpec
from hsa_tl.model.page_cache import PageCache
from hsa_tl.model.slabs import PageCounts, mapped, merge, write_pages, write_rows

BLOCK = 64  # landmarks that share a bound


class PagedMemory:
    """The chunk memory of decode: keys, values and landmarks of `spec.batch` sequences of any lengths.

    A stored chunk never changes. Sequences grow (`append`), end (`crop`, `free`) and branch (`fork`, which shares
    pages); a page is used again when no sequence holds it any more.

    Without offload and two_level, `retrieve` and `attend` do not wait for the device, and a captured graph of them
    holds until `append` adds a slab.

    Args:
        spec (MemorySpec): dims and dtype.
        device (torch.device or str): where landmarks are and queries come from. Default: "cpu".
        capacity (int): chunks of a sequence that the first slab of landmarks holds; more are allowed. Default: 256.
        pages (int): of the first slab of keys and values. Default: batch * capacity.
        offload (bool): keep keys and values in host memory, pinned where there is a GPU; `attend` fetches the chosen
            pages into a cache on the device, least recently used out first. Default: False.
        cache_pages (int): of that cache. Default: 1024.
        two_level (bool): keep bounds of landmarks and let `retrieve` skip blocks, see `hsa_tl.retrieve_decode`.
            Default: False.
        directory (str or Path): keep keys and values in memory-mapped files there, which go with the memory; on a GPU
            with offload only. Default: None.

    Raises:
        ValueError: a size that is not a positive int, or a directory on a GPU without offload.
    """

    def __init__(
        self, spec: MemorySpec, *, device: torch.device | str = "cpu", capacity: int = 256,
        pages: int | None = None, offload: bool = False, cache_pages: int = 1024, two_level: bool = False,
        directory: Path | str | None = None,
    ):  # fmt: skip
        pages = spec.batch * capacity if pages is None else pages
        for name, value in (("capacity", capacity), ("pages", pages), ("cache_pages", cache_pages)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        self.spec, self.device, self.two_level = spec, torch.device(device), two_level
        self.options = {  # of another memory like this one
            "device": device, "capacity": capacity, "pages": pages, "offload": offload, "cache_pages": cache_pages,
            "two_level": two_level, "directory": directory,
        }  # fmt: skip
        if directory is not None and self.device.type != "cpu" and not offload:
            raise ValueError(f"directory must come with offload=True on {self.device}, got {directory}")
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.first_pages, self.first_chunks = pages, -(-capacity // BLOCK) * BLOCK
        self.cache = PageCache(spec.page, cache_pages, spec.dtype, self.device) if offload else None
        self.k_slabs: list[torch.Tensor] = []  # [pages, S, H, D]
        self.v_slabs: list[torch.Tensor] = []
        self.landmark_slabs: list[torch.Tensor] = []  # [B, chunks, R, E], one after the other along the sequences
        self.bound_slabs: list[torch.Tensor] = []  # [B, chunks / BLOCK, 2, R, E]
        self.held = [0] * spec.batch  # chunks
        self.counts = PageCounts()
        self.host_table = torch.full((spec.batch, self.first_chunks), -1, dtype=torch.int32)
        self.page_table = self.host_table.to(self.device, copy=True)
        self.chunks = torch.zeros(spec.batch, dtype=torch.int32, device=self.device)
        self._add_pages()
        self._add_landmarks()

    @property
    def nbytes(self) -> int:
        """Of keys, values and landmarks, with what is reserved."""
        return sum(x.nbytes for x in (*self.k_slabs, *self.v_slabs, *self.landmark_slabs, *self.bound_slabs))

    @property
    def pages(self) -> int:
        """Pages in use; one that sequences share counts once."""
        return self.counts.used

    @property
    def longest(self) -> int:
        """Chunks of the longest sequence."""
        return max(self.held)

    def _add_pages(self) -> None:
        n = max(self.first_pages, sum(map(len, self.k_slabs)))
        shape, dtype = (n, *self.spec.page), self.spec.dtype
        where = {"device": self.device}
        if self.cache is not None:
            where = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.directory is not None:
            k, v = (mapped(self.directory, shape, dtype) for _ in range(2))
        else:
            k, v = (torch.empty(shape, dtype=dtype, **where) for _ in range(2))
        self.k_slabs.append(k)
        self.v_slabs.append(v)

    def _add_landmarks(self) -> None:
        n, B = max(self.first_chunks, sum(x.shape[1] for x in self.landmark_slabs)), self.spec.batch
        make = {"dtype": self.spec.dtype, "device": self.device}
        self.landmark_slabs.append(torch.empty(B, n, *self.spec.landmark, **make))
        if self.two_level:
            bounds = torch.empty(B, n // BLOCK, 2, *self.spec.landmark, **make)
            bounds[:, :, 0], bounds[:, :, 1] = torch.inf, -torch.inf
            self.bound_slabs.append(bounds)
        missing = sum(x.shape[1] for x in self.landmark_slabs) - self.host_table.shape[1]
        if missing > 0:
            self.host_table = F.pad(self.host_table, (0, missing), value=-1)
            self.page_table = self.host_table.to(self.device, copy=True)

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
        S, H, D = self.spec.page
        C = landmarks.shape[0]
        for name, x, shape in (("landmarks", landmarks, (C, *self.spec.landmark)), ("k", k, None), ("v", v, None)):
            allowed = [shape] if shape else [(C, S, H, D), (C * S, H, D)]
            if tuple(x.shape) not in allowed:
                raise ValueError(f"{name} must have shape {list(allowed[0])}, got shape {list(x.shape)}")
            if x.dtype != self.spec.dtype:
                raise ValueError(f"{name} must have dtype {self.spec.dtype}, got {x.dtype}")
        pages, start = self.counts.take(C), self.held[sequence]
        while sum(map(len, self.k_slabs)) < len(self.counts.references):
            self._add_pages()
        while sum(x.shape[1] for x in self.landmark_slabs) < start + C:
            self._add_landmarks()
        for slabs, x in ((self.k_slabs, k), (self.v_slabs, v)):
            write_pages(slabs, pages, x.detach().reshape(C, S, H, D))
        rows = [x[sequence] for x in self.landmark_slabs]
        write_rows(rows, start, landmarks.detach())
        if self.two_level:
            self._widen(sequence, start, landmarks.detach().to(self.device))
        self._hold(sequence, start, torch.tensor(pages, dtype=torch.int32))

    def _check_sequence(self, name: str, sequence: int) -> None:
        if type(sequence) is not int or not 0 <= sequence < self.spec.batch:
            raise ValueError(f"{name} must be an int in [0, {self.spec.batch}), got {sequence!r}")

    def _hold(self, sequence: int, start: int, pages: torch.Tensor) -> None:
        """From chunk `start` on, the sequence holds these pages and no more."""
        self.held[sequence] = end = start + len(pages)
        self.host_table[sequence, start:] = -1
        self.host_table[sequence, start:end] = pages
        self.page_table[sequence, start:] = self.host_table[sequence, start:].to(self.device)
        self.chunks[sequence] = end

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
        freed = self.counts.release(self.host_table[sequence, chunks:held].tolist())
        if self.cache is not None:
            self.cache.forget(freed)
        self._hold(sequence, chunks, torch.empty(0, dtype=torch.int32))
        first = -(-chunks // BLOCK)  # block without a landmark; the bounds of one that keeps some stay wide
        for bounds in self.bound_slabs:
            bounds[sequence, max(0, first) :, 0], bounds[sequence, max(0, first) :, 1] = torch.inf, -torch.inf
            first -= bounds.shape[1]

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
        if self.held[target]:
            raise ValueError(f"target must be empty, `free` it first, got {self.held[target]} chunks")
        pages = self.host_table[source, : self.held[source]]
        self.counts.share(pages.tolist())
        for x in (*self.landmark_slabs, *self.bound_slabs):
            x[target] = x[source]
        self._hold(target, 0, pages)

    def _widen(self, sequence: int, start: int, landmarks: torch.Tensor) -> None:
        first = start // BLOCK * BLOCK
        padded = torch.cat([landmarks[:1].expand(start - first, -1, -1), landmarks])  # to the start of its block
        low, high = landmark_bounds(padded[None])[0].unbind(1)
        at = first // BLOCK
        for bounds in self.bound_slabs:
            n = bounds.shape[1]
            a, b = max(0, at), min(n, at + len(low))
            if a < b:
                mine = bounds[sequence, a:b]
                mine[:, 0] = torch.minimum(mine[:, 0], low[a - at : b - at])
                mine[:, 1] = torch.maximum(mine[:, 1], high[a - at : b - at])
            at -= n

    def retrieve(
        self, q_slc: torch.Tensor, lengths: torch.Tensor, topk: int, *, exclude_window: int = 0,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`hsa_tl.retrieve_decode` over the landmarks.

        Args:
            q_slc (Tensor [B, T, R, D_r]): retrieval queries.
            lengths (Tensor [B], int32): tokens of each sequence before these.
            topk, exclude_window, scale: as there.

        Returns:
            scores [B, T, R, K] and indices [B, T, R, K] int32.
        """
        S, start, parts = self.spec.chunk_size, 0, []
        for i, landmarks in enumerate(self.landmark_slabs):
            # Positions count from the slab's first token; visibility only knows differences.
            scores, indices = retrieve_decode(
                q_slc, landmarks, lengths - start * S if start else lengths, topk, chunk_size=S,
                exclude_window=exclude_window, scale=scale,
                chunks=(self.chunks - start).clamp(min=0) if start else self.chunks,
                bounds=self.bound_slabs[i] if self.two_level else None,
            )  # fmt: skip
            parts.append((scores, torch.where(indices >= 0, indices + start, -1) if start else indices))
            start += landmarks.shape[1]
        return merge(parts, topk)

    def retrieve_segment(
        self, sequence: int, q_slc: torch.Tensor, start: int, topk: int, *, exclude_window: int = 0,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """scores, indices [T, R, topk] for many tokens q_slc [T, R, E] of one sequence from position start on.

        The selection of hsa_tl.retrieve_chunks over the sequence's landmarks, in its bounded memory.
        """
        S, held, first, parts = self.spec.chunk_size, self.held[sequence], 0, []
        for landmarks in self.landmark_slabs:
            marks = landmarks[sequence, : max(0, held - first)]
            skip = min(len(q_slc), max(0, first * S - start))  # tokens before the slab see none of it
            found = retrieve_chunks(
                q_slc[None, skip:], marks[None], topk, chunk_size=S, q_start=max(0, start - first * S),
                exclude_window=exclude_window, scale=scale,
            )  # fmt: skip
            scores, indices = (F.pad(x[0], (0, 0, 0, 0, skip, 0), value=-1) for x in found)
            scores[:skip] = -torch.inf
            parts.append((scores, torch.where(indices >= 0, indices + first, -1)))
            first += landmarks.shape[1]
            if first >= held:
                break
        return merge(parts, topk)

    def attend(
        self, q: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, *, scale: float | None = None,
        impl: str = "auto", overlap: float = 0.9,
    ) -> torch.Tensor:  # fmt: skip
        """`hsa_tl.hsa_decode` over the chosen chunks.

        Args:
            q (Tensor [B, T, HQ, D]): queries.
            weights (Tensor [B, T, H or HQ, K], float32): of the slots.
            indices (Tensor [B, T, H, K], int32): chosen chunks.
            scale, impl: as there.
            overlap (float): as in a `ChunkMemory`; decoding shares no chunk between tokens. Default: 0.9.

        Returns:
            Tensor [B, T, HQ, D].
        """
        if self.cache is not None:
            return self._attend_offloaded(q, weights, indices, scale, impl)
        if len(self.k_slabs) == 1:
            k, v = self.k_slabs[0], self.v_slabs[0]
            return hsa_decode(q, k, v, weights, indices, self.page_table, scale=scale, impl=impl)
        page, out, first = self.pages_of(indices), 0, 0
        for k, v in zip(self.k_slabs, self.v_slabs, strict=True):
            elsewhere = (page >= 0) & ((page < first) | (page >= first + len(k)))
            part = torch.where(elsewhere, -1, indices)
            out = out + hsa_decode(q, k, v, weights, part, self.page_table - first, scale=scale, impl=impl)
            first += len(k)
        return out

    def pages_of(self, indices: torch.Tensor) -> torch.Tensor:
        """[B, T, H, K]: the page of each slot, -1 for an empty one."""
        at = indices.flatten(1).clamp(0, self.page_table.shape[1] - 1).long()
        page = self.page_table.gather(1, at).view(indices.shape)
        return torch.where((indices >= 0) & (indices < self.page_table.shape[1]), page, -1)

    def gather(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [M, S, H, D] of pages [M], on the device."""
        out = []
        for slabs in (self.k_slabs, self.v_slabs):
            at, first, x = pages.to(slabs[0].device), 0, slabs[0].new_empty(len(pages), *self.spec.page)
            for slab in slabs:
                here = ((at >= first) & (at < first + len(slab))).nonzero()[:, 0]
                x[here] = slab[at[here] - first]
                first += len(slab)
            out.append(x.to(self.device))
        return tuple(out)

    def prefetch(self, indices: torch.Tensor) -> None:
        """Starts to fetch the chosen pages of an offloaded memory, as many as the cache holds.

        Waits for the selection, not for the pages: what is launched until `attend` runs beside the copies.
        """
        if self.cache is not None:
            pages = self.pages_of(indices).unique().tolist()
            self.cache.fetch([p for p in pages if p >= 0][: self.cache.size], self.k_slabs, self.v_slabs)

    def _attend_offloaded(self, q, weights, indices, scale, impl):
        page = self.pages_of(indices)
        if self.device.type == "cpu" and bool(((page < 0) & (indices != -1)).any()):
            raise ValueError(f"indices must lie in [-1, chunks), the chunks that each sequence holds: {self.held}")
        named, inverse = page.unique(return_inverse=True)
        named, out = named.tolist(), None
        empty = int(bool(named) and named[0] < 0)
        for start in range(empty, max(len(named), empty + 1), self.cache.size):
            group = named[start : start + self.cache.size]
            slots = self.cache.fetch(group, self.k_slabs, self.v_slabs) or [0]
            self.cache.wait()
            table = torch.tensor(slots, dtype=torch.int32).to(self.device, non_blocking=True).expand(len(q), -1)
            mine = (inverse >= start) & (inverse < start + len(group))
            part = torch.where(mine, inverse - start, -1).int()
            y = hsa_decode(q, self.cache.k, self.cache.v, weights, part, table, scale=scale, impl=impl)
            out = y if out is None else out + y
        return out

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
            options: of the constructor; capacity and pages are at least what the file holds.

        Returns:
            PagedMemory

        Raises:
            ValueError: a file that is no memory, truncated, inconsistent or of another spec.
            OSError: it cannot be read.
        """
        with memory_file.read(Path(path)) as file:
            found = file.spec()
            if spec is not None and found != spec:
                raise ValueError(f"{path} must hold a memory of {spec}, got {found}")
            return memory_file.restore(file, found, cls, options)
