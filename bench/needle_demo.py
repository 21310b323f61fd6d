"""The last act of `hsa-tl demo`: a tiny model learns to retrieve at 256 tokens and is asked at a million."""

import tempfile
import time
from pathlib import Path

from rich.console import Console

from hsa_tl.bench.lengths import Row, plot_lengths, run_lengths
from hsa_tl.bench.plot import length_label
from hsa_tl.model.recipe import load_recipe
from hsa_tl.model.train import Step
from hsa_tl.terminal import plot_or_say, progress_bar, show_table

LENGTHS = (256, 1 << 12, 1 << 15, 1 << 18, 1 << 20)
TASKS = ("s-niah", "mq-niah")


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
    name = load_recipe(options.get("recipe", "needle-tiny")).name
    rows = [r for r in rows if r.recipe == name]
    mine = [r for r in rows if r.model in models and r.seed in seeds and r.task in tasks]
    show_rows(console, mine, f"Answers right in %, by length; trained at {mine[0].train_length} tokens at most")
    picture = out / ("lengths.png" if name == "needle-tiny" else f"lengths-{name}.png")
    written = [out / "lengths.json", *plot_or_say(console, plot_lengths, rows, picture)]
    console.print("wrote " + ", ".join(map(str, written)))
    return mine


def run_demo(console: Console, out: Path, recipe: str = "needle-tiny", lengths=LENGTHS, samples: int = 100) -> None:
    """Trains one seed from scratch and asks it at every length."""
    console.print("\n5. Retrieval beyond the training length: a model of 0.6M parameters learns needles in noise")
    start = time.perf_counter()
    (out / "lengths.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        rows = run_needles(
            console, out, Path(runs), ["hsa"], [0], list(lengths), list(TASKS), samples=samples, recipe=recipe
        )
    console.print(
        f"trained in {rows[0].train_seconds:.0f} s, all in {time.perf_counter() - start:.0f} s; at any length a query "
        f"reads {rows[0].read_tokens} retrieved tokens and its window"
    )
