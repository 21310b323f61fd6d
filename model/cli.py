"""The model's commands of hsa-tl."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from hsa_tl.model import data
from hsa_tl.terminal import make_console, one_line_errors, progress_bar, show_table

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


def register(app: typer.Typer) -> None:
    """Adds the commands to hsa-tl."""
    app.command()(prepare)
