"""Reading millions of tokens to answer at their end: memory linear in them, the upper decoder for the end only.

    reader = LongReader(model)
    logits = reader.read(tokens, keep=3)     # [3, V]: what the model says at the last three positions

Below the chunk memory a token sees its window only, so the context is read in segments that overlap by that reach. For
the same reason a second context of equal length is read by its differences: only the chunks that a changed token
reaches are encoded again. Both give what the whole model gives. Linear layers see everything: a cache hands their
states from segment to segment.

Shape suffixes: as in hsa_tl.model.hsa.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hsa_tl.model.cache import weights_of
from hsa_tl.model.memory import MemorySpec, PagedMemory
from hsa_tl.model.mlp import product_dtype
from hsa_tl.model.model import Model
from hsa_tl.model.sharing import Share, SharedMemory, require_shareable
from hsa_tl.validation import require

SEGMENT = 1 << 14  # tokens at once
ONE_SHOT = 1 << 17  # longest context that full attention reads: its time is quadratic


class LongReader:
    """Reads contexts. An "hsa" model reads the differences to the one before; "nsa", "moba" and "selected", whose
    layers keep keys of their own, and models with linear layers read each anew; "full" reads each whole, at most
    ONE_SHOT tokens.

    segment: tokens at once, a multiple of the chunk size. folder: of the chunk memory's files, by default it is on the
    heap. retrieve: False leaves an "hsa" model its windows, with a chunk memory that stays empty. budget: share of a
    context's chunks that an "hsa" model keeps, see hsa_tl.model.budget; the upper decoder then reads every token.
    group: of ranks that share each context, see hsa_tl.model.sharing; not with a budget.
    """

    def __init__(
        self, model: Model, *, segment: int = SEGMENT, folder: Path | None = None, retrieve: bool = True,
        budget: float | None = None, group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        c = model.config
        if group is not None:
            require_shareable(c, budget)
        require(segment % c.chunk_size == 0, "segment", f"be a multiple of chunk_size = {c.chunk_size}", segment)
        on_host = model.embedding.weight.device.type == "cpu"
        require(folder is None or on_host, "folder", "be left out on a GPU", folder)
        kept = budget is None or (0 < budget <= 1 and retrieve and c.attention == "hsa")
        require(kept, "budget", "lie in (0, 1], for a model that retrieves from a chunk memory", budget)
        linear = "linear" in c.kinds
        windows = c.attention == "hsa" and not linear
        require(retrieve or windows, "retrieve", 'be True unless attention is "hsa" without linear layers', retrieve)
        self.model, self.segment, self.folder, self.retrieve = model, segment, folder, retrieve
        self.budget, self.group = budget, group
        lower, upper = model.layers[: c.lower_layers], model.layers[c.lower_layers :]
        self.whole = "full" in c.kinds
        self.cached = c.attention == "selected" or linear or budget is not None
        self.lower_reach = sum(x.reach for x in lower) + max(0, c.conv - 1)
        self.chunk_reach = self.lower_reach + c.encoder_overlap
        self.upper_reach = sum(x.reach for x in upper)
        self.tokens = np.empty(0, np.uint16)
        self.made_by: tuple[list[float], MemorySpec] | None = None  # what encoded them
        self.memory: PagedMemory | None = None  # with a group, of this rank's share
        self.share: Share | None = None

    @torch.no_grad()
    def read(self, tokens: np.ndarray, keep: int) -> torch.Tensor:
        """Logits [keep, V] of the last `keep` positions of tokens [T]."""
        T = len(tokens)
        require(1 <= keep <= T, "keep", f"lie in [1, {T}]", keep)
        if self.whole and T > ONE_SHOT:
            raise NotImplementedError(f"full attention reads at most {ONE_SHOT} tokens here, got {T}")
        if self.cached:
            return self._read_with_cache(tokens, keep)
        if self.whole:
            return self.model(self._ids(tokens), logits_to_keep=keep).logits[0]
        if self.model.encoder is not None:
            self._remember(tokens)
        start = max(0, T - keep - self.upper_reach)
        parts = [self._lower(tokens, a, min(T, a + self.segment)) for a in range(start, T, self.segment)]
        h_BTC, v_BTHD = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        memory = self.memory
        if self.share is not None:
            memory = SharedMemory(memory, self.model.config.chunk_size, self.share)
        return self.model.head(self.model.upper(h_BTC, memory, v_BTHD, start, keep=keep))[0]

    def _read_with_cache(self, tokens: np.ndarray, keep: int) -> torch.Tensor:
        T, logits = len(tokens), []
        options = {} if self.folder is None or self.model.encoder is None else {"directory": self.folder}
        if self.budget is not None:
            chunks = math.ceil(self.budget * (T // self.model.config.chunk_size))
            options["budget"] = max(1, chunks)
        cache = self.model.new_cache(1, undo=0, capacity=T, **options)
        for a in range(0, T, self.segment):
            ids = self._ids(tokens[a : a + self.segment])
            asked = min(ids.shape[1], max(0, a + ids.shape[1] - T + keep))
            out = self.model(ids, cache=cache, logits_to_keep=asked)
            logits += [out.logits[0]] if asked else []
        return torch.cat(logits)

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens.astype(np.int64))[None].to(self.model.embedding.weight.device)

    def _lower(self, tokens: np.ndarray, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the lower decoder gives at [a, b): it reads from its reach before a on."""
        first = max(0, a - self.lower_reach)
        h, v = self.model.lower(self.model.embed(self._ids(tokens[first:b])), first)
        return h[:, a - first :], v[:, a - first :]

    def _remember(self, tokens: np.ndarray) -> None:
        """Brings the memory to these tokens: all chunks the first time, and where the model has learned since; then
        those that a changed token reaches."""
        S = self.model.config.chunk_size
        N = len(tokens) // S if self.retrieve else 0
        self.share = None if self.group is None else Share(N, self.group)
        first, stop = (0, N) if self.share is None else (self.share.first, min(N, self.share.stop))
        weight = self.model.embedding.weight
        spec = MemorySpec.of(self.model.config, 1, product_dtype(weight))
        made_by = weights_of(self.model), spec
        if len(tokens) != len(self.tokens) or made_by != self.made_by:
            options = {"device": weight.device, "capacity": max(1, stop - first), "directory": self.folder}
            self.memory, self.made_by = PagedMemory(spec, **options), made_by
            stale = np.ones(N, bool)
        else:
            changed = np.cumsum(np.append(False, tokens != self.tokens))  # before each token
            begins = np.arange(N) * S
            stale = changed[begins + S] > changed[np.maximum(0, begins - self.chunk_reach)]
        stale[:first] = stale[stop:] = False
        self.tokens = np.empty(0, np.uint16)  # nothing, should encoding fail
        bounds = np.flatnonzero(np.diff(np.concatenate([[0], stale, [0]])))
        step, reach = self.segment // S, self.model.config.encoder_overlap
        for begin, last in bounds.reshape(-1, 2).tolist():
            for a in range(begin, last, step):
                b = min(last, a + step)
                h_BTC, _ = self._lower(tokens, max(0, a * S - reach), b * S)
                h_BTC = F.pad(h_BTC, (0, 0, reach + (b - a) * S - h_BTC.shape[1], 0))
                part = self.model.encode(h_BTC[:, reach:], a * S, h_BTC[:, :reach])
                at = a - first
                store = self.memory.append if at == self.memory.longest else partial(self.memory.replace, start=at)
                store(0, part.k[0], part.v[0], part.landmarks[0])
        self.tokens = np.array(tokens)
