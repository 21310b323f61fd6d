"""The paper's claim on two CPU cores: accuracy of needle retrieval by length, far beyond the training length.

Each model of `hsa_tl.bench.contenders` is trained on the recipe `needle-tiny`. A needle in the last, unfinished chunk,
which HSA cannot retrieve, counts apart. Rows resume: what the file holds is not run again.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from hsa_tl.bench import record
from hsa_tl.bench.compare import grouped, length_label
from hsa_tl.bench.contenders import MODELS
from hsa_tl.bench.plot import interval
from hsa_tl.bench.plot_eval import FEWEST, NEEDLES, plot_lengths
from hsa_tl.bench.ruler import chance
from hsa_tl.bench.suite import one_of
from hsa_tl.files import locked, write_atomic
from hsa_tl.model import evaluate, load, needles, pretrained
from hsa_tl.model import recipe as recipes
from hsa_tl.model.longcontext import ONE_SHOT, LongReader
from hsa_tl.model.recipe import Recipe, load_recipe
from hsa_tl.model.rope import extended
from hsa_tl.model.sources import tokenizer_of
from hsa_tl.model.train import LOCK, LOG, Step, reconfigure, train
from hsa_tl.terminal import plot_or_say, progress_bar, show_table
from hsa_tl.validation import require

TASKS = tuple(NEEDLES)
RECIPE = "needle-tiny"
RATES = (0.5, 1.0, 2.0)  # of the recipe's learning rate, of which the fair table reports the best
# Of the demo, and of weights that ship.
DEMO_LENGTHS = (256, 1 << 12, 1 << 15, 1 << 18, 1 << 20)
DEMO_TASKS = ("s-niah", "mq-niah")
DEMO_BUDGET_S = 15.0  # of each length and task, behind which a slow machine takes fewer samples


@dataclass(frozen=True)
class Row:
    """accuracy: share of the answers that are right, of `answers`; seconds: to read and answer all samples; near: more
    answers, whose needle lies in the last, unfinished chunk. The defaults are of rows from before these were recorded.
    """

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
    recipe: str = RECIPE
    parameters: int | None = None
    haystacks: int = 1  # that the samples share
    near: int = 0
    near_right: int = 0
    lr: float | None = None
    rates: int = 1  # learning rates that were tried


def rate(accuracy: float, answers: int) -> str:
    """In percent with Wilson's 95 % interval; of fewer answers than say a rate, their count."""
    right = round(accuracy * answers)
    if answers < FEWEST:
        return f"{right} of {answers}"
    low, high = interval(right, answers)
    return f"{100 * accuracy:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def recipe_of(model: str, seed: int, name: str = RECIPE, faster: float = 1.0) -> Recipe:
    """What trains the model's weights. faster: of RATES. ValueError: another name than those of MODELS."""
    who = MODELS[one_of("model", model, MODELS)].weights_of or model
    plan, recipe = MODELS[who], load_recipe(name)
    every = ("topk", "impl") if plan.topk else ()  # which read every chunk, a stage's "dense" too
    stages = (replace(s, model={k: v for k, v in s.model.items() if k not in every}) for s in recipe.stages)
    changes, reading = recipe.model | plan.changes, {} if plan.changes else recipe.reading
    title = f"{recipe.name}-{who}" + (f"-lr{faster:g}" if faster != 1 else "")
    changed = {"model": changes, "reading": reading, "stages": tuple(stages)}
    return replace(recipe, name=title, lr=faster * recipe.lr, seed=seed, **changed)


def read_rows(path: Path) -> list[Row]:
    """Rows of a lengths.json, none if there is none. ValueError, TypeError: it is not one."""
    return [Row(**x) for x in record.read_json(path)]


def write_rows(path: Path, rows: list[Row]) -> None:
    models = list(MODELS)
    rows = sorted(rows, key=lambda r: (r.recipe, models.index(r.model), r.seed, TASKS.index(r.task), r.length))
    write_atomic(path, record.json_list(map(asdict, rows)))


def run_folder(runs: Path, plan: Recipe) -> Path:
    """Where run_lengths trains a plan of recipe_of."""
    return runs / f"{plan.name}-{plan.seed}"


def _trained(recipe: Recipe, run: Path, on_step: Callable[[Step], None]) -> tuple[torch.nn.Module, float]:
    """The trained model and how long it took, from the run's own clock if it was trained before."""
    clock = run / "seconds.json"
    start = time.perf_counter()
    if run.exists() and not clock.exists():  # a time that a stop cut in two says nothing
        with locked(run / LOCK, wait=False):  # nobody else trains there
            shutil.rmtree(run)
    model = train(recipe, run, on_step=on_step)
    if not clock.exists():
        write_atomic(clock, json.dumps(time.perf_counter() - start))
    return model, json.loads(clock.read_text())


def _best_rate(model: str, recipe: str, runs: Path, on_step: Callable[[Step], None]) -> float:
    """Of RATES, that with which seed 0 ends with the least loss on samples that training never sees."""

    def loss(faster: float) -> float:
        plan = recipe_of(model, 0, recipe, faster)
        _trained(plan, run_folder(runs, plan), on_step)
        return json.loads((run_folder(runs, plan) / LOG).read_text().splitlines()[-1])["validation_loss"]

    return min(RATES, key=loss)


def _ask(
    reader: LongReader, plan: Recipe, task: str, T: int, samples: int, budget_s: float, haystacks: int = 1, **about
) -> Row:  # fmt: skip
    """The row of a model that plan made, of one task and length. A reader that read this length before reads less."""
    config, trained = reader.model.config, max(s.length for s in plan.stages)
    if (scaling := MODELS[about["model"]].scaling) is not None:
        reconfigure(reader.model, extended(plan.config(), scaling, T, trained))
    answer = partial(evaluate.answers_right, reader)
    contexts = evaluate.needle_samples(task, T, samples, plan.seed, haystacks=haystacks)
    found = evaluate.accuracy(answer, contexts, budget_s, config.chunk_size)
    return Row(
        seed=plan.seed, train_length=trained, length=T, task=task, accuracy=found.share,
        seconds=round(found.seconds, 3), answers=found.answers, samples=found.samples,
        read_tokens=config.topk * config.chunk_size if config.attention in ("hsa", "nsa", "moba") else 0,
        parameters=reader.model.num_parameters(), haystacks=haystacks, near=found.near, near_right=found.near_right,
        lr=plan.lr,
        **record.origin("cpu"), **about,
    )  # fmt: skip


def _show(console: Console, out: Path, mine: list[Row], rows: list[Row]) -> None:
    """The table of mine, accuracy by length for each model, seed and task; a plot of rows, all of one recipe."""
    lengths = sorted({r.length for r in mine})
    lines = []
    for (model, seed, task), found in grouped(mine, lambda r: (r.model, r.seed, r.task)).items():
        shares, size = {r.length: rate(r.accuracy, r.answers) for r in found}, found[-1].parameters
        near = f"{sum(r.near_right for r in found)} of {sum(r.near for r in found)}"
        size = "" if size is None else f"{size / 1e6:.2f}M"
        lines.append((model, size, seed, task, *(shares.get(T, "") for T in lengths), near))
    title = (
        f"Answers right in %, with the 95 % interval, by length; trained at {mine[0].train_length} tokens at most; "
        "near: needles in the last, unfinished chunk, which count here only"
    )
    names = ("model", "parameters", "seed", "task", *map(length_label, lengths), "near")
    show_table(console, title, names, lines, right=(1, *range(4, len(names))))
    picture = out / ("lengths.png" if rows[0].recipe == RECIPE else f"lengths-{rows[0].recipe}.png")
    written = [out / "lengths.json", *plot_or_say(console, plot_lengths, rows, chance("needles"), picture)]
    console.print("wrote " + ", ".join(map(str, written)))


def run_lengths(
    console: Console, out: Path, runs: Path, models: list[str], seeds: list[int], lengths: list[int],
    tasks: list[str], *, samples: int = 100, haystacks: int | None = None, budget_s: float = 600.0,
    recipe: str = RECIPE, fair: bool = False,
) -> list[Row]:  # fmt: skip
    """Trains each model for each seed in a folder of runs and asks it; prints a table, writes lengths.json and a plot.

    samples: contexts of each length and task; behind budget_s seconds only those that cost little, see
    evaluate.accuracy. haystacks: that they share, by default each has its own. fair: with the best of RATES for each
    model, which its rows tell if there are any, and no more seeds of it than MODELS says. A context that full attention
    cannot read, or that cannot hold a task's needles, has no row. out/lengths.json grows row by row.
    """
    haystacks = samples if haystacks is None else min(haystacks, samples)
    for task in tasks:
        one_of("task", task, TASKS)
    for model in models:
        one_of("model", model, MODELS)
    base = load_recipe(recipe)
    require(tokenizer_of(base.stages[-1].data).name == "needles", "recipe", "be one of needles", repr(recipe))
    plans = {(m, s): recipe_of(m, s, recipe) for s in seeds for m in models if not fair or s < MODELS[m].seeds}
    rates = len(RATES) if fair else 1
    path, trained_on = out / "lengths.json", base.name
    rows = read_rows(path)
    whose = {m: MODELS[m].weights_of or m for m in MODELS}
    tried = {whose[r.model]: r.lr / base.lr for r in rows if (r.recipe, r.rates) == (trained_on, len(RATES))}
    key = lambda r: (r.model, r.seed, r.task, r.length)  # noqa: E731
    enough = (r for r in rows if r.samples >= samples or r.seconds >= budget_s)
    done = {key(r) for r in enough if (r.recipe, r.haystacks, r.rates) == (trained_on, haystacks, rates)}
    with progress_bar(console) as bar:
        step = bar.add_task("train", total=None)

        def on_step(done: Step) -> None:
            what = f"train: stage {done.stage + 1}, loss {done.loss:.3f}"
            bar.update(step, completed=done.step + 1, description=what)

        best_rate = cache(partial(_best_rate, recipe=recipe, runs=runs, on_step=on_step))
        for (name, seed), plan in plans.items():
            known = [T for T in lengths if plan.config().attention != "full" or T <= ONE_SHOT]
            todo = [(t, T) for t in tasks for T in known if needles.fits(t, T) and (name, seed, t, T) not in done]
            if not todo:
                continue
            if fair:
                plan = recipe_of(name, seed, recipe, tried.get(whose[name]) or best_rate(whose[name]))
            model, seconds = _trained(plan, run_folder(runs, plan), on_step)
            about = {"model": name, "train_seconds": round(seconds, 1), "recipe": trained_on, "rates": rates}
            for task, T in todo:
                row = _ask(LongReader(model), plan, task, T, samples, budget_s, haystacks, **about)
                out.mkdir(parents=True, exist_ok=True)
                with locked(out):  # another process may ask other models
                    asked = trained_on, rates, *key(row)
                    rows = [r for r in read_rows(path) if (r.recipe, r.rates, *key(r)) != asked]
                    write_rows(path, rows := [*rows, row])
                bar.update(step, description=f"{name} {seed}: {task} {length_label(T)}")
    rows = [r for r in rows if (r.recipe, r.rates) == (trained_on, rates)]
    mine = [r for r in rows if (r.model, r.seed) in plans and r.task in tasks]
    if not mine:
        raise ValueError(f"lengths must hold one that {', '.join(models)} can read, got {', '.join(map(str, lengths))}")
    _show(console, out, mine, rows)
    return mine


def ask_shipped(console: Console, out: Path, lengths=DEMO_LENGTHS, samples: int = 40, name: str = RECIPE) -> None:
    """Asks the weights that ship with the package, live, at every length: the last act of `hsa-tl demo`."""
    shipped, reader, rows = pretrained.shipped(name), LongReader(load(name)), []
    plan = recipes.recipe_of(shipped.recipe)
    about = {"model": "hsa", "train_seconds": shipped.train_seconds, "recipe": name}
    with progress_bar(console) as bar:
        step = bar.add_task("ask", total=len(lengths) * len(DEMO_TASKS))
        for T in lengths:  # a length is read once: its haystack is the same for each task and sample
            for task in DEMO_TASKS:
                bar.update(step, description=f"ask: {task} {length_label(T)}")
                rows.append(_ask(reader, plan, task, T, samples, DEMO_BUDGET_S, **about))
                bar.advance(step)
    rows.sort(key=lambda r: (TASKS.index(r.task), r.length))
    write_rows(out / "lengths.json", rows)
    _show(console, out, rows, rows)
    _say_reads(console, rows)


def train_and_ask(console: Console, out: Path, recipe: str = RECIPE, lengths=DEMO_LENGTHS, samples=100) -> None:
    """Trains one seed from scratch and asks it at every length."""
    (out / "lengths.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        rows = run_lengths(
            console, out, Path(runs), ["hsa"], [0], lengths, DEMO_TASKS, samples=samples, haystacks=1, recipe=recipe
        )
    console.print(f"trained in {rows[0].train_seconds:.0f} s")
    _say_reads(console, rows)


def _say_reads(console: Console, rows: list[Row]) -> None:
    console.print(f"at any length a query reads {rows[0].read_tokens} retrieved tokens and its window")


def make_weights(
    console: Console, folder: Path, recipe: str = RECIPE, seed: int = 0, lengths=DEMO_LENGTHS, samples: int = 100
) -> list[Path]:
    """Trains a recipe of needles from nothing and asks it; writes its weights with where they come from and scored."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        rows = run_lengths(
            console, out, out, ["hsa"], [seed], lengths, DEMO_TASKS, samples=samples, haystacks=1, recipe=recipe
        )
        scores = [{k: getattr(r, k) for k in ("task", "length", "accuracy", "answers")} for r in rows]
        source = {k: getattr(rows[0], k) for k in ("train_seconds", "device", "versions", "commit")}
        run = run_folder(out, recipe_of("hsa", seed, recipe))
        return pretrained.save_weights(run, folder, rows[0].recipe, accuracy=scores, **source)
