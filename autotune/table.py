"""Tuned tables: one JSON for each device, a readable row a line; and the order in which a config is looked up."""

import functools
import json
from importlib import resources
from pathlib import Path

import torch

from hsa_tl.files import write_atomic
from hsa_tl.kernels_tilelang.config import CONFIGS, from_dict, space, static_key, why_illegal
from hsa_tl.problem import Problem

DEVICES = ("h100", "h200", "h800")
KEY = ("G", "D", "S", "K", "heads_w", "masked", "dtype")  # of static_key


def device_name() -> str | None:
    """The table's name for the current GPU, or None if there is no table for it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((d for d in DEVICES if d in name), None)


def read(path: Path) -> list[dict]:
    """Rows of a table file; [] if there is none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def write(path: Path, device: str, rows: list[dict]) -> None:
    """Writes a table, one row a line, sorted; the file is replaced at once."""
    lines = ",\n".join(sorted(json.dumps(row) for row in rows))
    write_atomic(path, f'{{"device": "{device}", "rows": [\n{lines}\n]}}\n')


def merge(path: Path, device: str, rows: list[dict]) -> None:
    """Writes rows into a table; an old row of the same program, static key and T goes."""

    def identity(row: dict) -> tuple:
        return tuple(row[k] for k in ("program", "T", *KEY))

    new = {identity(r) for r in rows}
    write(path, device, [r for r in read(path) if identity(r) not in new] + rows)


@functools.cache
def shipped(device: str) -> tuple[dict, ...]:
    """Rows of the table that the package ships for a device."""
    with resources.as_file(resources.files("hsa_tl.autotune") / "tables" / f"{device}.json") as path:
        return tuple(read(path))


def lookup(program: str, problem: Problem, device: str) -> dict | None:
    """The row for this program and static key whose T is nearest in ratio, or None."""
    key = static_key(problem)
    same = [r for r in shipped(device) if r["program"] == program and all(r[k] == v for k, v in key.items())]
    return min(same, key=lambda r: max(r["T"], problem.T) / max(1, min(r["T"], problem.T)), default=None)


def heuristic(program: str, problem: Problem):
    """The config without a table: the first of the space, whose order is a preference; on the CPU a small tile."""
    if problem.device_type == "cpu":
        return CONFIGS[program].on_cpu(problem)
    if not (legal := space(program, problem)):
        raise NotImplementedError(f"{program} has no config for {problem}; name another program in config=")
    return legal[0]


def resolve(program: str, problem: Problem, config: dict | None = None, preferred=None):
    """Explicit config if it has fields, else the device's table (nearest T of the same static key), else `preferred`,
    else the heuristic."""
    if config and config.get(program):
        chosen = from_dict(program, config[program])
        reason = why_illegal(program, problem, chosen) if problem.device_type == "cuda" else None
        if reason:
            raise ValueError(f"config of {program} must suit {problem}: {reason}")
        return chosen
    device = device_name() if problem.device_type == "cuda" else None
    row = lookup(program, problem, device) if device else None
    return from_dict(program, row["config"]) if row else preferred or heuristic(program, problem)
