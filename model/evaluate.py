"""Accuracy of retrieval by length: exact match of whole answers, teacher-forced or generated.

reader = LongReader(model)
accuracy(partial(answers_right, reader), needle_samples("mq-niah", 1 << 20, count=50)).share
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from hsa_tl.model import needles, ruler
from hsa_tl.model.data import Sample, Tokenizer
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.model import Model
from hsa_tl.model.sharing import SharedCache

GOLDEN = (5**0.5 - 1) / 2
LEAST = 4  # samples, however long they take
HELD_OUT = 1 << 20  # training seeds are below


@dataclass(frozen=True)
class Accuracy:
    """answers of which `right` were right in every token, over `samples` contexts; seconds for all of them.

    near, near_right: the same of answers whose needle lies in the last, unfinished chunk, where they count apart."""

    right: int
    answers: int
    samples: int
    seconds: float
    near: int = 0
    near_right: int = 0

    @property
    def share(self) -> float:
        return self.right / max(1, self.answers)


def answers_right(reader: LongReader, sample: Sample) -> np.ndarray:
    """[A] bool: each answer predicted whole, every token from the true ones before it."""
    targets = sample.targets()
    predicted = reader.read(sample.tokens, len(sample.tokens) - int(targets[0]) + 1).argmax(-1).cpu().numpy()
    hit = predicted[targets - targets[0]] == sample.tokens[targets]
    sizes = sample.answers[:, 1] - sample.answers[:, 0]
    return np.logical_and.reduceat(hit, np.cumsum(sizes) - sizes)


def answers_generated(
    model: Model, sample: Sample, folder: Path | None = None, group: dist.ProcessGroup | None = None, more: int = 0
) -> np.ndarray:
    """[A] bool: each answer generated whole, greedily, after the sample's questions and the model's own answers.

    more: tokens that the model may write beside an answer, which is right if its text stands anywhere in them, as RULER
    has it; what comes behind it is not generated. 0: an answer is right if nothing else stands before it.
    folder: keeps the chunk memory in files there. The context is read anew, a segment at a time. group: of ranks that
    share it, see hsa_tl.model.sharing.
    """
    tokens, hits = torch.from_numpy(sample.tokens.astype(np.int64)), []
    options, before = {} if folder is None else {"directory": folder}, 0
    if group is None:
        cache = model.new_cache(1, capacity=len(tokens), **options)
    else:
        before = int(sample.answers[0, 0]) - 1
        cache = SharedCache(model, tokens[:before], group, **options)
    for a, b in sample.answers.tolist():
        text = model.tokenizer.decode(tokens[a:b].tolist()).strip() if more else ()
        new = model.generate([tokens[before:a]], b - a + more, cache=cache, stop=text)[0][a - before :].cpu()
        hits.append(text in model.tokenizer.decode(new.tolist()) if more else torch.equal(new, tokens[a:b]))
        before = b
    return np.array(hits)


def accuracy(
    answer: Callable[[Sample], np.ndarray], samples: Iterator[Sample], budget_s: float = float("inf"),
    chunk_size: int | None = None,
) -> Accuracy:  # fmt: skip
    """Over all samples; behind budget_s seconds only over those that cost little, and over LEAST at the least.

    answer: which of a sample's answers are right, [A] bool, by answers_right or answers_generated. Little is a
    hundredth of the budget: a context that is read by its differences. chunk_size: answers whose needle lies in the
    last, unfinished chunk of so many tokens count apart.
    """
    start, right, answers, count, near, near_right = time.perf_counter(), 0, 0, 0, 0, 0
    for sample in samples:
        begin = time.perf_counter()
        hits = answer(sample)
        apart = np.zeros(len(hits), bool) if chunk_size is None else sample.unfinished(chunk_size)
        near, near_right = near + int(apart.sum()), near_right + int(hits[apart].sum())
        right, answers, count = right + int(hits[~apart].sum()), answers + int((~apart).sum()), count + 1
        end = time.perf_counter()
        if count >= LEAST and end - start > budget_s and end - begin > budget_s / 100:
            break
    return Accuracy(right, answers, count, time.perf_counter() - start, near, near_right)


def needle_samples(
    name: str, length: int, count: int, seed: int = 0, depths: tuple[float, ...] = (), haystacks: int = 1
):
    """`count` samples of a token-level task in so many haystacks one after the other, see hsa_tl.model.needles.

    depths: in turn; by default they spread evenly, however many samples are taken.
    """
    task = needles.task(name, length)
    for i in range(count):
        depth = depths[i % len(depths)] if depths else i * GOLDEN % 1
        yield task.sample(HELD_OUT + seed, i, depth, noise=i * haystacks // count)


def ruler_samples(
    name: str, length: int, count: int, seed: int = 0, depths: tuple[float, ...] = (),
    tokenizer: Tokenizer | None = None, haystack: np.ndarray | None = None,
):  # fmt: skip
    """`count` samples of a task in words, see hsa_tl.model.ruler."""
    for i in range(count):
        depth = depths[i % len(depths)] if depths and name in ruler.AT_DEPTH else None
        yield ruler.ruler_sample(name, length, HELD_OUT + seed, i, depth=depth, tokenizer=tokenizer, haystack=haystack)


@torch.no_grad()
def bits_per_token(reader: LongReader, tokens: np.ndarray, last: int) -> float:
    """Mean cross-entropy in bits of the last `last` tokens, given all before them."""
    logits = reader.read(tokens, last + 1)[:-1].float()
    want = torch.from_numpy(tokens[-last:].astype(np.int64)).to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits, want)) / float(np.log(2))
