"""What training reads: batches that are a function of (seed, index), so that a resumed run reads what it would have.

    source = make_source({"kind": "text", "path": "out/data/train.bin", "needles": 0.01}, length=1024, seed=0)
    input_ids, labels = source.batch(step * 8, 8)

labels are input_ids where the loss counts, -100 elsewhere; the model shifts them.
"""

import inspect
import math
import warnings
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hsa_tl.model import needles, ruler
from hsa_tl.model.data import KEPT, Tokenizer, make_tokenizer, tokens_of
from hsa_tl.model.documents import json_lines
from hsa_tl.validation import require

IGNORE = -100
HELD_OUT = 999  # where a recipe's seed makes one for each stage, those of validation
PROBES, LONG = 32, 1024  # samples of a task that must fit, and tokens from which on one is enough
BLOCK = 1024  # samples of a mix whose lots are drawn at once
INSERTED = ("s-niah", "mk-niah-1", "mq-niah", "vt")  # RULER tasks that are put into training samples


class Batch(NamedTuple):
    input_ids: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64


class Source:
    """Samples by their numbers; `row` gives one: its tokens, and the positions that the loss counts, None for all."""

    length: int
    vocab_size: int

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        raise NotImplementedError

    def batch(self, index: int, size: int) -> Batch:
        """Samples index .. index + size."""
        rows = [self.row(i) for i in range(index, index + size)]
        tokens = torch.from_numpy(np.stack([t for t, _ in rows]).astype(np.int64))
        labels = torch.full_like(tokens, IGNORE)
        for i, (_, at) in enumerate(rows):
            at = slice(None) if at is None else torch.from_numpy(at)
            labels[i, at] = tokens[i, at]
        return Batch(tokens, labels)


def _require_room(tasks, length: int, tokenizer: Tokenizer) -> None:
    """ValueError: a RULER task that does not fit, by its name. Samples differ by some tokens: many are tried where that
    counts, and some tokens are left."""
    for name in tasks:
        try:
            for index in range(PROBES if length < LONG else 1):
                ruler.ruler_sample(name, length * 31 // 32, 0, index, tokenizer=tokenizer)
        except ValueError as error:
            raise ValueError(f"length must leave room for samples of {name}, got {length}: {error}") from None


class TextSource(Source):
    """Windows of a token file in random order, each once an epoch; the loss counts every token.

    path: the file. tokenizer: its file, by default bytes. needles: share of the samples whose window becomes the
    haystack of a RULER task (the paper's 1 %).
    """

    copies = 1

    def __init__(self, length: int, seed: int, *, path, tokenizer=None, needles=0.0):
        self.tokenizer = make_tokenizer(tokenizer)
        self.file = tokens_of(path, self.tokenizer)
        self.length, self.seed, self.needles = length, seed, needles
        self.window, rest = divmod(length, self.copies)
        require(0 <= needles <= 1, "needles", "lie in [0, 1]", needles)
        require(not rest, "length", "be even for self-copy", length)
        if needles:
            _require_room(INSERTED, length, self.tokenizer)
        self.vocab_size = self.file.sidecar.vocab_size
        self.windows = len(self.file) // self.window
        require(self.windows > 0, path, f"hold at least {self.window} tokens", len(self.file))
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))  # its number, and where its windows start

    def _tokens(self, index: int) -> np.ndarray:
        epoch, i = divmod(index, self.windows)
        if self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.windows)
            # Each epoch cuts the file elsewhere.
            shift = np.random.default_rng([self.seed, 1, epoch]).integers(0, len(self.file) % self.window + 1)
            self._epoch = epoch, shift + order * self.window
        start = self._epoch[1][i]
        return np.asarray(self.file.tokens[start : start + self.window])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        tokens, rng = self._tokens(index), np.random.default_rng([self.seed, 2, index])
        if rng.random() >= self.needles:
            return np.tile(tokens, self.copies), np.arange(self.window, self.length) if self.copies > 1 else None
        name = INSERTED[rng.integers(len(INSERTED))]
        sample = ruler.ruler_sample(name, self.length, self.seed, index, tokenizer=self.tokenizer, haystack=tokens)
        return sample.tokens, None


class SelfCopySource(TextSource):
    """A TextSource whose samples without needles are half a window's length twice: only the second half counts."""

    copies = 2


class PairSource(Source):
    """Prompts with answers, as many as fit one after the other, drawn by lot; the loss counts the answers only.

    path: JSON lines. prompt, answer: their fields. The document's end stands behind each answer, and fills what is left
    of a sample.
    """

    def __init__(self, length: int, seed: int, *, path, prompt="prompt", answer="answer", tokenizer=None):
        tokenizer = make_tokenizer(tokenizer)
        self.length, self.seed, self.vocab_size, self.end = length, seed, tokenizer.vocab_size, tokenizer.end
        columns = [tokenizer.encode_all(list(json_lines(Path(path), field))) for field in (prompt, answer)]
        joined = [(np.concatenate([asked, said, [self.end]]), len(asked)) for asked, said in zip(*columns, strict=True)]
        self.pairs = [(tokens, first) for tokens, first in joined if len(tokens) <= length]
        if not self.pairs:
            raise ValueError(f"a prompt with its answer must have at most {length} tokens, got none of {len(joined)}")
        if long := len(joined) - len(self.pairs):
            warnings.warn(f"{long} of {len(joined)} pairs are left out, of more than {length} tokens", stacklevel=2)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng, tokens, counted, at = np.random.default_rng([self.seed, 2, index]), np.full(self.length, self.end), [], 0
        while True:
            pair, first = self.pairs[rng.integers(len(self.pairs))]
            if at + len(pair) > self.length:
                return tokens, np.concatenate(counted)
            tokens[at : at + len(pair)] = pair
            counted.append(np.arange(at + first, at + len(pair)))
            at += len(pair)


class LotSource(Source):
    """Samples of several tasks, by lot and weight; the loss counts the answers only. parts: each gives the Sample of
    (seed, index)."""

    stream = 2

    def __init__(self, parts: list, weights: list[float], length: int, vocab_size: int, seed: int):
        ok = min(weights, default=-1) >= 0 and 0 < sum(weights) < math.inf
        require(ok, "weights", "be at least 0 and not all of them 0, one for each task or source", weights)
        self.parts, self.length, self.vocab_size, self.seed = parts, length, vocab_size, seed
        self.share = np.array(weights) / sum(weights)

    def lots(self, index: int, size: int | None = None):
        """Which of parts sample `index` is of, or each of the `size` samples of block `index`."""
        return np.random.default_rng([self.seed, self.stream, index]).choice(len(self.parts), size, p=self.share)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        sample = self.parts[self.lots(index)](self.seed, index)
        return sample.tokens, sample.targets()


class MixSource(LotSource):
    """Samples of several sources, by lot and weight, each source's in its own order.

    sources: the `data` of each, no mix itself, of one tokenizer besides needles, and a weight, 1 by default.
    """

    stream = 3

    def __init__(self, length: int, seed: int, *, sources):
        if not sources or any(x.get("kind") == "mix" for x in sources):
            raise ValueError(f"sources must be at least one that is no mix itself, got {sources}")
        made = [make_source({k: v for k, v in x.items() if k != "weight"}, length, seed) for x in sources]
        names = sorted({tokenizer_of(x).name for x in sources if x["kind"] != "needles"})
        require(len(names) < 2, "sources", "be of one tokenizer", ", ".join(names))
        weights = [x.get("weight", 1.0) for x in sources]
        super().__init__(made, weights, length, max(x.vocab_size for x in made), seed)
        self.taken = [np.zeros(len(made), np.int64)]  # of each source, before each block of samples

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        block, i = divmod(index, BLOCK)
        while len(self.taken) <= block:
            lots = self.lots(len(self.taken) - 1, BLOCK)
            self.taken.append(self.taken[-1] + np.bincount(lots, minlength=len(self.parts)))
        lots = self.lots(block, BLOCK)
        before = self.taken[block][lots[i]] + np.count_nonzero(lots[:i] == lots[i])
        return self.parts[lots[i]].row(int(before))


def tokenizer_of(spec: dict[str, Any], run: Path | None = None) -> Tokenizer:
    """The tokenizer of a recipe's `data`: its file's, by default one token a byte; of needles, their words; of a mix,
    its first source's. run: whose copy of the file is taken, where it keeps one."""
    if spec["kind"] == "mix":
        return tokenizer_of(spec["sources"][0], run)
    if spec["kind"] == "needles":
        return needles.NeedleTokenizer()
    file = spec.get("tokenizer")
    return make_tokenizer(run / KEPT if file and run and (run / KEPT).is_file() else file)


def _needles(length: int, seed: int, *, tasks) -> LotSource:
    """tasks: of NeedleTask's fields and a weight, 1 by default."""
    known = [f.name for f in fields(needles.NeedleTask) if f.name != "length"] + ["weight"]
    for name in (name for t in tasks for name in t if name not in known):
        raise ValueError(f"a task of needles must have the options {', '.join(known)}, got {name!r}")
    weights = [t.get("weight", 1.0) for t in tasks]
    options = [{k: v for k, v in t.items() if k != "weight"} for t in tasks]
    return LotSource([needles.NeedleTask(length, **x).sample for x in options], weights, length, needles.VOCAB, seed)


def _ruler(length: int, seed: int, *, tasks=ruler.TRAINED, tokenizer=None) -> LotSource:
    """tasks: names; tokenizer: a file, by default bytes."""
    tokenizer = make_tokenizer(tokenizer)
    _require_room(tasks, length, tokenizer)
    parts = [partial(ruler.ruler_sample, name, length, tokenizer=tokenizer) for name in tasks]
    return LotSource(parts, [1.0] * len(parts), length, tokenizer.vocab_size, seed)


KINDS = {
    "text": TextSource, "self-copy": SelfCopySource, "needles": _needles, "ruler": _ruler, "pairs": PairSource,
    "mix": MixSource,
}  # fmt: skip


def make_source(spec: dict[str, Any], length: int, seed: int) -> Source:
    """The source that a recipe's `data` names by its kind: text, self-copy, needles, ruler, pairs of prompt and answer,
    or a mix of these."""
    require(isinstance(spec, dict), "data", "be a mapping with a kind", repr(spec))
    options = dict(spec)
    kind = options.pop("kind", None)
    require(isinstance(kind, str) and kind in KINDS, "data's kind", f"be one of {', '.join(KINDS)}", repr(kind))
    known = {p.name: p for p in inspect.signature(KINDS[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"data of kind {kind} must have the options {', '.join(known)}, got {unknown[0]!r}")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in options]:
        raise ValueError(f"data of kind {kind} must have the option {missing[0]!r}, got none")
    try:
        return KINDS[kind](length, seed, **options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"data of kind {kind} must have options of the right types, got {error}") from None


def validation_source(spec: dict[str, Any], length: int, seed: int) -> Source | None:
    """Samples that training never sees: of the held_out.bin beside a text's file, of another seed of a task.

    None: a file has none beside it. ValueError: it cannot give samples.
    """
    unseen = _unseen(spec)
    return None if unseen is None else make_source(unseen, length, seed * 1000 + HELD_OUT)


def _unseen(spec: dict[str, Any]) -> dict[str, Any] | None:
    if spec["kind"] == "mix":
        sources = list(map(_unseen, spec["sources"]))
        return None if None in sources else spec | {"sources": sources}
    if "path" not in spec:
        return spec
    path = Path(spec["path"])
    held_out = path.with_name(f"held_out{path.suffix}")
    return spec | {"path": str(held_out)} if path.name != held_out.name and held_out.exists() else None
