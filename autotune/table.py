"""Tuned tables: one JSON for each device, a readable row a line; and the order in which a config is looked up.

1. config= of the call, where it names the program's fields.
2. HSA_TL_TUNING=table (the default): the row of the same program, static key and T; else of the same static key and
   the T nearest in ratio. At one distance a measured row comes before a static one, the user's own cache before the
   shipped table, the faster before the slower.
3. What the rule of autotune.strategy prefers; else the heuristic: the first config of the program's space.

Where the rule has chosen from the selection's overlap, its choice of the program's RULED fields (the union tile's rows)
stands, and only rows that agree with it count. HSA_TL_TUNING=heuristic skips 2. error: a miss in 2 raises. tune: where
2 has no measured row within a factor of 2 of T, the candidates are measured here and now, on a GPU, and the best is
kept in the user's cache; nothing else than a GPU can do that, so elsewhere it raises. On a CPU there are no tables.
"""

import functools
import importlib
import json
import os
import time
import warnings
from importlib import resources
from pathlib import Path

import torch

from hsa_tl.files import cache_folder, locked, write_atomic
from hsa_tl.kernels_tilelang.config import CONFIGS, TUNED, from_dict, space, static_key, why_illegal
from hsa_tl.problem import Problem

DEVICES = ("h100", "h200", "h800")
KEY = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of static_key
MODES = ("table", "heuristic", "tune", "error")
NEAR = 2.0  # ratio of T within which a measured row is no miss


def device_name() -> str | None:
    """The table's name for the current GPU, or None if there is no table for it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((d for d in DEVICES if d in name), None)


def mode() -> str:
    """HSA_TL_TUNING; ValueError if it is none of MODES."""
    value = os.environ.get("HSA_TL_TUNING") or "table"
    if value not in MODES:
        raise ValueError(f"HSA_TL_TUNING must be one of {', '.join(MODES)}, got {value!r}")
    return value


def ruled(program: str, values: dict) -> tuple:
    """Values of the fields that the rule chooses, of a config as a mapping."""
    config = from_dict(program, values)
    return tuple(getattr(config, name) for name in config.RULED)


def identity(row: dict) -> tuple:
    """A table has one row for each of these."""
    return (*(row[k] for k in ("program", *KEY, "T")), *ruled(row["program"], row["config"]))


def read(path: Path) -> list[dict]:
    """Rows of a table file; [] if there is none. ValueError says what is wrong with the file."""
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            identity(row), row["T"] + 0, row["source"], row["ns_per_pair"], row["median_us"]
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
    """Writes rows into a table; an old row of the same identity goes. Safe among processes."""
    new = {identity(r) for r in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        write(path, device, [r for r in _read_or_set_aside(path) if identity(r) not in new] + rows)


def user_path(device: str) -> Path:
    """The user's own table of a device."""
    return _user_path(device, os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=16)
def _user_path(device: str, *environment: str | None) -> Path:
    return cache_folder() / "tables" / f"{device}.json"


def _stamp(path: Path) -> tuple | None:
    try:
        s = os.stat(path)
    except FileNotFoundError:
        return None
    return s.st_mtime_ns, s.st_size, s.st_ino


@functools.cache
def shipped(device: str) -> tuple[dict, ...]:
    """Rows of the table that the package ships for a device."""
    with resources.as_file(resources.files("hsa_tl.autotune") / "tables" / f"{device}.json") as path:
        return tuple(read(path))


@functools.lru_cache(maxsize=8)
def _rows(device: str, path: Path, stamp: tuple | None) -> dict[tuple, list[tuple[int, dict]]]:
    """(program, static key) -> (0 the user's or 1 shipped, row). The stamp changes with the user's file."""
    mine = []
    if stamp:
        try:
            mine = read(path)
        except ValueError:
            with locked(path.parent):  # by now another process may have written a good one
                mine = _read_or_set_aside(path)
    found: dict[tuple, list] = {}
    for origin, rows in enumerate((mine, shipped(device))):
        for row in rows:
            found.setdefault((row["program"], *(row[k] for k in KEY)), []).append((origin, row))
    return found


def distance(row: dict, problem: Problem) -> float:
    """Ratio of the row's T and the problem's, at least 1."""
    return max(row["T"], problem.T) / max(1, min(row["T"], problem.T))


@functools.lru_cache(maxsize=1024)
def _find(program: str, problem: Problem, wanted: tuple | None, device: str, path: Path, stamp: tuple | None):
    def order(entry: tuple[int, dict]) -> tuple:
        origin, row = entry
        cost = row["median_us"] if row["source"] == "measured" else row["ns_per_pair"]
        return distance(row, problem), row["source"] != "measured", origin, cost

    same = _rows(device, path, stamp).get((program, *static_key(problem).values()), [])
    same = [e for e in same if wanted is None or ruled(program, e[1]["config"]) == wanted]
    same = [e for e in same if why_illegal(program, problem, from_dict(program, e[1]["config"])) is None]
    return min(same, key=order)[1] if same else None


def lookup(program: str, problem: Problem, device: str, preferred=None) -> dict | None:
    """The row for this program and problem, see the top of the file; None on a miss."""
    path = user_path(device)
    wanted = None if preferred is None else tuple(getattr(preferred, name) for name in preferred.RULED)
    return _find(program, problem, wanted, device, path, _stamp(path))


@functools.lru_cache(maxsize=1024)
def heuristic(program: str, problem: Problem):
    """The config without a table: the first of the space, whose order is a preference; on the CPU a small tile."""
    if problem.device_type == "cpu":
        return CONFIGS[program].on_cpu(problem)
    if not (legal := space(program, problem)):
        raise NotImplementedError(f"{program} has no config for {problem}; name another program in config=")
    return legal[0]


def _settled(row: dict, problem: Problem) -> bool:
    """Whether tuning has nothing to add to a row."""
    return row["source"] == "measured" and distance(row, problem) <= NEAR


_TUNING = False  # what a candidate's check runs beside it is looked up, never tuned in turn


def _tuned_now(program: str, problem: Problem, device: str | None, preferred) -> dict:
    """Measures the candidates here, and returns the row that the user's cache has then."""
    global _TUNING
    if device is None:
        raise NotImplementedError(
            f"HSA_TL_TUNING=tune measures on one of {', '.join(DEVICES)}, got {problem.device_type} tensors "
            "without such a GPU; use table or heuristic"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("HSA_TL_TUNING=tune must see each problem before a CUDA graph is captured, got a capture")
    _TUNING = True
    try:
        importlib.import_module("hsa_tl.autotune.measure").tune(program, problem, device)
    finally:
        _TUNING = False
    row = lookup(program, problem, device, preferred)
    if row is None:
        raise RuntimeError(f"HSA_TL_TUNING=tune: no candidate of {program} that suits the selection passed its check")
    return row


def resolve(program: str, problem: Problem, config: dict | None = None, preferred=None):
    """The config to run a program with; the order stands at the top of the file. preferred: the rule's choice."""
    if config and config.get(program):
        chosen = from_dict(program, config[program])
        reason = why_illegal(program, problem, chosen) if problem.device_type == "cuda" else None
        if reason:
            raise ValueError(f"config of {program} must suit {problem}: {reason}")
        return chosen
    setting = mode()
    device = device_name() if problem.device_type == "cuda" else None
    row = None
    if program in TUNED and setting != "heuristic":
        row = lookup(program, problem, device, preferred) if device else None
        if setting == "tune" and not _TUNING and not (row and _settled(row, problem)):
            row = _tuned_now(program, problem, device, preferred)
        if setting == "error" and row is None and problem.device_type == "cuda":
            raise LookupError(
                f"HSA_TL_TUNING=error: the table of {device or 'this GPU'} must have a row of {program} for {problem}, "
                "got none; make one by hsa-tl autotune"
            )
    return from_dict(program, row["config"]) if row else preferred or heuristic(program, problem)
