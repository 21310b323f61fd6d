"""A pretrained layer's attention at any length: window, sinks and chosen chunks of its own keys, in one softmax.

A token at position p sees the keys j of four disjoint sets:

    near    p - window < j <= p, with their rotary positions, as the layer was trained
    sinks   j < sinks, behind the window
    chosen  whole chunks of S tokens that lie behind the window: topk of them for each key/value head
    between the keys from the last of these chunks to the window, fewer than S

The keys behind the window have no positions, and the query stands at the distance `window` of them all, so that their
angles are those of training at any length. Chunks count from the first token behind the sinks.

Shape suffixes: B batch, T tokens, C channels, P past and new keys, N chunks, S chunk size, A query heads, H key/value
heads, G = A / H, D head dim, K selected chunks, M anchors, E = D + M.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl import (
    chunk_means,
    fusion_weights,
    merge_attention,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
)
from hsa_tl.model.attention import SelfAttention, positions, rotate, scores, softmax_product
from hsa_tl.model.budget import worst
from hsa_tl.model.chunk_memory import recency_share
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.hsa import RECENCY

FEW = 8  # tokens of a sequence that decode as one; more are a segment
BLOCK = {"cpu": 128}  # tokens that attend to their window at once: their scores should stay in a CPU's cache
BLOCK_ACCELERATOR = 512  # which wants fewer launches
SCORES = {"cpu": 1 << 18}  # of keys behind the window, held at once: as many as stay in a cache
SCORES_ACCELERATOR = 1 << 24


class Keys(NamedTuple):
    """Keys without positions and values [B, P, H, D], of what a cache holds also as chunks: landmarks [B, N, H, E],
    pages [B * N, S, H, D] and page_table [B, N]."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor | None = None
    k_pages: torch.Tensor | None = None
    v_pages: torch.Tensor | None = None
    page_table: torch.Tensor | None = None


class Landmarks(nn.Module):
    """What a chunk is chosen by without reading its keys: its mean key, and its mass at M anchors of each head.

    A query q gives a chunk the mass m(q), the log-sum-exp of q . k / sqrt(D) over its keys k. A head's queries are more
    alike than its keys are, so m is kept at queries u that the layer asked, and others take the mean of their
    neighbours': q . mean key / sqrt(D) + sum_i softmax_i(q . u_i / sqrt(D)) m(u_i), which is a dot product of E = D + M
    numbers. A key/value head adds up its query heads. exact: the key/value heads whose queries are too different for
    that, which choose by the mass itself. hsa_tl.model.landmarks finds both.
    """

    def __init__(self, kv_heads: int = 1, head_dim: int = 1, anchors: int = 0, exact: tuple[int, ...] = ()):
        super().__init__()
        self.exact = list(exact)
        self.anchors = nn.Parameter(torch.randn(kv_heads, anchors, head_dim)) if anchors else None

    def of(self, k_BPHD: torch.Tensor, chunk_size: int) -> torch.Tensor:
        """Landmarks [B, N, H, E] of keys without positions; of a short last chunk they are of its tokens."""
        means = chunk_means(k_BPHD, chunk_size)
        if self.anchors is None:
            return means
        score = torch.einsum("bphd,hmd->bphm", k_BPHD, self.anchors.to(k_BPHD.dtype)) / math.sqrt(k_BPHD.shape[-1])
        score = F.pad(score, (0, 0, 0, 0, 0, -k_BPHD.shape[1] % chunk_size), value=-torch.inf)
        return torch.cat([means, score.unflatten(1, (-1, chunk_size)).logsumexp(2)], -1)

    def ask(self, q_BTAD: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """What the landmarks are multiplied by: [B, T, H, E] of queries at their capped distance."""
        q = q_BTAD.unflatten(2, (kv_heads, -1)) / math.sqrt(q_BTAD.shape[-1])
        if self.anchors is None:
            return q.sum(3)
        near = torch.einsum("bthgd,hmd->bthgm", q, self.anchors.to(q.dtype)).softmax(-1)
        return torch.cat([q, near], -1).sum(3)


class OwnKeys:
    """Keys without positions and values of all tokens of each sequence, in pages of a chunk; see hsa_tl.model.cache.

    Of a sequence the first pages end with the sinks, so that every other page is a chunk.

    With a budget, `extend` first brings the chunks behind the window down to it. A chunk's worth is as in
    hsa_tl.model.budget. Since keys behind the window have no positions, what stays moves up, and the sequence is one
    that never had what went; `evicted` has the numbers of these chunks.
    """

    def __init__(
        self, counts: list[int], sinks: int, chunk_size: int, chooser: Landmarks | None, budget: int | None = None,
        reach: int = 0, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        """counts: tokens that each row of the segment holds; the owner updates it in place before `extend`. chooser:
        whose landmarks of the chunks are kept. reach: tokens of the window, and those that `crop` may take back.
        dtype: of what `restore` is given in another."""
        self.counts, self.sinks, self.chunk_size = counts, sinks, chunk_size
        self.first = -(-sinks // chunk_size)  # chunk, of pages
        self.before = self.first * chunk_size - sinks  # columns of no token
        self.held = [0] * len(counts)
        self.buffers: list[torch.Tensor] = []  # k and v [B, pages * S, H, D]
        self.chooser, self.landmarks = chooser, None  # [B, pages, H, E]
        self.budget, self.reach, self.dtype = budget, reach, dtype
        self.evicted: list[list[int]] = [[] for _ in counts]
        self.mass = torch.zeros(len(counts), 0, dtype=torch.float64)  # of the chunks that are held, as they lie

    def _reserve(self, columns: int, like: tuple[torch.Tensor, ...]) -> None:
        room = self.buffers[0].shape[1] if self.buffers else 0
        if columns <= room:
            return
        pages = -(-max(columns, 2 * room) // self.chunk_size)
        grown = [x.new_zeros(len(x), pages * self.chunk_size, *x.shape[2:]) for x in like]
        for new, old in zip(grown, self.buffers, strict=bool(self.buffers)):
            new[:, :room] = old
        self.buffers, self.mass = grown, F.pad(self.mass.to(like[0].device), (0, pages - self.mass.shape[1]))

    def extend(self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor) -> list[int]:
        """Stores the next tokens, and says how many of each row lie before them; a row's columns behind its count are
        written and overwritten later."""
        if self.budget is not None:
            for b in range(len(self.held)):
                self._evict(b)
        T, old = k_BTHD.shape[1], self.held
        self._reserve(self.before + max(old) + T, (k_BTHD, v_BTHD))
        for buffer, x in zip(self.buffers, (k_BTHD, v_BTHD), strict=True):
            for b, n in enumerate(old):
                buffer[b, self.before + n : self.before + n + T] = x[b]
        rows = [slice(None)] if len(set(old)) == 1 else [slice(b, b + 1) for b in range(len(old))]
        for row, n in zip(rows, old, strict=False):
            self._summarise(row, self.before + n, self.before + n + T)
        self.held = [n + more for n, more in zip(old, self.counts, strict=True)]
        return old

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
        stays = torch.ones(self.mass.shape[1], dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero()[:, 0].to(self.mass.device)
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
        weights = (weights / indices_BTHK.shape[2]).flatten(1).to(self.mass.dtype)
        self.mass[rows].scatter_add_(1, indices_BTHK.clamp(min=0).flatten(1).long(), weights)

    @torch.no_grad()
    def _summarise(self, rows: slice, start: int, stop: int) -> None:
        """Of the chunks that end in these columns: nobody asks for the landmark of others."""
        S = self.chunk_size
        first, last = start // S, stop // S
        if self.chooser is not None and first < last:
            new = self.chooser.of(self.buffers[0][rows, first * S : last * S], S)
            if self.landmarks is None or self.landmarks.shape[1] < last:
                grown = new.new_zeros(len(self.held), self.buffers[0].shape[1] // S, *new.shape[2:])
                if self.landmarks is not None:
                    grown[:, : self.landmarks.shape[1]] = self.landmarks
                self.landmarks = grown
            self.landmarks[rows, first:last] = new

    def keys(self, rows: slice, tokens: int) -> Keys:
        """Of these rows the first `tokens`."""
        k, v = (x[rows] for x in self.buffers)
        pages = [x.flatten(0, 1).unflatten(0, (-1, self.chunk_size)) for x in (k, v)]
        table = torch.arange(len(pages[0]), dtype=torch.int32, device=k.device).view(len(k), -1)[:, self.first :]
        landmarks = None if self.landmarks is None else self.landmarks[rows, self.first :]
        k, v = (x[:, self.before : self.before + tokens] for x in (k, v))
        return Keys(k, v, landmarks, *pages, table)

    def crop(self, gone: list[int]) -> None:
        """Takes back the last so many tokens of each sequence."""
        self.held = [n - g for n, g in zip(self.held, gone, strict=True)]
        for b, n in enumerate(self.held):
            self.mass[b, max(0, n - self.sinks) // self.chunk_size :] = 0

    def state(self) -> list[torch.Tensor]:
        """What `restore` takes: how much each sequence holds, keys and values, and with a budget mass and evicted."""
        used = slice(self.before, self.before + max(self.held))
        gone = [torch.tensor(x, dtype=torch.int32) for x in self.evicted]
        gone = torch.nn.utils.rnn.pad_sequence(gone, batch_first=True, padding_value=-1)
        more = [] if self.budget is None or not self.buffers else [self.mass, gone]
        return [torch.tensor(self.held, dtype=torch.int32), *(x[:, used] for x in self.buffers), *more]

    def restore(self, held: torch.Tensor, *buffers: torch.Tensor) -> None:
        self.held, self.buffers, self.landmarks = held.tolist(), [], None
        if len(buffers) > 2:
            *buffers, self.mass, gone = buffers
            self.evicted = [x[x >= 0].tolist() for x in gone]
        if buffers:
            end = self.before + max(self.held)
            self._reserve(end, tuple(x.to(self.dtype) for x in buffers))
            for mine, x in zip(self.buffers, buffers, strict=True):
                mine[:, self.before : end] = x
            self._summarise(slice(None), self.before, end)


MEAN_KEYS = Landmarks()


def chooser_of(selection: str, learned: Landmarks | None = None) -> Landmarks | None:
    """For Rule.attend, of ModelConfig's selection."""
    return {"mass": None, "mean": MEAN_KEYS, "landmark": learned}[selection]


@dataclass(frozen=True)
class Rule:
    """What a token sees, see the top of this file.

    topk: chunks, 0 for none, "all" for every one. How they are chosen: see `attend`. theta: of `rotate`, None for no
    positions. impl: of the operators. bias: added to the scores of keys in chosen chunks. recency: chunks from which on
    one loses RECENCY of the score by which it is chosen, nearer ones less, as in `retrieve_chunks`; None for none.
    """

    window: int
    sinks: int = 0
    chunk_size: int = 64
    topk: int | str = 16
    theta: float | tuple[float, ...] | None = None
    impl: str = "auto"
    bias: float = 0.0
    recency: int | None = None

    @classmethod
    def of(cls, c: ModelConfig, layer: int) -> "Rule":
        theta = (c.rope_frequencies or c.rope_theta) if "selected" in c.rope else None
        topk, impl = c.topk if c.chooses(layer) else 0, "auto" if c.impl == "dense" else c.impl
        return cls(c.window, c.sinks, c.chunk_size, topk, theta, impl, c.chunk_bias, c.recency)

    def attend(
        self, q_BTAD: torch.Tensor, keys: Keys, chooser: Landmarks | None = None, count: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B, T, A, D] and log-sum-exp [B, T, A] of queries without positions; the last one's key is the last.

        chooser: of the chunks. None: those of the largest mass at any query head of the key/value head, which costs all
        of attention's products with keys. count: takes the scores and indices [B, T, H, K] of what is chosen.
        """
        T, W, S = q_BTAD.shape[1], self.window, self.chunk_size
        start = keys.k.shape[1] - T
        q_cap = rotate(q_BTAD, torch.tensor([W], device=q_BTAD.device), self.theta)
        n = BLOCK.get(q_BTAD.device.type, BLOCK_ACCELERATOR)
        blocks = [self._near(q_BTAD[:, a : a + n], q_cap[:, a : a + n], keys, start + a) for a in range(0, T, n)]
        near = [torch.cat(x, 1) for x in zip(*blocks, strict=True)]
        # Whole and behind the window: what a token so many positions earlier would see of its whole past.
        past = start + 1 - W - self.sinks
        skip = max(0, S - past)  # tokens that see no chunk
        if self.topk == 0 or skip >= T:
            return tuple(near)
        far, lse = self._far(q_cap[:, skip:], keys, past + skip, chooser, count)
        both = merge_attention([x[:, skip:] for x in near], (far, lse + self.bias))
        return tuple(torch.cat([x[:, :skip], y], 1) for x, y in zip(near, both, strict=True))

    def _near(self, q_BTAD, q_cap, keys: Keys, start: int):
        """Attention to all keys but the whole chunks behind the window; start: position of the first query."""
        W, S, sinks, last = self.window, self.chunk_size, self.sinks, start + q_BTAD.shape[1]
        low = min(last, sinks + max(0, start + 1 - W - sinks) // S * S)
        k, v = (torch.cat([x[:, : min(sinks, low)], x[:, low:last]], 1) for x in keys[:2])
        j = torch.cat([torch.arange(min(sinks, low)), torch.arange(low, last)]).to(k.device)
        i = torch.arange(start, last, device=k.device)[:, None]
        behind = j <= i - W
        chunks = sinks + (i + 1 - W - sinks).clamp(min=0) // S * S  # where they end
        hidden = (j > i) | ((j >= sinks) & (j < chunks))
        score = scores(rotate(q_BTAD, i[:, 0], self.theta), rotate(k, j, self.theta))
        if (n := len(j) - W) > 0:  # keys, the first ones, that the last query sees behind its window
            score[..., :n] = torch.where(behind[:, :n], scores(q_cap, k[:, :n]), score[..., :n])
        return softmax_product(score.masked_fill(hidden, -torch.inf), v)

    def _far(self, q_BTAD, keys: Keys, past: int, chooser: Landmarks | None, count: Callable | None):
        """Attention to chosen chunks, of which token t sees the first (past + t) // S."""
        T, S = q_BTAD.shape[1], self.chunk_size
        N = (past + T - 1) // S
        k, v = (x[:, self.sinks : self.sinks + N * S] for x in keys[:2])
        with torch.no_grad():
            found, indices = self._choose(q_BTAD, k, keys.landmarks, past, N, chooser, count is not None)
            if count is not None:
                count(found, indices)
        if keys.k_pages is not None and T <= FEW:
            return selected_decode(q_BTAD, keys.k_pages, keys.v_pages, indices, keys.page_table, impl=self.impl)
        return selected_attention(q_BTAD, k, v, indices, chunk_size=S, impl=self.impl)

    def _choose(
        self, q_BTAD, k, landmarks, past: int, N: int, chooser: Landmarks | None, scored: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """scores, None where all chunks are chosen unless `scored`, and indices [B, T, H, K]."""
        (B, T, A, _), H, S = q_BTAD.shape, k.shape[2], self.chunk_size
        K = N if self.topk == "all" else min(self.topk, N)
        if (K < N or scored) and chooser is not None:
            landmarks = chooser.of(k, S) if landmarks is None else landmarks[:, :N]
            asked = chooser.ask(q_BTAD, H)
            options = {"chunk_size": S, "impl": self.impl, "scale": H / A}  # the mean of its query heads
            if self.recency is not None:
                options |= {"recency": q_BTAD.new_full((H,), RECENCY).float(), "recency_span": self.recency}
            if T <= FEW:
                lengths = torch.full((B,), past, dtype=torch.int32, device=k.device)
                best, indices = retrieve_decode(asked, landmarks, lengths, K, **options)
            else:
                best, indices = retrieve_chunks(asked, landmarks, K, q_start=past, **options)
            for h in chooser.exact:  # each apart: a list of heads would copy all keys
                own = q_BTAD[:, :, h * A // H : (h + 1) * A // H]
                found = self._choose(own, k[:, :, h : h + 1], None, past, N, None, True)
                best[:, :, h : h + 1], indices[:, :, h : h + 1] = found[0].to(best.dtype), found[1]
            return best, indices
        visible = (positions(past, q_BTAD) // S)[:, None, None]
        every = torch.arange(N, dtype=torch.int32, device=k.device)
        if K == N and not scored:
            return None, torch.where(every < visible, every, -1).expand(B, T, H, N)
        n, size = BLOCK.get(k.device.type, BLOCK_ACCELERATOR), SCORES.get(k.device.type, SCORES_ACCELERATOR)
        step = max(1, size // (B * A * min(n, T) * S))
        parts = []
        for a in range(0, T, n):
            q, seen = q_BTAD[:, a : a + n], visible[a : a + n]
            most = int(seen[-1])  # none of the block sees more
            tiles = (k[:, c * S : min(c + step, most) * S] for c in range(0, most, step))
            masses = [scores(q, tile).unflatten(-1, (-1, S)).logsumexp(-1).amax(2) for tile in tiles]
            mass = torch.cat(masses, -1).transpose(1, 2)  # [B, T, H, most]
            if self.recency is not None:
                mass = mass - RECENCY * recency_share(seen - 1 - every[:most], self.recency, mass.dtype)
            best, index = mass.masked_fill(every[:most] >= seen, -torch.inf).topk(min(K, most), -1)
            index = torch.where(best == -torch.inf, -1, index).int()
            more = (0, K - index.shape[-1])
            parts.append((F.pad(best, more, value=-torch.inf), F.pad(index, more, value=-1)))
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


class SelectedAttention(SelfAttention):
    """SelfAttention by a Rule. start: position of x's first token, with a cache, an OwnKeys, also int32 [B]."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, rule: Rule, selection: str, anchors: int = 0,
        exact: tuple[int, ...] = (), **options,
    ):  # fmt: skip
        """selection: see ModelConfig. anchors, exact: of its Landmarks. options: of SelfAttention, but window and
        rope_theta: it projects without positions."""
        super().__init__(dim, heads, kv_heads, head_dim, window=rule.window, **options)
        self.rule, self.selection = rule, selection
        self.landmarks = Landmarks(kv_heads, head_dim, anchors, exact)

    @property
    def chooser(self) -> Landmarks | None:
        return chooser_of(self.selection, self.landmarks) if self.rule.topk else None

    def attend(
        self, x_BTC: torch.Tensor, start: int | torch.Tensor = 0, cache: OwnKeys | None = None,
        first_v_BTHD: torch.Tensor | None = None, with_lse: bool = False, keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """As SelfAttention's."""
        q, k, v, _ = self.project(x_BTC, start, keep, first_v_BTHD)
        if cache is None:
            return *self.rule.attend(q, Keys(k, v), self.chooser), v
        starts, T = cache.extend(k, v), x_BTC.shape[1]
        rows = [slice(None)] if len(set(starts)) == 1 else [slice(b, b + 1) for b in range(len(q))]
        parts = [
            self.rule.attend(
                q[row], cache.keys(row, n + T), self.chooser,
                None if cache.budget is None else partial(cache.count, row, T),
            )
            for row, n in zip(rows, starts[: len(rows)], strict=True)
        ]  # fmt: skip
        return *(torch.cat(x) for x in zip(*parts, strict=True)), v
