"""Keys and values that a layer of attention "selected" keeps, in pages of a chunk; see hsa_tl.model.selected.

Shape suffixes: as in hsa_tl.model.hsa; E numbers of a landmark.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from hsa_tl import fusion_weights
from hsa_tl.model.attention import rotate
from hsa_tl.model.budget import worst


class Keys(NamedTuple):
    """Keys at pace times their positions and values [B, P, H, D], of what a cache holds also as chunks: landmarks
    [B, N, H, E], pages [B * N, S, H, D] and page_table [B, N]. gone: tokens that the cache evicted, by which the last
    keys' positions exceed their places."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor | None = None
    k_pages: torch.Tensor | None = None
    v_pages: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    pace: float = 0.0
    gone: int = 0


class OwnKeys:
    """Keys and values of all tokens of each sequence; see hsa_tl.model.cache.

    Of a sequence the first pages end with the sinks, so that every other page is a chunk. Its keys stand at `pace`
    times their positions, which `keys` changes where a token wants another.

    With a budget, `extend` first brings the chunks behind the window down to it. A chunk's worth is as in
    hsa_tl.model.budget. What stays moves up, and keeps its positions; `evicted` has the numbers of what went.
    """

    def __init__(
        self, counts: list[int], rule, chooser, budget: int | None = None, undo: int = 0,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        """counts: tokens that each row of the segment holds; the owner updates it in place before `extend`. rule,
        chooser: a Rule, and whose landmarks of the chunks are kept. undo: tokens that `crop` may take back. dtype: of
        what `restore` is given in another."""
        self.counts, self.sinks, self.chunk_size, self.theta = counts, rule.sinks, rule.chunk_size, rule.theta
        self.first = -(-self.sinks // self.chunk_size)  # chunk, of pages
        self.before = self.first * self.chunk_size - self.sinks  # columns of no token
        self.pace = [0.0] * len(counts)
        self.held = [0] * len(counts)
        self.buffers: list[torch.Tensor] = []  # k and v [B, pages * S, H, D]
        self.chooser, self.landmarks = chooser, None  # [B, pages, H, E]
        self.budget, self.reach, self.dtype = budget, rule.window + undo, dtype
        self.evicted: list[list[int]] = [[] for _ in counts]
        self.mass = torch.zeros(len(counts), 0, dtype=torch.float64)  # of the chunks that are held, as they lie

    def _reserve(self, columns: int, like: tuple[torch.Tensor, ...]) -> None:
        old = self.buffers or [x[:, :0] for x in like]
        if columns > (room := old[0].shape[1]):
            pages = -(-max(columns, 2 * room) // self.chunk_size)
            self.buffers = [F.pad(x, (0, 0, 0, 0, 0, pages * self.chunk_size - room)) for x in old]
            self.mass = F.pad(self.mass.to(like[0].device), (0, pages - self.mass.shape[1]))

    def extend(self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor) -> list[tuple[int, int]]:
        """Stores the next tokens, and says how many of each row are held before them, and how many have gone; a row's
        columns behind its count are written and overwritten later."""
        if self.budget is not None:
            for b in range(len(self.held)):
                self._evict(b)
        T, old = k_BTHD.shape[1], self.held
        self._reserve(self.before + max(old) + T, (k_BTHD, v_BTHD))
        k_BTHD = self._turned(k_BTHD, slice(None), [self.before + n for n in old], self.pace)
        for buffer, x in zip(self.buffers, (k_BTHD, v_BTHD), strict=True):
            for b, n in enumerate(old):
                buffer[b, self.before + n : self.before + n + T] = x[b]
        rows = [slice(None)] if len(set(old)) == 1 else [slice(b, b + 1) for b in range(len(old))]
        for row, n in zip(rows, old, strict=False):
            self._summarise(row, self.before + n, self.before + n + T)
        self.held = [n + more for n, more in zip(old, self.counts, strict=True)]
        return [(n, self.gone(b)) for b, n in enumerate(old)]

    def gone(self, sequence: int) -> int:
        """Tokens of the evicted chunks."""
        return self.chunk_size * len(self.evicted[sequence])

    def _positions(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        """Of the tokens in these columns of the buffers."""
        place, evicted = torch.arange(start, stop) - self.before, self.evicted[sequence]
        chunk = (place - self.sinks).div(self.chunk_size, rounding_mode="floor")
        if not evicted or chunk[0] > evicted[-1] - len(evicted):  # all of them lay before, as for new tokens
            return place + self.gone(sequence)
        # The i-th that is still here has as many gone before it as evicted[j] - j <= i says.
        before = torch.tensor(evicted) - torch.arange(len(evicted))
        return place + self.chunk_size * torch.searchsorted(before, chunk, right=True)

    def _turned(self, k_BTHD: torch.Tensor, rows: slice, starts: list[int], by: list[float]) -> torch.Tensor:
        """Keys of these rows in the columns from `starts` on, turned on by so many times their positions."""
        if not any(by):
            return k_BTHD
        T, sequences = k_BTHD.shape[1], range(len(self.held))[rows]
        at = [x * self._positions(b, a, a + T).double() for b, a, x in zip(sequences, starts, by, strict=True)]
        return rotate(k_BTHD, torch.stack(at).to(k_BTHD.device), self.theta)

    def _without_positions(self, rows: slice, k_BTHD: torch.Tensor, start: int) -> torch.Tensor:
        """Keys of these rows in the columns from start on."""
        return self._turned(k_BTHD, rows, [start] * len(k_BTHD), [-x for x in self.pace[rows]])

    def _behind(self, sequence: int) -> int:
        """How many chunks are held behind the window."""
        return max(0, self.held[sequence] - self.sinks - self.reach) // self.chunk_size

    def _numbers(self, sequence: int) -> list[int]:
        """Of these chunks, in their order."""
        return sorted(set(range(self._behind(sequence) + len(self.evicted[sequence]))) - set(self.evicted[sequence]))

    def _evict(self, sequence: int) -> None:
        if (excess := self._behind(sequence) - self.budget) <= 0:
            return
        numbers, S = torch.tensor(self._numbers(sequence)), self.chunk_size
        gone = worst(self.mass[sequence, : len(numbers)].cpu(), numbers[-1] - numbers, excess)
        self.evicted[sequence] = sorted(self.evicted[sequence] + numbers[gone].tolist())
        kept = (~torch.isin(torch.arange(self.mass.shape[1]), gone)).nonzero()[:, 0].to(self.mass.device)
        self.held[sequence] -= S * len(gone)
        pages = [x[sequence].unflatten(0, (-1, S)) for x in self.buffers]
        for x in (*pages, *(() if self.landmarks is None else (self.landmarks[sequence],))):
            at = kept[kept < len(x) - self.first]
            x[self.first : self.first + len(at)] = x[self.first + at]
        self.mass[sequence] = F.pad(self.mass[sequence, kept], (0, len(gone)))

    def pin(self, sequence: int, chunks: list[int]) -> None:
        """Keeps these chunks behind the window whatever the budget. ValueError: a chunk that is not held there."""
        numbers = self._numbers(sequence)
        for chunk in chunks:
            if self.budget is None or chunk not in numbers:
                why = "evicted" if chunk in self.evicted[sequence] else "does not hold behind its window with a budget"
                raise ValueError(f"chunks must be such as sequence {sequence} holds, got {chunk}, which it {why}")
        self.mass[sequence, [numbers.index(chunk) for chunk in chunks]] = torch.inf

    def count(self, rows: slice, tokens: int, scores_BTHK: torch.Tensor, indices_BTHK: torch.Tensor) -> None:
        """Adds to the mass of the chunks that these rows chose: the last of `tokens`, some of which may be padding."""
        T = indices_BTHK.shape[1]
        real = torch.arange(tokens - T, tokens)[:, None, None] < torch.tensor(self.counts[rows])[:, None, None, None]
        weights = fusion_weights(scores_BTHK.masked_fill(indices_BTHK < 0, -torch.inf)) * real.to(scores_BTHK.device)
        weights = (weights / indices_BTHK.shape[2]).flatten(1).to(self.mass.dtype).nan_to_num(0)
        self.mass[rows].scatter_add_(1, indices_BTHK.clamp(min=0).flatten(1).long(), weights)

    @torch.no_grad()
    def _summarise(self, rows: slice, start: int, stop: int) -> None:
        """Of the chunks that end in these columns: nobody asks for the landmark of others."""
        S = self.chunk_size
        first, last = start // S, stop // S
        if self.chooser is not None and first < last:
            own = self.buffers[0][rows, first * S : last * S]
            new = self.chooser.of(self._without_positions(rows, own, first * S), S)
            if self.landmarks is None:
                self.landmarks = new.new_zeros(len(self.held), 0, *new.shape[2:])
            if (room := self.landmarks.shape[1]) < last:
                self.landmarks = F.pad(self.landmarks, (0, 0, 0, 0, 0, self.buffers[0].shape[1] // S - room))
            self.landmarks[rows, first:last] = new

    def keys(self, rows: slice, tokens: int, pace: float = 0.0) -> Keys:
        """Of these rows, which evicted as many chunks, the first `tokens`, from now on at this pace."""
        k, v = (x[rows] for x in self.buffers)
        sequences = range(len(self.held))[rows]
        if any(by := [pace - self.pace[b] for b in sequences]):
            k[:] = self._turned(k, rows, [0] * len(k), by)
            self.pace[rows] = [pace] * len(k)
        pages = [x.flatten(0, 1).unflatten(0, (-1, self.chunk_size)) for x in (k, v)]
        table = torch.arange(len(pages[0]), dtype=torch.int32, device=k.device).view(len(k), -1)[:, self.first :]
        landmarks = None if self.landmarks is None else self.landmarks[rows, self.first :]
        k, v = (x[:, self.before : self.before + tokens] for x in (k, v))
        return Keys(k, v, landmarks, *pages, table, pace, self.gone(sequences[0]))

    def crop(self, gone: list[int]) -> None:
        """Takes back the last so many tokens of each sequence."""
        self.held = [n - g for n, g in zip(self.held, gone, strict=True)]
        for b, n in enumerate(self.held):
            self.mass[b, max(0, n - self.sinks) // self.chunk_size :] = 0

    def state(self) -> list[torch.Tensor]:
        """What `restore` takes: how much each sequence holds, keys without positions and values, and with a budget mass
        and evicted."""
        used = slice(self.before, self.before + max(self.held))
        gone = [torch.tensor(x, dtype=torch.int32) for x in self.evicted]
        gone = torch.nn.utils.rnn.pad_sequence(gone, batch_first=True, padding_value=-1)
        more = [] if self.budget is None else [self.mass, gone]
        held = torch.tensor(self.held, dtype=torch.int32)
        if not self.buffers:
            return [held]
        k, v = (x[:, used] for x in self.buffers)
        return [held, self._without_positions(slice(None), k, used.start), v, *more]

    def restore(self, held: torch.Tensor, *buffers: torch.Tensor) -> None:
        self.held, self.buffers, self.landmarks = held.tolist(), [], None
        self.pace = [0.0] * len(self.held)
        if len(buffers) > 2:
            *buffers, self.mass, gone = buffers
            self.evicted = [x[x >= 0].tolist() for x in gone]
        if max(self.held):
            end = self.before + max(self.held)
            self._reserve(end, tuple(x.to(self.dtype) for x in buffers))
            for mine, x in zip(self.buffers, buffers, strict=True):
                mine[:, self.before : end] = x
            self._summarise(slice(None), self.before, end)
