"""The paper's claim on two CPU cores: accuracy of needle retrieval by length, far beyond the training length.

Each model is `tiny` with another attention, trained on the recipe `needle-tiny`; the baselines have the same
convolution, window, curriculum and number of retrieved tokens. Rows resume: what the file holds is not run again.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from hsa_tl.bench import record
from hsa_tl.bench.plot import interval, length_axis, pyplot, save
from hsa_tl.bench.ruler import chance
from hsa_tl.files import write_atomic
from hsa_tl.model import evaluate
from hsa_tl.model.longcontext import ONE_SHOT, LongReader
from hsa_tl.model.recipe import Recipe, load_recipe
from hsa_tl.model.train import Step, train

MODELS = {
    "hsa": {"attention": "hsa"},
    "full-rope": {"attention": "full"},
    "swa": {"attention": "swa"},
    "nsa": {"attention": "nsa"},
    "nsa-rope": {"attention": "nsa", "rope": ["swa", "nsa"]},
}
STYLES = {
    "hsa": ("#0b6fb8", "o", "HSA"),
    "full-rope": ("#444444", "s", "full attention, RoPE"),
    "swa": ("#9a6fb0", "P", "sliding window only"),
    "nsa": ("#e07b00", "D", "NSA-style, NoPE"),
    "nsa-rope": ("#c2185b", "^", "NSA-style, RoPE"),
}
CHANCE = chance("needles")
TASKS = {"s-niah": "S-NIAH", "mq-niah": "MQ-NIAH (6 needles, 2 queries)", "mk-niah-3": "MK-NIAH 3 (all needles)"}


@dataclass(frozen=True)
class Row:
    """accuracy: share of the answers that are right, of `answers`; seconds: to read and answer all samples."""

    model: str
    seed: int
    train_length: int
    length: int
    task: str
    accuracy: float
    seconds: float
    answers: int
    samples: int
    read_tokens: int  # topk * chunk_size
    train_seconds: float
    device: str
    versions: str
    commit: str
    recipe: str = "needle-tiny"


def recipe_of(model: str, seed: int, name: str = "needle-tiny") -> Recipe:
    """The recipe with the model's attention. ValueError: another name than those of MODELS."""
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    recipe = load_recipe(name)
    return dataclasses.replace(recipe, name=f"{recipe.name}-{model}", model=recipe.model | MODELS[model], seed=seed)


def read_rows(path: Path) -> list[Row]:
    """Rows of a lengths.json, none if there is none. ValueError: it is not one."""
    if not path.exists():
        return []
    try:
        return [Row(**x) for x in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must hold the rows of hsa-tl lengths, got {error}") from None


def write_rows(path: Path, rows: list[Row]) -> None:
    models, tasks = list(MODELS), list(TASKS)
    rows = sorted(rows, key=lambda r: (r.recipe, models.index(r.model), r.seed, tasks.index(r.task), r.length))
    write_atomic(path, "[\n" + ",\n".join(json.dumps(asdict(r)) for r in rows) + "\n]\n")


def run_lengths(
    out: Path, runs: Path, models: list[str], seeds: list[int], lengths: list[int], tasks: list[str], *,
    samples: int = 100, budget_s: float = 60.0, recipe: str = "needle-tiny",
    on_step: Callable[[Step], None] = lambda step: None, on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """Trains each model for each seed in a folder of runs and evaluates it; writes out/lengths.json after every row.

    samples: contexts of each length and task; behind budget_s seconds only those that cost little, see
    evaluate.accuracy. A context that full attention cannot read has no row.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    chosen = {(m, s): recipe_of(m, s, recipe) for s in seeds for m in models}
    path = out / "lengths.json"
    rows = read_rows(path)
    trained_on = load_recipe(recipe).name
    done = {(r.model, r.seed, r.task, r.length) for r in rows if r.recipe == trained_on}
    for (name, seed), plan in chosen.items():
        todo = [(t, T) for t in tasks for T in lengths if (name, seed, t, T) not in done]
        todo = [(t, T) for t, T in todo if name != "full-rope" or T <= ONE_SHOT]
        if not todo:
            continue
        model, seconds = _trained(plan, run_folder(runs, plan), on_step)
        for task, T in todo:
            row = ask(LongReader(model), name, plan, task, T, samples, budget_s, round(seconds, 1), trained_on)
            rows.append(row)
            write_rows(path, rows)
            on_row(row)
    return rows


def ask(
    reader: LongReader, name: str, plan: Recipe, task: str, T: int, samples: int, budget_s: float,
    train_seconds: float, trained_on: str,
) -> Row:  # fmt: skip
    """The row of a model that plan made, of one task and length. A reader that read this length before reads less."""
    config = reader.model.config
    read_tokens = config.topk * config.chunk_size if config.attention in ("hsa", "nsa") else 0
    answer = partial(evaluate.answers_right, reader)
    found = evaluate.accuracy(answer, evaluate.needle_samples(task, T, samples, plan.seed), budget_s)
    return Row(
        name, plan.seed, plan.stages[-1].length, T, task, found.share, round(found.seconds, 3), found.answers,
        found.samples, read_tokens, train_seconds, record.device_name("cpu"), record.versions(), record.commit(),
        trained_on,
    )  # fmt: skip


def run_folder(runs: Path, plan: Recipe) -> Path:
    """Where run_lengths trains a plan of recipe_of."""
    return runs / f"{plan.name}-{plan.seed}"


def _trained(recipe: Recipe, run: Path, on_step: Callable[[Step], None]) -> tuple[torch.nn.Module, float]:
    """The trained model and how long it took, from the run's own clock if it was trained before."""
    clock = run / "seconds.json"
    start = time.perf_counter()
    if run.exists() and not clock.exists():  # a time that a stop cut in two says nothing
        shutil.rmtree(run)
    model = train(recipe, run, on_step=on_step)
    if not clock.exists():
        write_atomic(clock, json.dumps(time.perf_counter() - start))
    return model, json.loads(clock.read_text())


def plot_lengths(rows: list[Row], path: Path) -> list[Path]:
    """Accuracy against length, a panel for each task: the median of the seeds, a band from the worst to the best.

    Of one seed the band is Wilson's interval of its answers.
    """
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    plt = pyplot()
    tasks = [t for t in TASKS if any(r.task == t for r in rows)]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.4 * len(tasks), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        mine = [r for r in rows if r.task == task]
        for model, (color, marker, label) in STYLES.items():
            points = sorted({r.length for r in mine if r.model == model})
            if not points:
                continue
            values = [sorted(r.accuracy for r in mine if r.model == model and r.length == T) for T in points]
            seeds = len({r.seed for r in rows if r.model == model})
            label = f"{label}, {seeds} seed{'s' if seeds > 1 else ''}"
            ax.plot(points, [v[len(v) // 2] for v in values], color=color, marker=marker, markersize=4, label=label)
            bands = [(v[0], v[-1]) for v in values]
            if seeds == 1:
                counts = {r.length: r.answers for r in mine if r.model == model}
                bands = [interval(v[0] * counts[T], counts[T]) for T, v in zip(points, values, strict=True)]
            low, high = zip(*bands, strict=True)
            ax.fill_between(points, low, high, color=color, alpha=0.15, linewidth=0)
        length_axis(ax, sorted({r.length for r in mine}))
        ax.set_ylim(-0.03, 1.03)
        ax.set_title(TASKS[task])
        ax.axvline(mine[0].train_length, color="#888888", linewidth=0.8, linestyle=":")
        ax.axhline(CHANCE, color="#888888", linewidth=0.8, linestyle="--")
    axes[0][0].set_ylabel("share of answers right")
    counts = sorted({r.samples for r in rows})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(
        f"Trained at {rows[0].train_length} tokens (dotted); median, worst and best seed, or the 95 % interval of one; "
        f"chance is 1 in {1 / CHANCE:.0f} (dashed); {samples} contexts for each point",
        fontsize=10,
    )
    return save(figure, path)
