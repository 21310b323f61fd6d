"""The last act of `hsa-tl demo`: a tiny model that learned to retrieve at 256 tokens is asked at a million."""

import tempfile
from pathlib import Path

from rich.console import Console

from hsa_tl.bench.lengths import Row, ask, plot_lengths, recipe_of, run_folder, run_lengths, write_rows
from hsa_tl.bench.plot import length_label
from hsa_tl.model import load, pretrained
from hsa_tl.model import recipe as recipes
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.train import Step
from hsa_tl.terminal import plot_or_say, progress_bar, show_table

LENGTHS = (256, 1 << 12, 1 << 15, 1 << 18, 1 << 20)
TASKS = ("s-niah", "mq-niah")
BUDGET_S = 15.0  # of each length and task, behind which a slow machine takes fewer samples


def show_rows(console: Console, rows: list[Row], title: str) -> None:
    """Accuracy by length: a line for each model, seed and task."""
    lengths = sorted({r.length for r in rows})
    at = {(r.model, r.seed, r.task, r.length): f"{100 * r.accuracy:.1f}" for r in rows}
    lines = [
        (*key, *(at.get((*key, T), "") for T in lengths))
        for key in dict.fromkeys((r.model, r.seed, r.task) for r in rows)
    ]
    names = ("model", "seed", "task", *map(length_label, lengths))
    show_table(console, title, names, lines, right=tuple(range(3, 3 + len(lengths))))


def show_written(console: Console, out: Path, mine: list[Row], rows: list[Row]) -> None:
    """The table of mine; a plot of rows, all of one recipe."""
    name = rows[0].recipe
    show_rows(console, mine, f"Answers right in %, by length; trained at {mine[0].train_length} tokens at most")
    picture = out / ("lengths.png" if name == "needle-tiny" else f"lengths-{name}.png")
    written = [out / "lengths.json", *plot_or_say(console, plot_lengths, rows, picture)]
    console.print("wrote " + ", ".join(map(str, written)))


def run_needles(
    console: Console, out: Path, runs: Path, models: list[str], seeds: list[int], lengths: list[int],
    tasks: list[str], **options,
) -> list[Row]:  # fmt: skip
    """run_lengths with a progress bar; prints its table, writes out/lengths.json and lengths.png."""
    with progress_bar(console) as bar:
        step = bar.add_task("train", total=None)

        def on_step(done: Step) -> None:
            bar.update(
                step, completed=done.step + 1, description=f"train: stage {done.stage + 1}, loss {done.loss:.3f}"
            )

        def on_row(row: Row) -> None:
            bar.update(step, description=f"{row.model} {row.seed}: {row.task} {length_label(row.length)}")

        rows = run_lengths(out, runs, models, seeds, lengths, tasks, on_step=on_step, on_row=on_row, **options)
    name = recipes.load_recipe(options.get("recipe", "needle-tiny")).name
    rows = [r for r in rows if r.recipe == name]
    mine = [r for r in rows if r.model in models and r.seed in seeds and r.task in tasks]
    if not mine:
        raise ValueError(f"lengths must hold one that {', '.join(models)} can read, got {', '.join(map(str, lengths))}")
    show_written(console, out, mine, rows)
    return mine


def ask_shipped(console: Console, out: Path, lengths=LENGTHS, samples: int = 25, name: str = "needle-tiny") -> None:
    """Asks the weights that ship with the package, live, at every length."""
    about, model = pretrained.shipped(name), load(name)
    plan, reader = recipes.recipe_of(about.recipe), LongReader(model)
    # A length is read once: its haystack is the same for each task and sample.
    points = [(task, T) for T in lengths for task in TASKS]
    with progress_bar(console) as bar:
        step = bar.add_task("ask", total=len(points))
        rows = []
        for task, T in points:
            bar.update(step, description=f"ask: {task} {length_label(T)}")
            rows.append(ask(reader, "hsa", plan, task, T, samples, BUDGET_S, about.train_seconds, name))
            bar.advance(step)
    rows.sort(key=lambda r: (TASKS.index(r.task), r.length))
    write_rows(out / "lengths.json", rows)
    show_written(console, out, rows, rows)
    _say_reads(console, rows)


def train_and_ask(console: Console, out: Path, recipe: str = "needle-tiny", lengths=LENGTHS, samples=100) -> None:
    """Trains one seed from scratch and asks it at every length."""
    (out / "lengths.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        rows = run_needles(
            console, out, Path(runs), ["hsa"], [0], list(lengths), list(TASKS), samples=samples, recipe=recipe
        )
    console.print(f"trained in {rows[0].train_seconds:.0f} s")
    _say_reads(console, rows)


def _say_reads(console: Console, rows: list[Row]) -> None:
    console.print(f"at any length a query reads {rows[0].read_tokens} retrieved tokens and its window")


def make_weights(
    console: Console, folder: Path, recipe: str = "needle-tiny", seed: int = 0, lengths=LENGTHS, samples: int = 100
) -> list[Path]:
    """Trains a recipe of needles from nothing and asks it; writes its weights with where they come from and scored."""
    plan, name = recipe_of("hsa", seed, recipe), recipes.load_recipe(recipe).name
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary) / "runs"
        rows = run_needles(
            console, Path(temporary), runs, ["hsa"], [seed], list(lengths), list(TASKS), samples=samples, recipe=recipe
        )
        scores = [{k: getattr(r, k) for k in ("task", "length", "accuracy", "answers")} for r in rows]
        origin = {k: getattr(rows[0], k) for k in ("train_seconds", "device", "versions", "commit")}
        return pretrained.save_weights(run_folder(runs, plan), folder, name, accuracy=scores, **origin)
