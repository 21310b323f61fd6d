"""Measured tables: one JSON for each device, a readable row a line. The order of choice is in autotune.plan.

A row is a plan of a direction, whole: timed through the public operator with its index building and sums. It serves
lengths T[0] to T[1] and overlaps overlap[0] to overlap[1] of its static key, and deterministic=True if it adds nothing
atomically. Tables are read once a process.
"""

import functools
import json
import os
import time
import warnings
from importlib import resources
from pathlib import Path

from hsa_tl.files import cache_folder, locked, write_atomic
from hsa_tl.kernels_tilelang.config import from_dict
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem

KEY = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of Problem.static_key


def programs(row: dict) -> tuple[tuple[str, Config], ...]:
    """The plan's programs with their configs."""
    return tuple((name, from_dict(name, fields)) for name, fields in row["programs"].items())


def identity(row: dict) -> tuple:
    """A table has one row for each of these."""
    return (row["direction"], *(row[k] for k in KEY), row["deterministic"], *row["T"], *row["overlap"])


def suits(row: dict, direction: str, problem: Problem, overlap: float, deterministic: bool) -> bool:
    (low, high), (least, most) = row["T"], row["overlap"]
    same = row["direction"] == direction and problem.static_key().items() <= row.items()
    return same and low <= problem.T <= high and least <= overlap <= most and row["deterministic"] >= deterministic


def read(path: Path) -> list[dict]:
    """Rows of a table file; [] if there is none. ValueError says what is wrong with the file."""
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            programs(row), [x + 0 for x in identity(row)[-4:]], row["ns_per_pair"] + row["median_us"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a tuned table, got {type(error).__name__}: {error}") from None
    return rows


def write(path: Path, device: str, rows: list[dict]) -> None:
    """Writes a table, one row a line, sorted; the file is replaced at once."""
    lines = ",\n".join(json.dumps(row) for row in sorted(rows, key=identity))
    write_atomic(path, f'{{"device": "{device}", "rows": [\n{lines}\n]}}\n')


def _read_or_set_aside(path: Path) -> list[dict]:
    """As read(), under the lock; a file that is no table is renamed, with a warning."""
    try:
        return read(path)
    except ValueError as error:
        aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
        os.replace(path, aside)
        warnings.warn(f"{error}; set aside as {aside.name}", stacklevel=2)
        return []


def merge(path: Path, device: str, rows: list[dict]) -> None:
    """Writes rows into a table. An old row of the same identity goes, and one that adds atomically where a new one that
    does not is the fastest of both. Safe among processes."""
    new = {identity(r | {"deterministic": ordered}) for r in rows for ordered in (r["deterministic"], False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        write(path, device, [r for r in _read_or_set_aside(path) if identity(r) not in new] + rows)


def user_path(device: str) -> Path:
    return cache_folder() / "tables" / f"{device}.json"


@functools.cache
def users(device: str) -> tuple[dict, ...]:
    """Rows of the user's own table; one that is poisoned is set aside."""
    path = user_path(device)
    try:
        return tuple(read(path))
    except ValueError:
        with locked(path.parent):  # by now another process may have written a good one
            return tuple(_read_or_set_aside(path))


@functools.cache
def shipped(device: str) -> tuple[dict, ...]:
    """Rows of the table that the package ships for a device: none yet, for nothing has been measured."""
    with resources.as_file(resources.files("hsa_tl.autotune") / "tables" / f"{device}.json") as path:
        return tuple(read(path))
