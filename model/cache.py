"""The state of sequences that are read segment by segment: `cache = model.new_cache(2)`, `model(ids, cache=cache)`.

A cache holds, of each sequence: the keys and values that the layers' windows reach back to (all of them where a layer
attends to everything), the tokens that the convolution looks back on, the hidden states of the unfinished chunk, the
chunk memory, and the hidden states that the upper decoder has not read yet.

The last is an exact shortcut. Above the chunk memory there are only sliding windows, so that a token's output depends
on the memory and on the hidden states of at most as many tokens before it as the windows of the upper layers reach back
together. While no output is asked for (logits_to_keep=0), these are kept and the upper decoder does not run: a prefill
retrieves nothing before its last segment. Models whose upper layers attend further ("full", "nsa") have none.

Of the tokens before these it holds `undo` more, so that `crop` can take tokens back.

Shape suffixes: B sequences, T tokens, C channels, H key/value heads, D head dim, M chunks, S chunk size.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from hsa_tl.model import memory_file
from hsa_tl.model.memory import MemorySpec, PagedMemory
from hsa_tl.model.segment import SegmentMemory
from hsa_tl.model.tail import Tail, take_rows
from hsa_tl.validation import require_int

FORMAT = "hsa_tl.cache.1"


def _dims(config) -> dict:
    """What a cache depends on, as JSON has it."""
    ignored = ("impl", "activation_checkpointing", "topk")
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in ignored}))


def _near_and_far(cache) -> tuple[Tail, list[Tail]]:
    return cache if isinstance(cache, tuple) else (cache, [])


class Cache:
    """What `Model.new_cache` returns.

    capacity: tokens of each sequence that the chunk memory reserves at first. undo: tokens of each that `crop` can take
    back. memory_options: of PagedMemory (offload, cache_pages, two_level, directory). lengths: tokens that each holds.
    memory: its chunks, None without HSA. unread: the last token of each sequence that a `stream` gave and nobody read
    yet, 1-D tensors, which the next stream or generate reads first; None: there is none.
    """

    def __init__(
        self, model, batch_size: int, *, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, capacity: int = 1 << 14, undo: int = 128, **memory_options,
    ):  # fmt: skip
        for name, value, low in (("batch_size", batch_size, 1), ("capacity", capacity, 1), ("undo", undo, 0)):
            require_int(name, value, low)
        c = self.config = model.config
        self.lengths, self.undo = [0] * batch_size, undo
        self.undoable = [0] * batch_size  # tokens that crop can take back now
        self.unread: list[torch.Tensor] | None = None
        self.counts = [0] * batch_size  # of the tokens of the segment that the layers run on
        self.memory = self.chunk = None
        if c.attention == "hsa":
            spec = MemorySpec.of(c, batch_size, dtype)
            self.memory = PagedMemory(spec, device=device, capacity=-(-capacity // c.chunk_size), **memory_options)
            self.chunk = Tail(self.counts, c.chunk_size - 1, undo)
        elif memory_options:
            name = next(iter(memory_options))
            raise ValueError(f"{name} must go to a model with a chunk memory, got attention {c.attention!r}")
        self.row_counts = [[0] for _ in range(batch_size)]
        self.layers = []  # of each what its forward takes
        for layer in model.layers:
            window = layer.attention.window
            near = Tail(self.counts, None if window is None else window - 1, undo)
            self.layers.append(near if layer.nsa is None else (near, [Tail(counts) for counts in self.row_counts]))
        width = max(0, c.conv - 1) and c.conv - 1 + undo
        self.past = torch.zeros(batch_size, width, c.dim, dtype=model.embedding.weight.dtype, device=device)
        upper_reach = sum(layer.reach for layer in model.layers[c.lower_layers :])
        self.waiting = Tail(self.counts, upper_reach + undo) if c.attention in ("hsa", "swa") else None

    def _count(self, counts: list[int]) -> None:
        """The layers run on a segment of so many tokens."""
        self.counts[:] = counts
        for row, n in zip(self.row_counts, counts, strict=True):
            row[0] = n

    def advance(
        self, model, input_ids: torch.Tensor, lengths: torch.Tensor | list[int] | None = None,
        keep: int | None = None, states: list | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [B, T, C] before the head, of the model's next tokens input_ids [B, T], or of embeddings.

        See Model.hidden and Model.forward; lengths None: T. What belongs to no token is unspecified, and finite.
        """
        B, T = input_ids.shape[:2]
        self.unread = None
        if len(self.lengths) != B:
            raise ValueError(f"input_ids must have the cache's batch size {len(self.lengths)}, got shape {[B, T]}")
        counts = [T] * B if lengths is None else [int(n) for n in lengths]
        if len(counts) != B or not all(0 <= n <= T for n in counts):
            raise ValueError(f"lengths must be {B} ints from 0 to {T}, got {counts}")
        x_BTC = input_ids if input_ids.is_floating_point() else model.embedding(input_ids)
        if not T:
            return x_BTC
        self._count(counts)
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
        return h_BTC

    def crop(self, lengths: int | list[int]) -> None:
        """Forgets what each sequence holds behind its first `lengths` tokens.

        Args:
            lengths (int or list [B]): tokens that each sequence still holds.

        Raises:
            ValueError: more than it holds, or so few that more than `undo` tokens would go.
        """
        B = len(self.lengths)
        kept = [lengths] * B if isinstance(lengths, int) else list(lengths)
        if len(kept) != B or not all(type(n) is int and 0 <= n <= m for n, m in zip(kept, self.lengths, strict=True)):
            raise ValueError(f"lengths must be ints from 0 to {self.lengths}, what the cache holds, got {lengths}")
        gone = [n - m for n, m in zip(self.lengths, kept, strict=True)]
        if any(n > m for n, m in zip(gone, self.undoable, strict=True)):
            rule = f"take back at most the last {self.undoable} tokens, of undo = {self.undo} for a new cache"
            raise ValueError(f"lengths must {rule}, got {lengths} of {self.lengths}")
        if not any(gone):
            return
        upper = gone  # of the tokens that the upper decoder has read
        if self.waiting is not None:
            unread = [min(n, m) for n, m in zip(gone, self.waiting.held, strict=True)]
            upper = [n - m for n, m in zip(gone, unread, strict=True)]
            self.waiting.crop(unread)
        for i, (near, far) in enumerate(map(_near_and_far, self.layers)):
            taken = gone if i < self.config.lower_layers else upper
            near.crop(taken)
            for tail, n in zip(far, taken, strict=bool(far)):
                tail.crop([n])
        self.past = take_rows(self.past, [-n for n in gone], self.past.shape[1])
        if self.memory is not None:
            self.chunk.crop(gone)
            for b, n in enumerate(kept):
                self.memory.crop(b, n // self.config.chunk_size)
        self.lengths, self.unread = kept, None
        self.undoable = [n - m for n, m in zip(self.undoable, gone, strict=True)]

    def _tails(self) -> Iterator[tuple[str, Tail]]:
        yield from ((name, tail) for name in ("chunk", "waiting") if (tail := getattr(self, name)) is not None)
        for i, (near, far) in enumerate(map(_near_and_far, self.layers)):
            yield from ((f"layers.{i}.{j}", tail) for j, tail in enumerate((near, *far)))

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file; `path` then holds all of it or what it held before.

        Args:
            path (str or Path): the file.
        """
        tensors = {} if self.memory is None else memory_file.contents(self.memory)
        tensors["past"] = [self.past]
        for name, tail in self._tails():
            tensors |= {f"{name}.{j}": [x] for j, x in enumerate(tail.state())}
        state = {
            "config": _dims(self.config), "lengths": self.lengths, "undo": self.undo, "undoable": self.undoable,
            "unread": None if self.unread is None else [x.tolist() for x in self.unread],
        }  # fmt: skip
        spec = {} if self.memory is None else {"spec": self.memory.spec.to_json()}
        memory_file.write(Path(path), tensors, FORMAT, state=json.dumps(state), **spec)

    @classmethod
    def load(cls, model, path: Path | str, **options) -> "Cache":
        """The cache that `save` wrote, see `Model.load_cache`."""
        with memory_file.read(Path(path), FORMAT, ("past",)) as file:
            state = file.parse("state", json.loads)
            if (dims := _dims(model.config)) != state["config"]:
                wrong = [f"{k} = {v}" for k, v in state["config"].items() if dims.get(k) != v]
                raise ValueError(f"{path} must hold a cache of this model, got one of {', '.join(wrong)}")
            capacity = max(options.get("capacity", 1 << 14), *state["lengths"])
            self = cls(model, len(state["lengths"]), **options | {"undo": state["undo"], "capacity": capacity})
            device = self.past.device
            if self.memory is not None:
                file.fill(self.memory, file.pages(file.spec(self.memory.spec)))
            self.past = file.tensor("past").to(self.past)
            for name, tail in self._tails():
                held, *buffers = (file.tensor(x) for j in range(3) if (x := f"{name}.{j}") in file.names)
                tail.restore(held, *(x.to(device) for x in buffers))
        self.lengths, self.undoable = state["lengths"], state["undoable"]
        if state["unread"] is not None:
            self.unread = [torch.tensor(x, device=device) for x in state["unread"]]
        return self

    def _start(self, starts: list[int]) -> int | torch.Tensor:
        same = len(set(starts)) == 1
        return starts[0] if same else torch.tensor(starts, dtype=torch.int32, device=self.past.device)

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
        x_MSC = x_BPC[row[:, None], column[:, None] + torch.arange(S, device=device)]
        k, v, landmarks = model.encode(x_MSC, begin)
        entries = k.unflatten(0, (-1,)), v, landmarks[:, 0]
        for b, part in enumerate(zip(*(x.to(self.memory.spec.dtype).split(new) for x in entries), strict=True)):
            if new[b]:
                self.memory.append(b, *part)

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
            self._count([min(a + b, n + self.waiting.keep) for a, b in zip(waited, counts, strict=True)])
            first = [h.shape[1] - T + b - m for b, m in zip(counts, self.counts, strict=True)]
            h_BTC, first_v_BTHD = (take_rows(x, first, max(1, *self.counts)) for x in (h, v))
            starts = [a + b - m for a, b, m in zip(starts, counts, self.counts, strict=True)]
            self.waiting.clear()
        memory = None if self.memory is None else SegmentMemory(self.memory, self.counts)
        caches = self.layers[self.config.lower_layers :]
        start = self._start(starts)
        if keep is not None and min(self.counts) == h_BTC.shape[1]:
            out = model.upper(h_BTC, memory, first_v_BTHD, start, caches, max(1, n + self.undo))
            return out[:, out.shape[1] - n :]
        upper = None if states is None else []
        out = model.upper(h_BTC, memory, first_v_BTHD, start, caches, states=upper)
        behind = counts if keep is None else [n] * len(counts)
        first = [m - b for m, b in zip(self.counts, behind, strict=True)]
        if states is not None:
            states.extend(take_rows(x, first, n) for x in upper)
        return take_rows(out, first, n)
