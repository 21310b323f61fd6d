"""The state of sequences that are read segment by segment: `cache = model.new_cache(2)`, `model(ids, cache=cache)`.

A cache holds, of each sequence: the keys and values that the layers' windows reach back to (all of them where a layer
attends to everything), the states of linear layers, the tokens that the convolution looks back on, the hidden states of
the unfinished chunk, the chunk memory, and the hidden states that the upper decoder has not read yet. Layers with
attention "selected" keep their own keys and values: of all tokens where they choose chunks, else of sinks, window and
a chunk or two.

The last is an exact shortcut. Above the chunk memory there are only sliding windows, so that a token's output depends
on the memory and on the hidden states of at most as many tokens before it as the windows of the upper layers reach back
together. While no output is asked for (logits_to_keep=0), these are kept and the upper decoder does not run: a prefill
retrieves nothing before its last segment. Models whose upper layers see further ("full", "nsa", "moba", "selected" and
linear ones) have none, and neither has a memory with a budget, which goes by what every token reads.

Of the tokens before these it holds `undo` more, so that `crop` can take tokens back. A segment is padded on the right:
row b holds counts[b] tokens of its sequence.

Shape suffixes: as in hsa_tl.model.hsa; M chunks that a segment completes.
"""

import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from hsa_tl.model import memory_file
from hsa_tl.model.budget import per_layer
from hsa_tl.model.chunk_memory import SegmentMemory
from hsa_tl.model.linear import LinearState
from hsa_tl.model.memory import MemorySpec, PagedMemory
from hsa_tl.model.mlp import product_dtype
from hsa_tl.model.own_keys import OwnKeys
from hsa_tl.validation import require, require_int

FORMAT = "hsa_tl.cache.1"


def _dims(config) -> dict:
    """What a cache depends on, as JSON has it."""
    ignored = ("impl", "activation_checkpointing", "topk")
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in ignored}))


def weights_of(model) -> list[float]:
    """A value of every parameter: what tells a model from others of its configuration, whatever its dtype."""
    return [p.detach().flatten()[p.numel() // 2].item() for p in model.parameters()]


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


def _tails_of(cache) -> tuple[Tail | LinearState, ...]:
    return cache if isinstance(cache, tuple) else (cache,)


class Cache:
    """What `Model.new_cache` returns, which tells the options.

    capacity: tokens of each sequence that the chunk memory reserves at first. lengths: tokens that each holds. memory:
    its chunks, None without HSA. unread: of each sequence the last token that a `stream` gave and nobody read yet, 1-D
    tensors, which the next stream or generate reads first; None: none.
    """

    def __init__(
        self, model, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        capacity: int = 1 << 14, undo: int | None = None, budget: int | tuple[int, ...] | None = None, **memory_options,
    ):  # fmt: skip
        c, weight = model.config, model.embedding.weight
        device, computed = weight.device if device is None else device, product_dtype(weight)
        require(dtype in (None, computed), "dtype", f"be {computed}, in which the model computes here", dtype)
        self.config = c
        self.model = weakref.ref(model)  # whose weights `save` notes; copying a cache copies no model
        linear = "linear" in c.kinds  # whose states know no way back
        undo = (0 if linear else 128) if undo is None else undo
        for name, value, low in (("batch_size", batch_size, 1), ("capacity", capacity, 1), ("undo", undo, 0)):
            require_int(name, value, low)
        require(not (linear and undo), "undo", "be 0 with linear layers", undo)
        self.lengths, self.undo, self.budget = [0] * batch_size, undo, budget
        self.undoable = [0] * batch_size  # tokens that crop can take back now
        self.unread: list[torch.Tensor] | None = None
        self.torn = False  # a segment was read in part: an exception or a signal ended it
        self.counts = [0] * batch_size  # of the tokens of the segment that the layers run on
        self.memory = self.chunk = None
        if c.attention == "hsa":
            spec = MemorySpec.of(c, batch_size, computed)
            chunks = -(-capacity // c.chunk_size)
            self.memory = PagedMemory(spec, device=device, capacity=chunks, budget=budget, **memory_options)
            self.chunk = Tail(self.counts, c.chunk_size - 1 + c.encoder_overlap, undo)
        elif memory_options or (budget is not None and c.attention != "selected"):
            name = next(iter(memory_options), "budget")
            raise ValueError(f"{name} must go to a model with a chunk memory, got attention {c.attention!r}")
        self.layers = []  # of each what its forward takes
        for layer, kind, own in zip(model.layers, c.kinds, per_layer(budget, c), strict=True):
            window = layer.attention.window
            if c.attention == "selected":
                near = OwnKeys(self.counts, layer.attention.rule, layer.attention.chooser, own, undo, computed)
            elif kind == "linear":
                near = LinearState(self.counts, c.heads, c.head_dim, computed, device)
            else:
                near = Tail(self.counts, None if window is None else window - 1, undo)
            self.layers.append((near, Tail(self.counts)) if kind == "nsa" else near)
        width = max(0, c.conv - 1) and c.conv - 1 + undo
        self.past = torch.zeros(batch_size, width, c.dim, dtype=weight.dtype, device=device)
        upper_reach = sum(layer.reach for layer in model.layers[c.lower_layers :])
        waits = {"hsa", "swa"}.issuperset(c.kinds[c.lower_layers :]) and self.budget is None
        self.waiting = Tail(self.counts, upper_reach + undo) if waits else None

    @torch.inference_mode(False)  # what it keeps is changed in place, outside of that mode too
    @torch.no_grad()
    def advance(
        self, model, input_ids: torch.Tensor, lengths: torch.Tensor | list[int] | None = None,
        keep: int | None = None, states: list | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [B, T, C] before the head, of the model's next tokens input_ids [B, T], or of embeddings.

        See Model.hidden and Model.forward; lengths None: T. What belongs to no token is unspecified, and finite.
        """
        B, T = input_ids.shape[:2]
        self._require_whole()
        if len(self.lengths) != B:
            raise ValueError(f"input_ids must have the cache's batch size {len(self.lengths)}, got shape {[B, T]}")
        counts = [T] * B if lengths is None else [int(n) for n in lengths]
        if len(counts) != B or not all(0 <= n <= T for n in counts):
            raise ValueError(f"lengths must be {B} ints from 0 to {T}, got {counts}")
        x_BTC = input_ids if input_ids.is_floating_point() else model.embedding(input_ids)
        if not T:
            return x_BTC
        self.counts[:], self.torn, self.unread = counts, True, None
        past = self.past
        if width := past.shape[1]:
            self.past = take_rows(torch.cat([past, x_BTC.detach()], 1), counts, width)
        x_BTC = model.embed(x_BTC, past[:, self.undo :])
        if states is not None:
            states.append(x_BTC)
        caches = self.layers[: self.config.lower_layers]
        h_BTC, first_v_BTHD = model.lower(x_BTC, self._start(self.lengths), caches, states)
        if self.memory is not None:
            self._remember(model, h_BTC)
        h_BTC = self._upper(model, h_BTC, first_v_BTHD, keep, states)
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]
        self.undoable = [min(self.undo, a + b) for a, b in zip(self.undoable, counts, strict=True)]
        self.torn = False
        return h_BTC

    def _require_whole(self) -> None:
        rule = "hold whole segments: read its tokens again, into a new one"
        require(not self.torn, "cache", rule, "one whose last segment was interrupted")

    def crop(self, lengths: int | list[int]) -> None:
        """Forgets what each sequence holds behind its first `lengths` tokens.

        Args:
            lengths (int or list [B]): tokens that each sequence still holds.

        Raises:
            ValueError: more than it holds, so few that more than `undo` tokens would go, or an exception ended the last
                segment.
        """
        self._require_whole()
        B = len(self.lengths)
        kept = [lengths] * B if isinstance(lengths, int) else list(lengths)
        if len(kept) != B or not all(type(n) is int and 0 <= n <= m for n, m in zip(kept, self.lengths, strict=True)):
            raise ValueError(f"lengths must be ints from 0 to {self.lengths}, what the cache holds, got {lengths}")
        gone = [n - m for n, m in zip(self.lengths, kept, strict=True)]
        if any(n > m for n, m in zip(gone, self.undoable, strict=True)):
            rule = f"take back at most the last {self.undoable} tokens, of undo = {self.undo} for a new cache"
            raise ValueError(f"lengths must {rule}, got {lengths} of {self.lengths}")
        self.unread = None  # it stands behind them all
        if not any(gone):
            return
        upper = gone  # of the tokens that the upper decoder has read
        if self.waiting is not None:
            unread = [min(n, m) for n, m in zip(gone, self.waiting.held, strict=True)]
            upper = [n - m for n, m in zip(gone, unread, strict=True)]
            self.waiting.crop(unread)
        for i, cache in enumerate(self.layers):
            for tail in _tails_of(cache):
                tail.crop(gone if i < self.config.lower_layers else upper)
        self.past = take_rows(self.past, [-n for n in gone], self.past.shape[1])
        if self.memory is not None:
            self.chunk.crop(gone)
            for b, n in enumerate(kept):
                self.memory.crop(b, n // self.config.chunk_size)
        self.lengths = kept
        self.undoable = [n - m for n, m in zip(self.undoable, gone, strict=True)]

    def _tails(self) -> Iterator[tuple[str, Tail]]:
        yield from ((name, tail) for name in ("chunk", "waiting") if (tail := getattr(self, name)) is not None)
        for i, cache in enumerate(self.layers):
            yield from ((f"layers.{i}.{j}", tail) for j, tail in enumerate(_tails_of(cache)))

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file; `path` then holds all of it or what it held before.

        Args:
            path (str or Path): the file.

        Raises:
            ValueError: an exception ended the last segment, so that the state is no text's.
        """
        self._require_whole()
        tensors = {} if self.memory is None else memory_file.contents(self.memory)
        tensors["past"] = [self.past]
        for name, tail in self._tails():
            tensors |= {f"{name}.{j}": [x] for j, x in enumerate(tail.state())}
        state = {
            "config": _dims(self.config), "lengths": self.lengths, "undo": self.undo, "undoable": self.undoable,
            "budget": self.budget, "unread": None if self.unread is None else [x.tolist() for x in self.unread],
            "weights": None if (model := self.model()) is None else weights_of(model),
        }  # fmt: skip
        spec = {} if self.memory is None else {"spec": self.memory.spec.to_json()}
        memory_file.write(Path(path), tensors, FORMAT, state=json.dumps(state), **spec)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, model, path: Path | str, **options) -> "Cache":
        """The cache that `save` wrote, see `Model.load_cache`."""
        for name in ("undo", "budget"):
            require(name not in options, name, "be left out: it is as saved", options.get(name))
        with memory_file.read(Path(path), FORMAT, ("past",)) as file:
            state = file.parse("state", json.loads)
            dims, saved = _dims(model.config), _dims(type(model.config)()) | state["config"]  # defaults of newer fields
            if wrong := [f"{k} = {v}" for k, v in saved.items() if dims.get(k) != v]:
                raise ValueError(f"{path} must hold a cache of this model, got one of {', '.join(wrong)}")
            mine = torch.tensor(weights_of(model))
            theirs = mine if state.get("weights") is None else torch.tensor(state["weights"])  # older files have none
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-2, atol=1e-6):
                raise ValueError(f"{path} must hold a cache of this model, got one of a model with other weights")
            capacity = max(options.get("capacity", 1 << 14), *state["lengths"])
            options = options | {"undo": state["undo"], "budget": state.get("budget"), "capacity": capacity}
            self = cls(model, len(state["lengths"]), **options)
            device = self.past.device
            if self.memory is not None:
                file.fill(self.memory, file.pages(file.spec(self.memory.spec)))
            self.past = file.tensor("past").to(self.past)
            for name, tail in self._tails():
                held, *buffers = (file.tensor(x) for j in range(5) if (x := f"{name}.{j}") in file.names)
                tail.restore(held, *(x.to(device) for x in buffers))
        self.lengths, self.undoable = state["lengths"], state["undoable"]
        if state["unread"] is not None:
            self.unread = [torch.tensor(x, device=device) for x in state["unread"]]
        return self

    def _start(self, starts: list[int]) -> int | torch.Tensor:
        return starts[0] if len(set(starts)) == 1 else torch.tensor(starts, dtype=torch.int32, device=self.past.device)

    def _remember(self, model, h_BTC) -> None:
        """Encodes the chunks that the segment completes, those of all sequences at once."""
        S, T, device = self.config.chunk_size, h_BTC.shape[1], h_BTC.device
        x_BPC = self.chunk.extend(h_BTC)[0]
        rest = [n % S for n in self.lengths]
        new = [(r + n) // S for r, n in zip(rest, self.counts, strict=True)]
        if not any(new):
            return
        row = torch.tensor([b for b, n in enumerate(new) for _ in range(n)], device=device)
        within = torch.cat([torch.arange(n, device=device) for n in new])
        begin = (torch.tensor(self.lengths, device=device) // S)[row] * S + within * S
        column = (x_BPC.shape[1] - T - torch.tensor(rest, device=device))[row] + within * S
        n = self.config.encoder_overlap
        at = torch.arange(-n, S, device=device)
        x_MSC = x_BPC[row[:, None], (column[:, None] + at).clamp(min=0)]
        x_MSC = x_MSC.masked_fill((begin[:, None] + at < 0)[..., None], 0)
        k, v, landmarks = model.encode(x_MSC[:, n:], begin, x_MSC[:, :n])
        entries = k.unflatten(0, (-1,)), v, landmarks[:, 0]
        for b, part in enumerate(zip(*(x.to(self.memory.spec.dtype).split(new) for x in entries), strict=True)):
            if new[b]:
                self._append(b, self.lengths[b] // S, *part)

    def _append(self, sequence: int, number: int, *chunks: torch.Tensor) -> None:
        """Stores chunks: keys, values, landmarks. number: the first one's in its sequence."""
        self.memory.append(sequence, *chunks)

    def _chunks(self) -> SegmentMemory | None:
        return None if self.memory is None else SegmentMemory(self.memory, self.counts)

    def _upper(self, model, h_BTC, first_v_BTHD, keep: int | None, states: list | None) -> torch.Tensor:
        """Hidden states of the upper decoder: of the segment, or of the last `keep` tokens of each row."""
        T, starts, counts = h_BTC.shape[1], self.lengths, list(self.counts)
        n = T if keep is None else min(keep, T)
        if self.waiting is not None and (n < T or any(self.waiting.held)):
            waited = list(self.waiting.held)
            h, v, _ = self.waiting.extend(h_BTC, first_v_BTHD)
            if not n:
                return h_BTC[:, :0]
            # What stands further back than n outputs reach is left out for good.
            self.counts[:] = [min(a + b, n + self.waiting.keep) for a, b in zip(waited, counts, strict=True)]
            first = [h.shape[1] - T + b - m for b, m in zip(counts, self.counts, strict=True)]
            h_BTC, first_v_BTHD = (take_rows(x, first, max(1, *self.counts)) for x in (h, v))
            starts = [a + b - m for a, b, m in zip(starts, counts, self.counts, strict=True)]
            self.waiting.clear()
        memory, caches = self._chunks(), self.layers[self.config.lower_layers :]
        start = self._start(starts)
        if keep is not None and min(self.counts) == h_BTC.shape[1] and self.budget is None:
            out = model.upper(h_BTC, memory, first_v_BTHD, start, caches, max(1, n + self.undo))
            return out[:, out.shape[1] - n :]
        upper = None if states is None else []
        out = model.upper(h_BTC, memory, first_v_BTHD, start, caches, states=upper)
        behind = counts if keep is None else [n] * len(counts)
        first = [m - b for m, b in zip(self.counts, behind, strict=True)]
        if states is not None:
            states.extend(take_rows(x, first, n) for x in upper)
        return take_rows(out, first, n)
