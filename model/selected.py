"""A pretrained layer's attention at any length: window, sinks and chosen chunks of its own keys, in one softmax.

A token at position p sees the keys j of four disjoint sets:

    near    p - window < j <= p, with their rotary positions, as the layer was trained
    sinks   j < sinks, behind the window
    chosen  whole chunks of S tokens that lie behind the window: topk of them for each key/value head
    between the keys from the last of these chunks to the window, fewer than S

Key j behind the window stands at the distance window + pace * (p - window - j): the past is squeezed into
`far_positions`, so that no distance is beyond training. pace is 1 for so many first tokens, and halves where p reaches
this number, twice it and so on. 0 of them: pace 0, all stand at the distance of the window. Landmarks compare as if
pace were 0, so that they are of a chunk's keys alone. Chunks count from the first token behind the sinks.

Shape suffixes: as in hsa_tl.model.hsa; M anchors, E = D + M.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl import (
    chunk_means,
    merge_attention,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
)
from hsa_tl.model.attention import SelfAttention, positions, rotate, scores, softmax_product
from hsa_tl.model.chunk_memory import FEW, recency_share
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.hsa import RECENCY
from hsa_tl.model.own_keys import Keys, OwnKeys

BLOCK = {"cpu": 128}  # tokens that attend to their window at once: their scores should stay in a CPU's cache
BLOCK_ACCELERATOR = 512  # which wants fewer launches
SCORES = {"cpu": 1 << 18}  # of keys behind the window, held at once: as many as stay in a cache
SCORES_ACCELERATOR = 1 << 24


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
        anchors = (self.anchors / math.sqrt(k_BPHD.shape[-1])).to(k_BPHD.dtype)  # first: float16 would not hold more
        score = torch.einsum("bphd,hmd->bphm", k_BPHD, anchors)
        score = F.pad(score, (0, 0, 0, 0, 0, -k_BPHD.shape[1] % chunk_size), value=-torch.inf)
        return torch.cat([means, score.unflatten(1, (-1, chunk_size)).logsumexp(2)], -1)

    def ask(self, q_BTAD: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """What the landmarks are multiplied by: [B, T, H, E] of queries at their capped distance."""
        q = q_BTAD.unflatten(2, (kv_heads, -1)) / math.sqrt(q_BTAD.shape[-1])
        if self.anchors is None:
            return q.sum(3)
        near = torch.einsum("bthgd,hmd->bthgm", q, self.anchors.to(q.dtype)).softmax(-1)
        return torch.cat([q, near], -1).sum(3)


MEAN_KEYS = Landmarks()


def chooser_of(selection: str, learned: Landmarks | None = None) -> Landmarks | None:
    """For Rule.attend, of ModelConfig's selection."""
    return {"mass": None, "mean": MEAN_KEYS, "landmark": learned}[selection]


@dataclass(frozen=True)
class Rule:
    """What a token sees, see the top of this file.

    topk: chunks, 0 for none, "all" for every one. How they are chosen: see `attend`. theta: of `rotate`, None for no
    positions. far_positions: see the top. impl: of the operators. recency: chunks from which on one loses RECENCY of
    the score by which it is chosen, nearer ones less, as in `retrieve_chunks`; None for none.
    """

    window: int
    sinks: int = 0
    chunk_size: int = 64
    topk: int | str = 16
    theta: float | tuple[float, ...] | None = None
    far_positions: int = 0
    impl: str = "auto"
    recency: int | None = None

    @classmethod
    def of(cls, c: ModelConfig, layer: int) -> "Rule":
        theta = (c.rope_frequencies or c.rope_theta) if "selected" in c.rope else None
        topk, impl = c.topk if c.chooses(layer) else 0, "auto" if c.impl == "dense" else c.impl
        return cls(c.window, c.sinks, c.chunk_size, topk, theta, c.far_positions, impl, c.recency)

    def paces(self, start: int, T: int) -> Iterator[tuple[int, int, float]]:
        """Tokens [a, b) of T, of which the first has position start, that have the same pace; and their pace."""
        a, b, pace = 0, T, 0.0
        while a < T:
            if self.far_positions:
                halved = ((start + a) // self.far_positions).bit_length()
                b, pace = min(T, (self.far_positions << halved) - start), 2.0**-halved
            yield a, b, pace
            a = b

    def read(
        self, q_BTAD: torch.Tensor, first: int, keys: Callable[[int, float], Keys], chooser: Landmarks | None = None,
        count: Callable | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """As `attend`, of queries of which the first has this position.

        keys: gives those of all tokens before the n-th of these, at a pace. count: takes n before what `attend` gives.
        """
        parts = []
        for a, b, pace in self.paces(first, q_BTAD.shape[1]):
            told = None if count is None else partial(count, b)
            parts.append(self.attend(q_BTAD[:, a:b], keys(b, pace), chooser, told))
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))

    def read_whole(self, q_BTAD, k_BPHD, v_BPHD, chooser: Landmarks | None = None, own: float = 0.0):
        """`read` of the last queries of a sequence, whose keys from the first one on have the pace `own`."""
        first, position = k_BPHD.shape[1] - q_BTAD.shape[1], positions(0, k_BPHD).double()

        def keys(n: int, pace: float) -> Keys:
            k = k_BPHD[:, : first + n]
            k = k if pace == own else rotate(k, (pace - own) * position[: first + n], self.theta)
            return Keys(k, v_BPHD[:, : first + n], pace=pace)

        return self.read(q_BTAD, first, keys, chooser)

    def attend(
        self, q_BTAD: torch.Tensor, keys: Keys, chooser: Landmarks | None = None, count: Callable | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out [B, T, A, D] and log-sum-exp [B, T, A] of queries without positions, which have the pace of the keys; the
        last one's key is the last.

        chooser: of the chunks. None: those of the largest mass at any query head of the key/value head, which costs all
        of attention's products with keys. count: takes the scores and indices [B, T, H, K] of what is chosen.
        """
        T, W, S = q_BTAD.shape[1], self.window, self.chunk_size
        start = keys.k.shape[1] - T
        at = keys.pace * positions(start + keys.gone, q_BTAD).double() + (1 - keys.pace) * W
        q_far = rotate(q_BTAD, at if keys.pace else at[:1], self.theta)
        n = BLOCK.get(q_BTAD.device.type, BLOCK_ACCELERATOR)
        blocks = [self._near(q_BTAD[:, a : a + n], q_far[:, a : a + n], keys, start + a) for a in range(0, T, n)]
        near = [torch.cat(x, 1) for x in zip(*blocks, strict=True)]
        # Whole and behind the window: what a token so many positions earlier would see of its whole past.
        past = start + 1 - W - self.sinks
        skip = max(0, S - past)  # tokens that see no chunk
        if self.topk == 0 or skip >= T:
            return tuple(near)
        far, lse = self._far(q_BTAD[:, skip:], q_far[:, skip:], keys, past + skip, chooser, count)
        both = merge_attention([x[:, skip:] for x in near], (far, lse))
        return tuple(torch.cat([x[:, :skip], y], 1) for x, y in zip(near, both, strict=True))

    def _near(self, q_BTAD, q_far, keys: Keys, start: int):
        """Attention to all keys but the whole chunks behind the window; start: place of the first query."""
        W, S, sinks, last = self.window, self.chunk_size, self.sinks, start + q_BTAD.shape[1]
        low = min(last, sinks + max(0, start + 1 - W - sinks) // S * S)
        k, v = (torch.cat([x[:, : min(sinks, low)], x[:, low:last]], 1) for x in keys[:2])
        j = torch.cat([torch.arange(min(sinks, low)), torch.arange(low, last)]).to(k.device)
        i = torch.arange(start, last, device=k.device)[:, None]
        behind = j <= i - W
        chunks = sinks + (i + 1 - W - sinks).clamp(min=0) // S * S  # where they end
        hidden = (j > i) | ((j >= sinks) & (j < chunks))
        near = rotate(k, (1 - keys.pace) * (j + keys.gone).double(), self.theta)
        score = scores(rotate(q_BTAD, i[:, 0] + keys.gone, self.theta), near)
        if (n := len(j) - W) > 0:  # keys, the first ones, that the last query sees behind its window
            score[..., :n] = torch.where(behind[:, :n], scores(q_far, k[:, :n]), score[..., :n])
        return softmax_product(score.masked_fill(hidden, -torch.inf), v)

    def _far(self, q_BTAD, q_far, keys: Keys, past: int, chooser: Landmarks | None, count: Callable | None):
        """Attention to chosen chunks, of which token t sees the first (past + t) // S."""
        T, S = q_BTAD.shape[1], self.chunk_size
        N = (past + T - 1) // S
        k, v = (x[:, self.sinks : self.sinks + N * S] for x in keys[:2])
        with torch.no_grad():
            found, indices = self._choose(q_BTAD, q_far, k, keys, past, N, chooser, count is not None)
            if count is not None:
                count(found, indices)
        if keys.k_pages is not None and T <= FEW:
            return selected_decode(q_far, keys.k_pages, keys.v_pages, indices, keys.page_table, impl=self.impl)
        return selected_attention(q_far, k, v, indices, chunk_size=S, impl=self.impl)

    def _choose(
        self, q_BTAD, q_far, k, keys: Keys, past: int, N: int, chooser: Landmarks | None, scored: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """scores, None where all chunks are chosen unless `scored`, and indices [B, T, H, K]."""
        (B, T, A, _), H, S = q_BTAD.shape, k.shape[2], self.chunk_size
        K = N if self.topk == "all" else min(self.topk, N)
        if (K < N or scored) and chooser is not None:
            landmarks = keys.landmarks
            if landmarks is None:
                landmarks = chooser.of(rotate(k, -keys.pace * positions(self.sinks, k).double(), self.theta), S)
            asked = chooser.ask(rotate(q_BTAD, torch.tensor([self.window], device=k.device), self.theta), H)
            options = {"chunk_size": S, "impl": self.impl, "scale": H / A}  # the mean of its query heads
            if self.recency is not None:
                options |= {"recency": q_BTAD.new_full((H,), RECENCY).float(), "recency_span": self.recency}
            if T <= FEW:
                lengths = torch.full((B,), past, dtype=torch.int32, device=k.device)
                best, indices = retrieve_decode(asked, landmarks[:, :N], lengths, K, **options)
            else:
                best, indices = retrieve_chunks(asked, landmarks[:, :N], K, q_start=past, **options)
            for h in chooser.exact:  # each apart: a list of heads would copy all keys
                own = q_far[:, :, h * A // H : (h + 1) * A // H]
                found = self._choose(own, own, k[:, :, h : h + 1], keys, past, N, None, True)
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
            q, seen = q_far[:, a : a + n], visible[a : a + n]
            most = (past + min(a + n, T) - 1) // S  # none of the block sees more
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

    def attend(self, x_BTC, start=0, cache: OwnKeys | None = None, first_v_BTHD=None, with_lse=False, keep=None):
        """As SelfAttention.attend, with the log-sum-exp in any case."""
        q, k, v, _ = self.project(x_BTC, start, keep, first_v_BTHD)
        if cache is None:
            return *self.rule.read_whole(q, k, v, self.chooser), v
        starts, before = cache.extend(k, v), k.shape[1] - q.shape[1]
        rows = [slice(None)] if len(set(starts)) == 1 else [slice(b, b + 1) for b in range(len(q))]
        parts = []
        for row, (held, gone) in zip(rows, starts, strict=False):
            keys = lambda n, pace: cache.keys(row, held + before + n, pace)  # noqa: B023, E731
            count = None if cache.budget is None else lambda n, *found: cache.count(row, before + n, *found)  # noqa: B023
            parts.append(self.rule.read(q[row], held + before + gone, keys, self.chooser, count))
        return *(torch.cat(x) for x in zip(*parts, strict=True)), v
