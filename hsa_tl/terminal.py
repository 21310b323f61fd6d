"""What the commands share: tables, progress bars, one-line errors and lengths as words."""

import contextlib
import signal
from collections.abc import Callable

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH = 100
UNITS = {"k": 1 << 10, "m": 1 << 20}


def make_console() -> Console:
    """Colours and the terminal's width on a terminal, WIDTH columns in a pipe or a file."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show_table(console: Console, title: str, names, rows, right: tuple[int, ...] = ()) -> None:
    """Prints a title and a plain table; the columns in `right` are numbers."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(names):
        out.add_column(name, justify="right" if i in right else "left", overflow="fold", no_wrap=name == "program")
    for row in rows:
        out.add_row(*(escape(str(x)) for x in row))
    console.print(escape(title), style="bold", highlight=False)
    console.print(out)


def progress_bar(console: Console) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def plot_or_say(console: Console, function: Callable, *args):
    """What a plot function returns, its files; [] and one line that says what is missing where it cannot."""
    try:
        return function(*args)
    except ValueError as error:
        console.print(f"no plot: {error}", markup=False, highlight=False)
        return []


@contextlib.contextmanager
def one_line_errors():
    """What the user got wrong or what is missing in one line on stderr, exit code 2; a signal, 128 + its number."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        message = f"{error.filename}: {error.strerror}" if named else str(error)
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "interrupted", err=True)
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None


def parse_length(text: str) -> int:
    """ "4096", "4k" or "1m" to a number of tokens."""
    body = text.strip().lower()
    unit = UNITS.get(body[-1:], 1)
    body = body if unit == 1 else body[:-1]
    if not body.isdecimal() or int(body) == 0:
        raise ValueError(f"lengths must be numbers such as 4096, 4k or 1m, got {text!r}")
    return int(body) * unit


def parse_lengths(text: str) -> list[int]:
    """ "1k,2k,4k" or "1k..16k", which doubles; sorted, each once."""
    lengths = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        T = parse_length(first)
        end = parse_length(last) if dots else T
        if end < T:
            raise ValueError(f"lengths must rise from first..last, got {part!r}")
        while end >= T:
            lengths.add(T)
            T *= 2
    return sorted(lengths)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name: str | None) -> str:
    """ValueError if there is no such device here."""
    name = default_device() if name is None else name
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be here: torch sees no CUDA GPU, got 'cuda'; use --device cpu")
    return name
