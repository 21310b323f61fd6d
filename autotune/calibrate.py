"""Fits a device's assumed constants to what was measured on it, and says how well predictions rank."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from hsa_tl.autotune import cost, measure, static
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench import record
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem

PRIOR = 0.05  # weight of a constant's old value, against one measurement: what no row depends on stays
STEP = 1e-4  # of the numerical derivative, relative to a constant's logarithm


@dataclass(frozen=True)
class Sample:
    """One plan on one selection: what cost.predict takes of each of its programs, and what was measured."""

    strategy: tuple[str, ...]
    parts: tuple[tuple[Config, int, dict | None], ...]  # config, CTAs of an SM, work
    problem: Problem
    overlap: float
    ns_per_pair: float


def problem_of(name: dict) -> Problem:
    """The problem of a measurement's identity in the journal."""
    B, T, H, G, S = (name[k] for k in ("B", "T", "H", "G", "S"))
    return Problem(
        B=B, T=T, N=-(-T // S), HQ=G * H, H=H, D=name["D"], S=S, K=name["K"], dtype=getattr(torch, name["dtype"]),
        masked=name["masked"], per_head=name["heads_w"] == G > 1,
    )  # fmt: skip


def samples(journal: Journal, device: str) -> list[Sample]:
    """The measurements of a device that have a static record of the same source beside them."""
    found = []
    for name, entry in journal.all(kind="measured", device=device):
        problem = problem_of(name)
        try:
            programs = [(program, configs.parse(program, config)) for program, config in name["programs"].items()]
        except ValueError:  # of a program or a field that is no more
            continue
        read = [journal.get({"kind": "static", **static.identity(x, problem, config)}) for x, config in programs]
        if entry.get("error") or None in read or any(x["error"] for x in read) or not entry["rounds"]:
            continue
        if [x["made_with"]["source"] for x in read] != list(name["source"].values()):
            continue
        parts = tuple((c, max(1, x["ctas_per_sm"]), x["work"]) for (_, c), x in zip(programs, read, strict=True))
        overlaps = measure.overlaps(problem)
        for selection, rounds in entry["rounds"].items():
            ns = 1e3 * float(np.median(rounds)) / problem.pairs
            found.append(Sample(tuple(name["programs"]), parts, problem, overlaps[selection], ns))
    return found


def predictions(samples: Iterable[Sample], device: cost.Device) -> np.ndarray:
    """ns for each pair of each sample."""
    return np.array(
        [sum(cost.predict(c, s.problem, n, work, device, s.overlap)[0] for c, n, work in s.parts) for s in samples]
    )


def agreement(samples: list[Sample], device: cost.Device) -> float:
    """Spearman's rank correlation of prediction and measurement; nan where either has no two different values."""
    from scipy.stats import spearmanr

    a, b = predictions(samples, device), [s.ns_per_pair for s in samples]
    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else float("nan")


def measured(rows: Iterable[record.Row], device: cost.Device) -> cost.Device:
    """The device with what the suites micro and roofline measured, which then is no longer free to be fitted."""
    rows = [r for r in rows if r.kernel == "roofline" and r.p50]

    def best(*wanted: str, of=max) -> float:
        return of((r.p50 for r in rows if (r.provider, r.metric) == wanted), default=float("nan"))

    found = {
        "hbm": 1e9 * best("copy", "bandwidth"),
        "l2": 1e9 * best("l2-tma", "bandwidth"),
        "reduce": 1e9 * best("reduce-add", "bandwidth", of=min),
        "mma_sync": best("mma-sync", "throughput") / best("wgmma", "throughput"),
    }
    found = {name: value for name, value in found.items() if value == value}  # nan: not measured
    return replace(device, **found, free=tuple(name for name in device.free if name not in found))


def fit(samples: list[Sample], device: cost.Device) -> cost.Device:
    """The device with its free constants such that the logarithms of prediction and measurement differ least.

    ValueError: there are no samples.
    """
    from scipy.optimize import least_squares

    if not samples:
        raise ValueError(f"measurements of {device.name} must be in the journal, got none")
    wanted = np.log([s.ns_per_pair for s in samples])
    old = np.log([getattr(device, name) for name in device.free])

    def at(logs) -> cost.Device:
        return replace(device, **dict(zip(device.free, np.exp(logs).tolist(), strict=True)))

    def residual(logs) -> np.ndarray:
        return np.concatenate([np.log(predictions(samples, at(logs))) - wanted, PRIOR**0.5 * (logs - old)])

    return at(least_squares(residual, old, method="lm", diff_step=STEP).x)


def text(device: cost.Device, fitted: cost.Device) -> str:
    """The constants file of a fitted device, four digits; what differs is marked fitted, or measured where not free."""
    constants = cost.constants(device.name)
    for name, constant in constants.items():
        new, source = float(f"{getattr(fitted, name):.4g}"), "fitted" if name in fitted.free else "measured"
        if getattr(fitted, name) != getattr(device, name) and new != constant["value"]:
            constant |= {"value": new, "source": source}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in constants.items())
    return f'{{"name": "{device.name}", "constants": {{\n{lines}\n}}}}\n'
