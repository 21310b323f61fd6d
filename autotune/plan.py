"""The plan of a call: the programs of its direction with their configs. A pure function, computed once for each class.

A class is (direction, static dims, B, H, length bucket, overlap in tenths, what config= names, deterministic, device).
The order, in which the first that has a plan gives it:

1. caller: config= names the programs; the fields that it leaves open are predicted.
2. user: the user's own table has a measured row (`hsa-tl autotune`, HSA_TL_TUNING=tune).
3. shipped: the package's table of this device has one.
4. predicted: the strategy of least cost.planned_ns.

On the CPU target, where nothing but the arithmetic is of interest, the first strategy runs.
HSA_TL_TUNING=table (the default) is this order; heuristic skips 2 and 3; error raises where they have no row; tune
measures where they have none, on a GPU, and keeps the best in the user's table, but for a device that the caller names.
"""

import functools
import importlib
import itertools
import json
import os
from dataclasses import dataclass

import torch

from hsa_tl.autotune import cost, table
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem

# Direction -> what the programs of a strategy compute, one after the other: of `hsa_attention`, `selected_attention`.
DIRECTIONS = {
    "forward": (("forward",),),
    "backward": (("dq", "dkdv"), ("backward",)),
    "selected_forward": (("selected_forward",),),
    "selected_backward": (("selected_backward",),),
}
OVERLAP = 0.9  # of neighbouring tokens' selections where config= says nothing: an assumption
MODES = ("table", "heuristic", "tune", "error")


@functools.cache
def strategies(direction: str) -> tuple[tuple[str, ...], ...]:
    """The programs that compute a direction together, of what is registered; in the order of preference."""
    does = {name: configs.config_of(name).DIRECTION for name in configs.planned()}
    parts = [[[name for name in does if does[name] == part] for part in parts] for parts in DIRECTIONS[direction]]
    return tuple(strategy for names in parts for strategy in itertools.product(*names))


@dataclass(frozen=True)
class Plan:
    """What a direction of a call runs."""

    programs: tuple[tuple[str, Config], ...]
    origin: str  # caller, user, shipped, predicted or cpu
    ns_per_pair: float | None = None  # measured or predicted; None where the caller or the CPU target decides


def mode() -> str:
    """HSA_TL_TUNING; ValueError if it is none of MODES."""
    value = os.environ.get("HSA_TL_TUNING") or "table"
    if value not in MODES:
        raise ValueError(f"HSA_TL_TUNING must be one of {', '.join(MODES)}, got {value!r}")
    return value


def choose(
    direction: str, problem: Problem, config: str = "", deterministic: bool = False, device: str | None = None
) -> Plan:
    """The plan of a call; config is config= in JSON, device a name of cost.DEVICES in place of the problem's GPU.

    ValueError: config names an unknown program or field, two strategies, or fields that do not suit the problem.
    """
    return _choose(direction, problem.bucketed(), config, deterministic, device, mode())


@functools.lru_cache(maxsize=4096)
def _choose(direction: str, p: Problem, config: str, deterministic: bool, device: str | None, setting: str) -> Plan:
    named = json.loads(config or "{}")
    overlap = round(named.pop("overlap", OVERLAP), 1)
    operator = direction.removesuffix("forward").removesuffix("backward")
    known = dict.fromkeys(name for x in ("forward", "backward") for s in strategies(operator + x) for name in s)
    for program, fields in named.items():
        if program not in known:
            raise ValueError(f"config must name programs among {', '.join(known)}, got {program!r}")
        configs.from_dict(program, fields)
    asked = [s for s in strategies(direction) if any(program in named for program in s)]
    if len(asked) > 1:
        raise ValueError(f"config must name one strategy for the {direction}, got {' and '.join(map(str, asked))}")
    here = cost.DEVICES[device] if device else None if p.device_type == "cpu" else cost.device_here(p.device_index)
    if asked:
        return _named(asked[0], p, overlap, deterministic, named, here)
    if p.device_type == "cpu":
        return Plan(tuple((name, configs.default(name, p)) for name in strategies(direction)[0]), "cpu")
    if setting != "heuristic":
        known = device or cost.device_name(p.device_index)
        for origin, rows in (("user", table.users), ("shipped", table.shipped)) if known else ():
            if found := _fastest(origin, rows(known), direction, p, overlap, deterministic):
                return found
        if setting == "tune" and device is None:
            return _tuned(direction, p, overlap, deterministic, known)
        if setting == "error":
            raise LookupError(
                f"HSA_TL_TUNING=error: the table of {known or 'this GPU'} must have a row of the {direction} for {p} "
                f"at overlap {overlap}, got none; make one by hsa-tl autotune"
            )
    return predicted(strategies(direction), p, overlap, deterministic, here)


def _named(strategy: tuple[str, ...], p: Problem, overlap: float, deterministic: bool, named: dict, here) -> Plan:
    """The caller's strategy, with the caller's fields where it gives any."""
    chosen = {}
    for name in strategy:
        if p.device_type == "cpu" and (reason := configs.cpu_refusal(name)):
            raise NotImplementedError(reason)
        if fields := named.get(name):
            chosen[name] = configs.from_dict(name, fields)
            if p.device_type == "cuda" and (reason := configs.why_illegal(name, p, chosen[name])):
                raise ValueError(f"config of {name} must suit {p}: {reason}")
        elif p.device_type == "cpu":
            chosen[name] = configs.default(name, p)
        else:
            chosen |= predicted(((name,),), p, overlap, deterministic, here).programs
    if deterministic and any(c.reduce_add for c in chosen.values()):
        raise ValueError("config must have reduce_add=0 with deterministic=True, got 1")
    return Plan(tuple(chosen.items()), "caller")


def _fastest(origin: str, rows, direction: str, p: Problem, overlap: float, deterministic: bool) -> Plan | None:
    """Of the table's rows that suit the call."""
    found = []
    for row in rows:
        if table.suits(row, direction, p, overlap, deterministic):
            programs = table.programs(row)
            if all(configs.why_illegal(name, p, c) is None for name, c in programs):
                found.append(Plan(programs, origin, row["ns_per_pair"]))
    return min(found, key=lambda plan: plan.ns_per_pair, default=None)


def predicted(among, p: Problem, overlap: float, deterministic: bool, device: cost.Device) -> Plan:
    """The strategy of least predicted time, each of its programs with its best config."""
    plans = []
    for strategy in among:
        legal = [[c for c in configs.space(name, p) if not (deterministic and c.reduce_add)] for name in strategy]
        if all(legal):
            best = [min(options, key=lambda c: cost.planned_ns(c, p, device, overlap)) for options in legal]
            ns = sum(cost.planned_ns(c, p, device, overlap) for c in best)
            plans.append(Plan(tuple(zip(strategy, best, strict=True)), "predicted", ns))
    if not plans:
        names = " or ".join(" and ".join(s) for s in among)
        raise NotImplementedError(f"{names} has no config for {p}; name another program in config=")
    return min(plans, key=lambda plan: plan.ns_per_pair)


def _tuned(direction: str, p: Problem, overlap: float, deterministic: bool, device: str | None) -> Plan:
    """Measures the plans here, keeps the best in the user's table, and returns that of the call's class."""
    if device is None:
        raise NotImplementedError(
            f"HSA_TL_TUNING=tune measures on one of {', '.join(cost.DEVICES)}, got {p.device_type} tensors without "
            "such a GPU; use table or heuristic"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("HSA_TL_TUNING=tune must see each problem before a CUDA graph is captured, got a capture")
    rows = importlib.import_module("hsa_tl.autotune.measure").tune(direction, p, device)
    found = _fastest("user", rows, direction, p, overlap, deterministic)
    if found is None:
        raise RuntimeError(f"HSA_TL_TUNING=tune: no candidate for the {direction} of {p} passed its check")
    return found


def clear() -> None:
    """Forgets plans and tables that were read: for who writes a table and goes on in the same process."""
    _choose.cache_clear()
    table.users.cache_clear()
    table.shipped.cache_clear()
