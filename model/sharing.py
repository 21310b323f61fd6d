"""One long context on the ranks of a group, in inference: each reads a share of it, and the chunks stay there.

    group = torch.distributed.group.WORLD                      # of the processes that torchrun started
    logits = LongReader(model, group=group).read(tokens, 3)    # one process's, on every rank
    cache = SharedCache(model, tokens, group)                  # or a cache, to generate with

The chunk memory comes from the lower decoder, which sees windows only. So rank r of W encodes chunks [r N / W,
(r + 1) N / W) and reads as many tokens before them as the lower windows reach back together; nothing moves. All ranks
run the end of the context, where the upper decoder begins, and every token after it. For each of these tokens and each
HSA layer a rank sends its best K chunks, 8 bytes each for every retrieval head, so that selections are global and
exact, and the sum of its chosen chunks' outputs, A * D numbers, since HSA's output is a sum over chunks; for fusion
"mass" also A * K masses.

Every rank makes the same calls with the same tokens.

Shape suffixes: as in hsa_tl.model.hsa.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hsa_tl.model.cache import Cache
from hsa_tl.model.chunk_memory import Memory
from hsa_tl.model.generate import SEGMENT
from hsa_tl.model.pages import best_slots
from hsa_tl.validation import require_integers

NO_CHUNK = 2**31 - 1  # above every chunk's number


def require_shareable(config, budget: float | None = None) -> None:
    """NotImplementedError: a model whose context ranks cannot share, or a memory with a budget."""
    linear = "linear" in config.kinds
    if config.attention != "hsa" or linear or config.fusion == "one_softmax" or budget is not None:
        rule = 'of attention "hsa" without linear layers, without fusion "one_softmax" and without a budget'
        got = f"{config.attention!r}, linear {linear}, {config.fusion!r}, budget {budget}"
        raise NotImplementedError(f"ranks share a context {rule}, got {got}")


class Share:
    """Which of a context's chunks this rank of the group holds: [first, stop). The last rank has what follows, too."""

    def __init__(self, chunks: int, group: dist.ProcessGroup):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group, self.firsts = group, [chunks * r // ranks for r in range(ranks)]
        self.first, self.stop = (*self.firsts, NO_CHUNK)[rank : rank + 2]

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x of every rank."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in self.firsts]
        dist.all_gather(parts, x, group=self.group)
        return parts


class SharedMemory:
    """A Memory over the chunks of all ranks, see hsa_tl.model.chunk_memory; own: this rank's, from its first on."""

    def __init__(self, own: Memory, chunk_size: int, share: Share):
        self.own, self.chunk_size, self.share = own, chunk_size, share

    def retrieve(self, q_BTRE, start: int, topk: int, **options):
        before, T = self.share.first * self.chunk_size, q_BTRE.shape[1]
        skip = min(T, max(0, before - start))  # tokens before this rank's first chunk
        scores, indices = self.own.retrieve(q_BTRE[:, skip:], start + skip - before, topk, **options)
        indices = torch.where(indices >= 0, indices + self.share.first, -1)
        padded = (F.pad(x, (0, 0, 0, 0, skip, 0), value=none) for x, none in ((scores, -torch.inf), (indices, -1)))
        return best_slots(*(torch.cat(self.share.gather(x), -1) for x in padded), topk)

    def scores(self, q_BTRE, start: int, **options) -> torch.Tensor:
        firsts, S = self.share.firsts, self.chunk_size
        last = max(firsts[-1] + 1, (start + q_BTRE.shape[1]) // S)  # no token sees this chunk
        held = [b - a for a, b in zip(firsts, [*firsts[1:], last], strict=True)]
        scores = self.own.scores(q_BTRE, start - self.share.first * S, **options)
        padded = F.pad(scores, (0, max(held) - scores.shape[-1]), value=-torch.inf)
        return torch.cat([x[..., :n] for x, n in zip(self.share.gather(padded), held, strict=True)], -1)

    def attend(self, q_BTAD, weights, indices_BTHK, **options) -> torch.Tensor:
        out = self.own.attend(q_BTAD, weights, self._mine(indices_BTHK), **options)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        dist.all_reduce(out, group=self.share.group)
        return out.to(q_BTAD.dtype)

    def masses(self, q_BTAD, indices_BTHK, **options) -> torch.Tensor:
        masses = self.own.masses(q_BTAD, self._mine(indices_BTHK), **options)
        dist.all_reduce(masses, dist.ReduceOp.MAX, group=self.share.group)  # one rank holds the chunk
        return masses

    def _mine(self, indices: torch.Tensor) -> torch.Tensor:
        """This rank's chunks, counted from its first."""
        mine = (indices >= self.share.first) & (indices < self.share.stop)
        return torch.where(mine, indices - self.share.first, -1)


class SharedCache(Cache):
    """The cache of one sequence, which the ranks have read together; see hsa_tl.model.cache. The chunks of tokens that
    follow are the last rank's.

    tokens: [T], on every rank. segment: tokens at once. options: of Cache, but undo: it takes no tokens back.
    ValueError: no tokens of the model; or what follows differs between ranks, as where each drew without a seed.
    NotImplementedError: see require_shareable; it cannot be saved.
    """

    @torch.no_grad()
    def __init__(self, model, tokens: torch.Tensor, group: dist.ProcessGroup, *, segment: int = SEGMENT, **options):
        require_shareable(model.config, options.get("budget"))
        c, T, S = model.config, len(tokens), model.config.chunk_size
        tokens = require_integers("tokens", tokens, 0, c.vocab_size).to(model.embedding.weight.device)
        self.share = Share(T // S, group)
        first, stop = self.share.first * S, min(self.share.stop, T // S) * S
        super().__init__(model, 1, undo=0, **{"capacity": max(S, stop - first)} | options)
        lower = sum(layer.reach for layer in model.layers[: c.lower_layers]) + c.conv + c.encoder_overlap
        upper = sum(layer.reach for layer in model.layers[c.lower_layers :])
        for begin, end in ((first - lower, stop), (T - lower - max(upper, S), T)):
            begin = max(0, begin) // S * S
            self._move(model, tokens, begin)
            for part in tokens[begin:end].split(segment):
                super().advance(model, part[None], keep=0)

    def _move(self, model, tokens, at: int) -> None:
        """Lets the cache stand at a chunk's first token, with no window behind it."""
        for _, tail in self._tails():
            tail.clear()
        width = self.past.shape[1]
        past_TC = model.embedding(tokens[max(0, at - width) : at])
        self.past = F.pad(past_TC, (0, 0, width - len(past_TC), 0))[None]
        self.lengths = [at]

    def advance(self, model, input_ids: torch.Tensor, *args, **options) -> torch.Tensor:
        told = self.share.gather(input_ids)
        if not all(torch.equal(x, told[0]) for x in told):
            raise ValueError("input_ids must be the same on every rank, got others than rank 0's")
        return super().advance(model, input_ids, *args, **options)

    def save(self, path) -> None:
        raise NotImplementedError(f"a cache that ranks share cannot be saved, got {path}")

    def _append(self, sequence: int, number: int, *chunks: torch.Tensor) -> None:
        """Of the chunks from `number` on those that are this rank's and that it does not hold yet."""
        part = slice(max(0, self.share.first + self.memory.longest - number), max(0, self.share.stop - number))
        if len(chunks[0][part]):
            super()._append(sequence, number, *(x[part] for x in chunks))

    def _chunks(self) -> Memory:
        return SharedMemory(super()._chunks(), self.config.chunk_size, self.share)
