"""A small cache on the device for pages of keys and values that lie in host memory: least recently used out first."""

from collections import OrderedDict

import torch


class PageCache:
    """`size` pages on the device. A stored page never changes until it is given back, and then `forget` is told."""

    def __init__(self, page: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device):
        self.size = size
        self.k, self.v = (torch.empty(size, *page, dtype=dtype, device=device) for _ in range(2))
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # page -> slot, least recently used first
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.hits = self.misses = 0

    def fetch(self, pages: list[int], k_slabs: list[torch.Tensor], v_slabs: list[torch.Tensor]) -> list[int]:
        """Slots of at most `size` distinct pages; starts to copy those that are missing from the slabs.

        On a GPU the copies run on a stream of their own: `wait` before reading the slots.
        """
        assert len(pages) <= self.size
        missing = []
        for page in pages:
            if page in self.slot_of:
                self.slot_of.move_to_end(page)
            else:
                missing.append(page)
        self.hits, self.misses = self.hits + len(pages) - len(missing), self.misses + len(missing)
        if self.stream is None:
            self._copy(missing, k_slabs, v_slabs)
        elif missing:
            # What is running may still read the pages that go.
            self.stream.wait_stream(torch.cuda.current_stream(self.k.device))
            with torch.cuda.stream(self.stream):
                self._copy(missing, k_slabs, v_slabs)
        return [self.slot_of[page] for page in pages]

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

    def _copy(self, pages: list[int], k_slabs: list[torch.Tensor], v_slabs: list[torch.Tensor]) -> None:
        for page in pages:
            # All pages of the call that were here are the most recent: none of them goes.
            full = len(self.slot_of) == self.size
            slot = self.slot_of.popitem(last=False)[1] if full else len(self.slot_of)
            self.slot_of[page] = slot
            at = page
            for k, v in zip(k_slabs, v_slabs, strict=True):
                if at < len(k):
                    self.k[slot].copy_(k[at], non_blocking=True)
                    self.v[slot].copy_(v[at], non_blocking=True)
                    break
                at -= len(k)
