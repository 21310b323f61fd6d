"""`hsa-tl eval`: RULER by length and depth, and perplexity by context, of a trained run. Rows as JSON, plots as PNG.

Exact match, teacher-forced: an answer counts when every token of it is the likeliest one after the true ones before it.
Generated: the answers to a sample's questions are generated greedily, each after the model's own answers before it.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hsa_tl.bench import record
from hsa_tl.bench.plot import length_axis, length_label, pyplot, save
from hsa_tl.files import write_atomic
from hsa_tl.model import checkpoint, evaluate, needles, ruler
from hsa_tl.model.data import TokenFile
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.model import Model
from hsa_tl.model.recipe import recipe_of

VOCABULARIES = ("words", "needles")


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
    def of(cls, folder: Path, model: Model) -> "Run":
        found = checkpoint.latest(folder)
        recipe = recipe_of(found.recipe)
        stages = [recipe.stages[recipe.stage_at(step)[0]] for step in range(found.step)]
        tokens = sum(s.tokens for s in stages)
        return cls(
            recipe.name, recipe.seed, model.num_parameters(), tokens, max(s.length for s in stages),
            found.step == recipe.steps,
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


@dataclass(frozen=True)
class PerplexityRow:
    """bits_per_token of the last tokens of each window, given `length` tokens in all."""

    length: int
    bits_per_token: float
    tokens: int
    windows: int


def has_depth(task: str, vocabulary: str) -> bool:
    return vocabulary == "needles" or task in ruler.NIAH


def run_ruler(
    reader: LongReader, vocabulary: str, tasks: list[str], lengths: list[int], depths: list[float], *, samples: int,
    seed: int = 0, generate: bool = False, on_row: Callable[[RulerRow], None] = lambda row: None,
) -> list[RulerRow]:  # fmt: skip
    """Accuracy of each task at each length and depth. vocabulary: "words", one token a byte, or "needles", the 320
    tokens of hsa_tl.model.needles. generate: see evaluate.answers_generated; each context is then read anew.
    ValueError: a task that the vocabulary does not have."""
    known = needles.TASKS if vocabulary == "needles" else ruler.TASKS
    make = evaluate.needle_samples if vocabulary == "needles" else evaluate.ruler_samples
    for task in tasks:
        if task not in known:
            raise ValueError(f"task must be one of {', '.join(known)}, got {task!r}")
    method = "generated" if generate else "teacher-forced"
    if generate:
        answer = partial(evaluate.answers_generated, reader.model, folder=reader.folder)
    else:
        answer = partial(evaluate.answers_right, reader)
    rows = []
    for length in lengths:
        for task in tasks:
            for depth in depths if has_depth(task, vocabulary) else [None]:
                fixed = () if depth is None else (depth,)
                found = evaluate.accuracy(answer, make(task, length, samples, seed, fixed))
                row = RulerRow(
                    method, task, length, depth, found.share, found.answers, found.samples, round(found.seconds, 3)
                )
                rows.append(row)
                on_row(row)
    return rows


def run_perplexity(
    reader: LongReader, file: TokenFile, lengths: list[int], *, last: int = 4096, windows: int = 8, seed: int = 0,
    before: int = 0, on_row: Callable[[PerplexityRow], None] = lambda row: None,
) -> list[PerplexityRow]:  # fmt: skip
    """Bits a token of the same tokens at every length: `windows` places of the file, each read with more before it.

    The last `last` tokens count, at most half of the shortest length. The places have `before` tokens or the longest
    length before them: models that read different lengths are asked the same with one `before`. ValueError: the file
    is shorter than a length.
    """
    longest = max(before, *lengths)
    if longest > len(file):
        raise ValueError(f"lengths must be at most the {len(file)} tokens of {file.path}, got {longest}")
    last = min(last, min(lengths) // 2)
    ends = np.random.default_rng(seed).integers(longest, len(file) + 1, windows)
    rows = []
    for length in lengths:
        bits = [evaluate.bits_per_token(reader, np.asarray(file.tokens[e - length : e]), last) for e in ends]
        rows.append(PerplexityRow(length, float(np.mean(bits)), last, windows))
        on_row(rows[-1])
    return rows


def origin(device: str) -> dict[str, str]:
    """Where a figure comes from."""
    return {"device": record.device_name(device), "versions": record.versions(), "commit": record.commit()}


def write_rows(rows: list, run: Run, device: str, path: Path) -> list[dict]:
    """Rows of a run into a JSON file, which keeps those of other runs; all of them. ValueError: not such a file."""
    try:
        found = json.loads(path.read_text()) if path.exists() else []
        kept = [r for r in found if (r["model"], r["seed"]) != (run.model, run.seed)]
    except (TypeError, KeyError, json.JSONDecodeError):
        raise ValueError(f"{path} must hold the rows of hsa-tl eval") from None
    kept += [asdict(run) | asdict(row) | origin(device) for row in rows]
    write_atomic(path, "[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    return kept


def plot_ruler(rows: list[RulerRow], path: Path) -> list[Path]:
    """A heat map, length by depth, of each task that has depths; and accuracy by length of all."""
    tasks = list(dict.fromkeys(r.task for r in rows))
    maps = [t for t in tasks if len({r.depth for r in rows if r.task == t}) > 1]
    figure, axes = pyplot().subplots(
        1, len(maps) + 1, figsize=(4.2 * (len(maps) + 1), 3.6), squeeze=False, layout="constrained"
    )
    lengths = sorted({r.length for r in rows})
    for ax, task in zip(axes[0], maps, strict=False):
        depths = sorted({r.depth for r in rows if r.task == task})
        at = {(r.depth, r.length): r.accuracy for r in rows if r.task == task}
        grid = [[at.get((d, T), float("nan")) for T in lengths] for d in depths]
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", origin="upper")
        ax.set_xticks(range(len(lengths)), [length_label(T) for T in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        ax.grid(False)
        ax.set_xlabel("tokens")
        ax.set_ylabel("depth of the needle")
        ax.set_title(task)
        figure.colorbar(image, ax=ax, shrink=0.8, label="answers right")
    ax = axes[0][-1]
    for task in tasks:
        values = [[r for r in rows if r.task == task and r.length == T] for T in lengths]
        shares = [sum(r.accuracy * r.answers for r in v) / sum(r.answers for r in v) for v in values]
        ax.plot(lengths, shares, marker="o", markersize=4, label=task)
    length_axis(ax, lengths)
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("answers right")
    ax.legend()
    return save(figure, path)


def plot_perplexity(rows: list[dict], path: Path) -> list[Path]:
    """Bits per token against context length, a line for each run of write_rows' rows."""
    figure, ax = pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for name, seed in dict.fromkeys((r["model"], r["seed"]) for r in rows):
        mine = sorted((r for r in rows if (r["model"], r["seed"]) == (name, seed)), key=lambda r: r["length"])
        label = f"{name}, {mine[0]['parameters'] / 1e6:.2f}M"
        ax.plot([r["length"] for r in mine], [r["bits_per_token"] for r in mine], marker="o", markersize=4, label=label)
    ax.axvline(rows[0]["trained_length"], color="#888888", linewidth=0.8, linestyle=":")
    length_axis(ax, sorted({r["length"] for r in rows}))
    ax.set_ylabel(f"bits per token, last {rows[0]['tokens']}")
    ax.legend()
    return save(figure, path)
