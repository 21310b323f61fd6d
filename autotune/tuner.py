"""Ranks the plans of a case by prediction, and makes table rows of what was measured."""

import importlib.metadata
import itertools
from dataclasses import asdict

from hsa_tl.autotune import plan, static
from hsa_tl.autotune.journal import Journal
from hsa_tl.cases import Case
from hsa_tl.files import cache_folder
from hsa_tl.kernels_tilelang import config as configs

# Overlap of neighbours' selections that is measured -> the overlaps that the measurement stands for.
CLASSES = {"0.2": (0.0, 0.4), "0.7": (0.5, 0.8), "0.9": (0.9, 1.0)}
MEASURED = ("over_runner_up", "over_static")  # of a table's row, beside its time


def default_journal() -> Journal:
    """The user's journal, which every run goes on from."""
    return Journal(cache_folder() / "tuning.jsonl")


def versions() -> dict[str, str]:
    """Versions of what decides a kernel's speed."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "tilelang")}
    return found | ({} if static.missing_tools() else {"nvcc": static.nvcc_release()})


def programs_of(row: dict) -> tuple:
    """((program, config), ...) of a plan's row."""
    return tuple((name, configs.parse(name, text)) for name, text in row["programs"].items())


def adds(row: dict) -> bool:
    """Whether one of the plan's programs adds atomically."""
    return any(config.reduce_add for _, config in programs_of(row))


def group(row: dict) -> tuple:
    """The strategy."""
    return tuple(row["programs"])


def plan_row(direction: str, parts: list[dict]) -> dict:
    """A plan's row of its programs' static rows, one after the other."""
    times = [x["ns_per_pair"] for x in parts]
    return {
        "direction": direction,
        "programs": {x["program"]: x["config"] for x in parts},
        "ns_per_pair": None if None in times else sum(times),
        "faults": [fault for x in parts for fault in static.faults(x)],
        "parts": parts,
    }


def rank(case: Case, device: str, *, programs: tuple[str, ...] | None = None, **options) -> list[dict]:
    """Rows of the plans of every strategy with one of the programs, in turns: each one's best predicted, then every
    second best, ...; what has faults last. options: see static.analyse_all."""
    asked = set(programs or configs.tuned())
    wanted = [(d, s) for d in plan.DIRECTIONS for s in plan.strategies(d) if asked & set(s)]
    work = [(name, case.problem, c) for _, s in wanted for name in s for c in configs.candidates(name, case.problem)]
    rows: dict[str, list[dict]] = {}
    for x, found in zip(work, static.analyse_all(work, **options), strict=True):
        rows.setdefault(x[0], []).append(static.row(case.name, *x, found, device))
    predicted = lambda row: (bool(static.faults(row)), row["ns_per_pair"] or float("inf"))  # noqa: E731
    turns = []
    for direction, strategy in wanted:
        ranked = [sorted(rows.get(name, []), key=predicted) for name in strategy]
        longest = max(map(len, ranked)) if all(ranked) else 0
        made = [plan_row(direction, [x[i] if i < len(x) else x[0] for x in ranked]) for i in range(longest)]
        made.sort(key=lambda row: (bool(row["faults"]), row["ns_per_pair"] or float("inf")))
        turns += [(bool(row["faults"]), turn, row) for turn, row in enumerate(made)]
    return [row for *_, row in sorted(turns, key=lambda x: x[:-1])]


def best(case: Case, rows: list[dict]) -> list[dict]:
    """Table rows: for each direction and class of selections the fastest measured plan without a fault.

    Of the plans of a strategy, with atomics or without, only those of the most rounds count: one round may be luck.
    Where that adds atomically, the fastest that does not as well, for deterministic=True.
    """
    found, high = [], case.problem.bucketed().T
    for direction, selection in itertools.product(plan.DIRECTIONS, CLASSES):
        timed = [r for r in rows if r["direction"] == direction and r.get("median_us") and not r["faults"]]
        most = {}
        for r in timed:
            most[group(r), adds(r)] = max(most.get((group(r), adds(r)), 0), r["rounds"][selection])
        sure = [r for r in timed if r["rounds"][selection] == most[group(r), adds(r)]]
        sure.sort(key=lambda r: r["selections"][selection])
        ordered = [r for r in sure if not adds(r)]
        for row in (x[0] for x in (sure, ordered) if x and (x is ordered or adds(x[0]))):
            us = row["selections"][selection]
            found.append(
                {"direction": direction, **case.problem.static_key(), "deterministic": not adds(row)}
                | {"T": [high // 2 + 1, high], "overlap": list(CLASSES[selection])}
                | {"programs": {name: asdict(c) for name, c in programs_of(row)}}
                | {"median_us": us, "ns_per_pair": float(f"{1e3 * us / case.problem.pairs:.4g}")}
                | {"candidates": len(timed)} | {name: row[name] for name in MEASURED} | {"versions": versions()}
            )  # fmt: skip
    return found
