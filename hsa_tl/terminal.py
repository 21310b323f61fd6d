"""What the commands share: tables, progress, one-line errors, and the ranges of their numbers."""

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

WIDTH = 100
UNITS = {"k": 1 << 10, "m": 1 << 20}
MOST_TOKENS = 1 << 40
EVERY_S = 10.0  # a line of progress where there is no terminal
YEAR_MINUTES = 366 * 24 * 60
TRACEBACK = "HSA_TL_TRACEBACK"  # shows where a fault of hsa-tl's own lies
UsageError = typer.BadParameter.__base__
# What the user got wrong or what is missing.
EXPECTED = UsageError, ValueError, TypeError, NotImplementedError, ImportError, OSError, ArithmeticError, MemoryError


def _not_nan(value):
    """Of a number or None: a range lets nan pass."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("must be a number, got nan")
    return value


def number(*names: str, low: float, high: float, help: str) -> Any:
    """A typer.Option of an int or a float in [low, high]."""
    return typer.Option(*names, min=low, max=high, help=help, callback=_not_nan)


def threads_option() -> Any:
    return number(low=1, high=1024, help="CPU threads")


def seed_option(help: str) -> Any:
    return number(low=0, high=2**63 - 1, help=help)


def minutes_option(help: str) -> Any:
    return number(low=0, high=YEAR_MINUTES, help=help)


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


def say(console: Console, *lines: str) -> None:
    """Prints lines as they are."""
    for line in lines:
        console.print(line, markup=False, highlight=False)


class _Lines(Progress):
    """Progress as lines: the state each EVERY_S seconds, whatever happens in between."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self.told = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def update(self, task_id: TaskID, **changes) -> None:
        super().update(task_id, **changes)
        if time.monotonic() < self.told + EVERY_S:
            return
        self.told, task = time.monotonic(), self.tasks[task_id]
        count = f"{task.completed}" + (f" of {task.total}" if task.total else "")
        self.console.print(f"{task.description}: {count}", markup=False, highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        return _Lines(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def plot_or_say(console: Console, function: Callable, *args):
    """What a plot function returns, its files; [] and one line that says what is missing where it cannot."""
    try:
        return function(*args)
    except ValueError as error:
        say(console, f"no plot: {error}")
        return []


class Commands(TyperGroup):
    """The commands of hsa-tl, none of which ends in a traceback.

    What the user got wrong or what is missing is one line on stderr, exit code 2; a signal, 128 + its number. A fault
    of hsa-tl's own is one line too, exit code 1; with HSA_TL_TRACEBACK=1 its traceback.
    """

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:
            typer.echo(str(stop) or "interrupted", err=True)
            raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
        except Exception as error:
            usage, system = isinstance(error, UsageError), isinstance(error, OSError)
            if not usage and (os.environ.get(TRACEBACK) or (system and error.errno == errno.EPIPE)):
                raise
            if usage:
                message = error.format_message()
            elif system and error.filename is not None:
                message = f"{error.filename}: {error.strerror}"
            elif isinstance(error, EXPECTED):
                message = str(error) or type(error).__name__
            else:
                message = f"{type(error).__name__}: {error}; {TRACEBACK}=1 shows where"
            typer.echo(f"error: {' '.join(message.split())}", err=True)
            raise typer.Exit(2 if isinstance(error, EXPECTED) else 1) from None


def parse_length(text: str) -> int:
    """ "4096", "4k" or "1m" to a number of tokens."""
    body = text.strip().lower()
    unit = UNITS.get(body[-1:], 1)
    body = body if unit == 1 else body[:-1]
    if not body.isdecimal() or len(body) > 15 or int(body) == 0:
        raise ValueError(f"lengths must be numbers such as 4096, 4k or 1m, got {text!r}")
    if int(body) * unit > MOST_TOKENS:
        raise ValueError(f"lengths must be at most {MOST_TOKENS >> 20}m, got {text!r}")
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


DTYPES = ("float32", "bfloat16", "float16")


def pick_dtype(name: str) -> torch.dtype:
    """ValueError: none of DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)
