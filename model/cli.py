"""The model's commands of hsa-tl."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console

from hsa_tl.model import checkpoint, data
from hsa_tl.model import train as training
from hsa_tl.model.recipe import load_recipe
from hsa_tl.terminal import (
    make_console,
    pick_device,
    progress_bar,
    show_table,
)

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
    with progress_bar(console) as bar:
        step = bar.add_task("tokenize", total=None)
        files = data.prepare(
            folders or None, out, data.make_tokenizer(tokenizer), held_out=held_out,
            progress=lambda done, total: bar.update(step, completed=done, total=total),
        )  # fmt: skip
    rows = [(f.path.stem, f.sidecar.documents, len(f), f.sidecar.dtype) for f in files.values()]
    title = f"Token files in {out}, {files['train'].sidecar.tokenizer}"
    show_table(console, title, ("split", "documents", "tokens", "type"), rows, right=(1, 2))


@contextlib.contextmanager
def _lost_ranks():
    """Of several ranks: a collective that failed since another rank is gone, in one line, and exit code 1."""
    try:
        yield
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, NotImplementedError):
            raise
        message = str(error).splitlines()[0][:200]
        typer.echo(f"error: rank {os.environ['RANK']} stops, another one failed or is gone: {message}", err=True)
        raise typer.Exit(1) from None


def train(
    recipe: Annotated[str, typer.Argument(help="one of hsa-tl's recipes, or a YAML file")],
    out: Annotated[Optional[Path], typer.Option(help="folder of the run; by default out/train/RECIPE")] = None,
    seed: Annotated[Optional[int], typer.Option(help="instead of the recipe's")] = None,
    attention: Annotated[Optional[str], typer.Option(help="hsa, or a baseline: full, swa or nsa")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; by default cuda where there is a GPU")] = None,
    context_parallel: Annotated[int, typer.Option(help="ranks that share each sequence's tokens")] = 1,
    minutes: Annotated[
        float, typer.Option(help="ends with a checkpoint behind them; the next call goes on")
    ] = math.inf,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Trains a recipe. Resumes from the newest whole checkpoint in the folder, to the bit.

    On many ranks: torchrun --nproc-per-node 4 -m hsa_tl.cli train RECIPE. Parameters are sharded over all ranks. A
    rank that dies ends the run; any number of ranks goes on with it.
    """
    console = make_console() if os.environ.get("RANK", "0") == "0" else Console(quiet=True)
    with _lost_ranks():
        device = pick_device(device)
        chosen = load_recipe(recipe)
        chosen = chosen if seed is None else dataclasses.replace(chosen, seed=seed)
        if attention is not None:
            model = chosen.model | {"attention": attention}
            chosen = dataclasses.replace(chosen, name=f"{chosen.name}-{attention}", model=model)
        run = Path("out/train") / chosen.name if out is None else out
        torch.set_num_threads(threads)
        with progress_bar(console) as bar:
            task = bar.add_task("", total=chosen.steps)

            def on_step(step: training.Step) -> None:
                line = f"stage {step.stage + 1}/{len(chosen.stages)} loss {step.loss:.3f}"
                bar.update(task, completed=step.step + 1, description=line)

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", checkpoint.TornCheckpoint)
                training.train(
                    chosen, run, device=device, context_parallel=context_parallel, seconds=60 * minutes, on_step=on_step
                )
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


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(prepare)
    app.command()(train)
