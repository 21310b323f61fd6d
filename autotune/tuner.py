"""Ranks the candidates of a case statically, and makes table rows of what was ranked or measured."""

import importlib.metadata
from dataclasses import asdict

from hsa_tl.autotune import cost, static
from hsa_tl.autotune.journal import Journal
from hsa_tl.autotune.table import ruled
from hsa_tl.cases import Case
from hsa_tl.files import cache_folder
from hsa_tl.kernels_tilelang import config as configs


def default_journal() -> Journal:
    """The user's journal, which every run goes on from."""
    return Journal(cache_folder() / "tuning.jsonl")


def versions() -> dict[str, str]:
    """Versions of what decides a kernel's speed."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "tilelang")}
    return found | ({} if static.missing_tools() else {"nvcc": static.nvcc_release()})


def group(row: dict) -> tuple:
    """The program and the fields that the rule chooses from the selection: a table has the best row of each group."""
    return (row["program"], *ruled(row["program"], asdict(configs.parse(row["program"], row["config"]))))


def group_of(table_row: dict) -> tuple:
    """The group of a table's row."""
    return (table_row["program"], *ruled(table_row["program"], table_row["config"]))


def in_turns(rows: list[dict]) -> list[dict]:
    """Every group's best predicted config, then every second best, ...; what has faults last."""
    order = {name: i for i, name in enumerate(configs.TUNED)}
    rows = sorted(rows, key=lambda r: (bool(static.faults(r)), r["ns_per_pair"] or float("inf")))
    seen: dict[tuple, int] = {}
    turns = []
    for row in rows:
        turn = seen[group(row)] = seen.get(group(row), -1) + 1
        turns.append((bool(static.faults(row)), turn, order[row["program"]], len(turns), row))
    return [row for *_, row in sorted(turns, key=lambda x: x[:-1])]


def rank(
    case: Case, device: str | cost.Device, *, programs: tuple[str, ...] = configs.TUNED, **options
) -> list[dict]:  # fmt: skip
    """Static rows of all candidates of the case, in turns among programs. options: see static.analyse_all."""
    work = [(name, case.problem, c) for name in programs for c in configs.candidates(name, case.problem)]
    found = static.analyse_all(work, **options)
    return in_turns([static.row(case.name, *x, f, device) for x, f in zip(work, found, strict=True)])


TIE = 1.01  # predictions nearer than this say nothing: the order of preference decides
MEASURED = ("p20_us", "p80_us", "over_runner_up", "over_static", "selections")  # of a row, where it was measured


def best(case: Case, rows: list[dict]) -> list[dict]:
    """One table row for each group: the fastest measured candidate, else the best predicted one without a fault."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if not static.faults(row):
            groups.setdefault(group(row), []).append(row)
    chosen = []
    for (program, *_), mine in sorted(groups.items()):
        timed = [r for r in mine if r.get("median_us")]
        if timed:
            row = min(timed, key=lambda r: r["median_us"])
        else:
            limit = TIE * min(r["ns_per_pair"] for r in mine)
            order = [configs.describe(c) for c in configs.candidates(program, case.problem)]
            row = min((r for r in mine if r["ns_per_pair"] <= limit), key=lambda r: order.index(r["config"]))
        chosen.append(
            {"program": program, **configs.static_key(case.problem), "T": case.problem.T}
            | {"config": asdict(configs.parse(program, row["config"])), "source": "measured" if timed else "static"}
            | {"median_us": row.get("median_us"), "ns_per_pair": float(f"{row['ns_per_pair']:.4g}")}
            | {"limiter": row["limiter"], "candidates": len(timed or mine)}
            | {name: row[name] for name in MEASURED if timed}
            | {"versions": versions()}
        )
    return chosen
