"""`hsa-tl eval`: RULER by length and depth, and perplexity by context, of a trained run. Rows as JSON, plots as PNG."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hsa_tl.bench import record
from hsa_tl.bench.suite import one_of
from hsa_tl.model import evaluate, needles, pretrained, ruler
from hsa_tl.model.data import TokenFile
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.model import Model
from hsa_tl.text import read_corpus
from hsa_tl.validation import require

VOCABULARIES = ("words", "needles")
SENTENCE = 64  # tokens that a model may write beside an answer in words, since a pretrained one answers in sentences
LAST = 4096  # tokens that perplexity is of, at most
WINDOWS = ", windows only"  # behind the name of a model whose HSA layers read nothing


@dataclass(frozen=True)
class Run:
    """What was evaluated: a recipe's name and seed, and how far it was trained."""

    model: str
    seed: int
    parameters: int
    trained_tokens: int
    trained_length: int  # the longest of all stages
    finished: bool  # the recipe's last step was done

    @classmethod
    def of(cls, run: str | Path, model: Model) -> "Run":
        recipe, done, _ = pretrained.trained(run)
        stages = [recipe.stages[recipe.stage_at(step)[0]] for step in range(done)]
        tokens = sum(s.tokens for s in stages)
        return cls(
            recipe.name, recipe.seed, model.num_parameters(), tokens, max((s.length for s in stages), default=0),
            done == recipe.steps,
        )  # fmt: skip


@dataclass(frozen=True)
class RulerRow:
    method: str  # teacher-forced or generated
    task: str
    length: int
    depth: float | None  # of the needle first asked for; None: anywhere
    accuracy: float
    answers: int
    samples: int
    seconds: float
    haystack: str | None = None


@dataclass(frozen=True)
class PerplexityRow:
    """bits_per_token of the last tokens of each window, given `length` tokens in all."""

    length: int
    bits_per_token: float
    tokens: int
    windows: int
    standard_error: float | None = None  # of bits_per_token, over the windows
    bits: list[float] | None = None  # per token of each window: runs asked at the same ones are compared in pairs


def chance(vocabulary: str) -> float:
    """Of guessing an answer: one of the needles' values; an answer in words cannot be guessed."""
    return 1 / (needles.VALUES[1] - needles.VALUES[0]) if vocabulary == "needles" else 0.0


def run_ruler(
    reader: LongReader, vocabulary: str, tasks: list[str], lengths: list[int], depths: list[float], *, samples: int,
    generate: bool = False, haystack: Path | None = None,
) -> Iterator[RulerRow]:  # fmt: skip
    """Accuracy of each task at each length and depth. vocabulary: "words", in the model's own tokens, or "needles", the
    320 tokens of hsa_tl.model.needles. generate: see evaluate.answers_generated; each context is then read anew.
    haystack: a text around what is hidden in words, by default some sentences again and again.
    ValueError: a task or a haystack that the vocabulary does not have."""
    known, make, name = needles.TASKS, evaluate.needle_samples, None
    if vocabulary == "words":
        tokenizer, text = reader.model.tokenizer, None
        if haystack is not None:
            name, text = haystack.name, tokenizer.encode_all([read_corpus(haystack).data])[0]
        known, make = ruler.TASKS, partial(evaluate.ruler_samples, tokenizer=tokenizer, haystack=text)
    elif haystack is not None:
        raise ValueError(f"haystack must go with the vocabulary words, got it with {vocabulary}")
    for task in tasks:
        one_of("task", task, known)
    method, answer = "teacher-forced", partial(evaluate.answers_right, reader)
    if generate:
        more = SENTENCE if vocabulary == "words" else 0
        method = "generated"
        options = {"folder": reader.folder, "group": reader.group, "more": more}
        answer = partial(evaluate.answers_generated, reader.model, **options)
    for length in lengths:
        for task in tasks:
            for depth in depths if vocabulary == "needles" or task in ruler.AT_DEPTH else [None]:
                fixed = () if depth is None else (depth,)
                found = evaluate.accuracy(answer, make(task, length, samples, 0, fixed))
                counts = found.answers, found.samples, round(found.seconds, 3)
                yield RulerRow(method, task, length, depth, found.share, *counts, name)


def require_tokens(file: TokenFile, length: int) -> None:
    require(length <= len(file), "lengths", f"be at most the {len(file)} tokens of {file.path}", length)


def ends_of(file: TokenFile, length: int, count: int) -> np.ndarray:
    """Where so many places of a file end, each behind `length` tokens of it. ValueError: it is shorter."""
    require_tokens(file, length)
    return np.random.default_rng(0).integers(length, len(file) + 1, count)


def run_perplexity(
    reader: LongReader, file: TokenFile, lengths: list[int], *, windows: int, before: int = 0
) -> Iterator[PerplexityRow]:
    """Bits a token of the same tokens at every length: `windows` places of the file, each read with more before it.

    The last LAST tokens count, at most half of the shortest length. The places have `before` tokens or the longest
    length before them: models that read different lengths are asked the same with one `before`. ValueError: a length
    below 2, or a file that is shorter than one.
    """
    last = min(LAST, min(lengths) // 2)
    require(last >= 1, "lengths", "be at least 2", min(lengths))
    ends = ends_of(file, max(before, *lengths), windows)
    for length in lengths:
        bits = [evaluate.bits_per_token(reader, np.asarray(file.tokens[e - length : e]), last) for e in ends]
        error = float(np.std(bits, ddof=1) / windows**0.5) if windows > 1 else None
        yield PerplexityRow(length, float(np.mean(bits)), last, windows, error, [round(x, 5) for x in bits])


def paired(bits: list[float], others: list[float]) -> tuple[float, float]:
    """Mean of bits - others over the same places, at least 2, and its standard error."""
    change = np.subtract(bits, others)
    return float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)


def write_rows(rows: list, run: Run, device: str, path: Path) -> list[dict]:
    """Rows of a run into a JSON file, see record.merge_rows."""
    source = record.origin(device)
    return record.merge_rows(path, asdict(run), [asdict(row) | source for row in rows])
