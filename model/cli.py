"""The model's commands of hsa-tl."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from hsa_tl.bench.lengths import MODELS
from hsa_tl.bench.needle_demo import run_needles
from hsa_tl.model import checkpoint, data
from hsa_tl.model import train as training
from hsa_tl.model.recipe import load_recipe
from hsa_tl.terminal import make_console, one_line_errors, parse_lengths, progress_bar, show_table

console = make_console()


def prepare(
    folders: Annotated[
        Optional[list[Path]], typer.Argument(help="folders of text; by default Python's standard library")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of train.bin and held_out.bin")] = Path("out/data"),
    tokenizer: Annotated[
        Optional[Path], typer.Option(help="a Hugging Face tokenizer.json; by default one token a byte")
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of the files that training never sees")] = 0.1,
) -> None:
    """Text to memory-mapped token files, split by file into train and held-out."""
    with one_line_errors(), progress_bar(console) as bar:
        step = bar.add_task("tokenize", total=None)
        files = data.prepare(
            folders or None, out, data.make_tokenizer(tokenizer), held_out=held_out,
            progress=lambda done, total: bar.update(step, completed=done, total=total),
        )  # fmt: skip
    rows = [(f.path.stem, f.sidecar.documents, len(f), f.sidecar.dtype) for f in files.values()]
    title = f"Token files in {out}, {files['train'].sidecar.tokenizer}"
    show_table(console, title, ("split", "documents", "tokens", "type"), rows, right=(1, 2))


def train(
    recipe: Annotated[str, typer.Argument(help="one of hsa-tl's recipes, or a YAML file")],
    out: Annotated[Optional[Path], typer.Option(help="folder of the run; by default out/train/RECIPE")] = None,
    seed: Annotated[Optional[int], typer.Option(help="instead of the recipe's")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Trains a recipe. Resumes from the newest whole checkpoint in the folder, to the bit."""
    with one_line_errors():
        chosen = load_recipe(recipe)
        chosen = chosen if seed is None else dataclasses.replace(chosen, seed=seed)
        run = Path("out/train") / chosen.name if out is None else out
        torch.set_num_threads(threads)
        with progress_bar(console) as bar:
            task = bar.add_task("", total=chosen.steps)

            def on_step(step: training.Step) -> None:
                line = f"stage {step.stage + 1}/{len(chosen.stages)} loss {step.loss:.3f}"
                bar.update(task, completed=step.step + 1, description=line)

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", checkpoint.TornCheckpoint)
                training.train(chosen, run, device=device, on_step=on_step)
    for warning in caught:
        console.print(str(warning.message), markup=False, highlight=False)
    lines = [json.loads(x) for x in (run / training.LOG).read_text().splitlines()]
    rows = [(x["step"], x["stage"] + 1, f"{x['loss']:.4f}", f"{x['lr']:.2e}", f"{x['seconds']:.2f}") for x in lines]
    show_table(
        console,
        f"{chosen.name}, {chosen.steps} steps",
        ("step", "stage", "loss", "lr", "seconds"),
        rows[:: max(1, len(rows) // 10)],
        right=(0, 1, 2, 3, 4),
    )
    console.print(f"wrote {run}")


def lengths(
    models: Annotated[str, typer.Option(help="any of hsa, full-rope, swa, nsa, nsa-rope")] = ",".join(MODELS),
    seeds: Annotated[int, typer.Option(help="seeds 0, 1, ... of each model")] = 5,
    lengths: Annotated[str, typer.Option(help="tokens, 256,4k or 4k..1m, which doubles")] = "256,4k,32k,256k,1m",
    tasks: Annotated[str, typer.Option(help="s-niah, mq-niah, mk-niah-3")] = "s-niah,mq-niah,mk-niah-3",
    samples: Annotated[int, typer.Option(help="contexts of each length and task")] = 100,
    budget: Annotated[float, typer.Option(help="seconds after which a length and task gets no further context")] = 60.0,
    recipe: Annotated[str, typer.Option(help="what each model is trained on")] = "needle-tiny",
    out: Annotated[Path, typer.Option(help="folder of lengths.json and lengths.png")] = Path("bench/results/cpu"),
    runs: Annotated[Path, typer.Option(help="folder of the training runs")] = Path("out/train/lengths"),
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Trains HSA and the baselines on needles and measures their accuracy by length. Resumes from what is there."""
    with one_line_errors():
        torch.set_num_threads(threads)
        run_needles(
            console, out, runs, models.split(","), list(range(seeds)), parse_lengths(lengths), tasks.split(","),
            samples=samples, budget_s=budget, recipe=recipe,
        )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(prepare)
    app.command()(train)
    app.command()(lengths)
