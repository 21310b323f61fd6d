"""`hsa-tl eval budget` and `hsa-tl eval topp`: what a trained model loses where it keeps, or reads, fewer chunks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hsa_tl.bench.ruler import ends_of
from hsa_tl.bench.selections import trained_selections
from hsa_tl.model.data import Sample, TokenFile, tokens_of
from hsa_tl.model.evaluate import answers_right, bits_per_token, needle_samples
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.model import Model
from hsa_tl.model.train import reconfigure

SETTINGS = {"budget": (1.0, 0.5, 0.25, 0.1, 0.05, 0.02), "topp": (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)}


@dataclass(frozen=True)
class TradeRow:
    """Of the contexts of one task and length, all settings in turn on each.

    score: share of answers right, or bits a token of a text. chunks: that a token of an HSA layer and head reads, of
    all tokens of a context; None with a budget, which changes what there is to read. cpu_ratio: of the CPU's time to
    read the contexts, whole and with every layer, over that of setting 1.
    """

    setting: str
    value: float
    task: str
    length: int
    score: float
    answers: int  # or places of a text
    chunks: float | None
    cpu_ratio: float


def places(file: TokenFile, length: int, count: int) -> list[np.ndarray]:
    """So many pieces of a text. ValueError: it is shorter than one."""
    return [np.asarray(file.tokens[end - length : end]) for end in ends_of(file, length, count)]


def contexts(
    model: Model, file: Path, tasks: list[str], lengths: list[int], count: int
) -> Iterator[tuple[str, list[Sample]]]:
    """Of each length and task so many needle samples for a model of needles, else so many places of a text, without
    needles, whose last chunk's worth is to be predicted."""
    for length in lengths:
        if model.tokenizer.name == "needles":
            yield from ((task, list(needle_samples(task, length, count))) for task in tasks)
        else:
            answers = np.array([[length - model.config.chunk_size, length]])
            found = places(tokens_of(file, model.tokenizer), length, count)
            yield file.stem, [Sample(tokens, answers) for tokens in found]


def _ask(model: Model, setting: str, value: float, context: Sample) -> tuple[list, list, float]:
    """Scores, chunks that each layer reads, and seconds of the CPU."""
    tokens, chunks, begin = context.tokens, [], time.process_time()
    if setting == "topp":
        reconfigure(model, replace(model.config, topp=value))
        layers = trained_selections(model, tokens)
        seconds = time.process_time() - begin
        chunks = [float((indices >= 0).sum(-1).float().mean()) for _, indices in layers.values()]
        reader = LongReader(model)
    else:
        reader = LongReader(model, segment=model.config.chunk_size, budget=value)
    if context.needles is None:
        scores = [bits_per_token(reader, tokens, len(tokens) // 4)]
    else:
        scores = answers_right(reader, context).tolist()
    return scores, chunks, seconds if setting == "topp" else time.process_time() - begin


def run_tradeoff(model: Model, setting: str, task: str, contexts: list[Sample]) -> Iterator[TradeRow]:
    """A row for each value of the setting. contexts: of one length; of one without needles its last quarter counts.

    With a budget a context is read a chunk at a time, so that the budget holds at every token. ValueError: a model
    without HSA."""
    config, values = model.config, SETTINGS[setting]
    _ask(model, setting, values[0], contexts[0])  # the first call of each program costs more
    asked = [[_ask(model, setting, value, context) for value in values] for context in contexts]
    reconfigure(model, config)
    columns = [[list(x) for x in zip(*column, strict=True)] for column in zip(*asked, strict=True)]
    for value, (scores, chunks, seconds) in zip(values, columns, strict=True):
        scores, chunks = ([x for part in parts for x in part] for parts in (scores, chunks))
        mean, read = (round(float(np.mean(x)), 4) if x else None for x in (scores, chunks))
        ratio = round(sum(seconds) / sum(columns[0][2]), 3)
        yield TradeRow(setting, value, task, len(contexts[0].tokens), mean, len(scores), read, ratio)
