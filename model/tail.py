"""What a cache keeps of the tokens before a segment: the last so many of each sequence, or all, ready to be extended.

Shape suffixes: B sequences, T tokens of a segment, P past and new tokens. A segment is padded on the right: row b holds
counts[b] tokens of its sequence.
"""

import torch


def take_rows(x: torch.Tensor, first: list[int], n: int) -> torch.Tensor:
    """x[b, first[b] : first[b] + n] of x [B, P, ...]; columns outside x repeat its first or last one."""
    if len(set(first)) == 1 and 0 <= first[0] <= x.shape[1] - n:
        return x[:, first[0] : first[0] + n]
    column = torch.tensor(first, device=x.device)[:, None] + torch.arange(n, device=x.device)
    return x[torch.arange(len(x), device=x.device)[:, None], column.clamp(0, x.shape[1] - 1)]


class Tail:
    """The last `keep` tokens of each sequence (None: all) of one or more tensors [B, T, ...]; see KeyCache.

    `undo` more are held, which `crop` can take back. Tokens of a sequence end at the same column in every row. Buffers
    double when they are full, and move when a segment was ragged, so that the work for a token is constant either way.
    """

    def __init__(self, counts: list[int], keep: int | None = None, undo: int = 0):
        """counts: tokens that each row of the segment holds; the owner updates it in place before `extend`."""
        self.counts, self.keep, self.undo = counts, keep, undo
        self.clear()

    def clear(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.end = 0  # of the columns that are in use
        self.held, self.shift = [0] * len(self.counts), [0] * len(self.counts)  # of each row; columns of no meaning

    def extend(self, *new: torch.Tensor) -> tuple:
        """Views [B, P, ...] of what was held and the new [B, T, ...]; how many before the new are real, see KeyCache.

        The views hold until the next call.
        """
        T = new[0].shape[1]
        counts = [min(n, T) for n in self.counts]  # a layer may leave out tokens that no later one reads
        before = max(self.held)
        if not self.buffers or self.end + T > self.buffers[0].shape[1] or any(self.shift):
            old = self._held(before)
            self.buffers, self.end = [x.new_empty(x.shape[0], 2 * (before + T), *x.shape[2:]) for x in new], before
            for buffer, x in zip(self.buffers, old, strict=bool(old)):
                buffer[:, :before] = x
        seen = before if self.keep is None else min(before, self.keep)
        begin, self.end = self.end - seen, self.end + T
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, self.end - T : self.end] = x
        past = None
        if min(self.held) < seen:
            past = torch.tensor([min(n, seen) for n in self.held], dtype=torch.int32, device=new[0].device)
        held = [n + more for n, more in zip(self.held, counts, strict=True)]
        self.held = held if self.keep is None else [min(n, self.keep + self.undo) for n in held]
        self.shift = [T - n for n in counts]
        return *(buffer[:, begin : self.end] for buffer in self.buffers), past

    def crop(self, gone: list[int]) -> None:
        """Takes back the last so many tokens of each sequence."""
        self.held = [n - g for n, g in zip(self.held, gone, strict=True)]
        self.shift = [n + g for n, g in zip(self.shift, gone, strict=True)]

    def _held(self, n: int) -> list[torch.Tensor]:
        first = [self.end - n - shift for shift in self.shift]
        return [take_rows(x[:, : self.end], first, n) for x in self.buffers]

    def state(self) -> list[torch.Tensor]:
        """What `restore` takes: how much each sequence holds, and the tensors [B, held, ...]."""
        return [torch.tensor(self.held, dtype=torch.int32), *self._held(max(self.held))]

    def restore(self, held: torch.Tensor, *buffers: torch.Tensor) -> None:
        self.clear()
        self.held, self.buffers = held.tolist(), list(buffers)
        self.end = max(self.held)
