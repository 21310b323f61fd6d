"""The command `hsa-tl bench`: which suite, over what, and a table of what came out."""

from collections.abc import Callable
from pathlib import Path

from hsa_tl import cases
from hsa_tl.bench import record
from hsa_tl.bench.attention import DIRECTIONS, Attention
from hsa_tl.bench.decode import Decode
from hsa_tl.bench.retrieve import Retrieve
from hsa_tl.bench.suite import Suite, one_of
from hsa_tl.bench.sweep import run_sweep

SUITES: dict[str, Callable[[], Suite]] = {"attention": Attention, "retrieve": Retrieve, "decode": Decode}
WHATS = (*SUITES, *DIRECTIONS)  # a direction is the attention suite in that mode
FAILURES = ("refused", "failed")


def suite_of(what: str) -> tuple[Suite, tuple[str, ...] | None]:
    """The suite and the modes that the word names. ValueError lists the words."""
    one_of("what to bench", what, WHATS)
    return (Attention(), (what,)) if what in DIRECTIONS else (SUITES[what](), None)


def speed_table(rows: list[record.Row]) -> tuple[tuple[str, ...], list[tuple], list[str]]:
    """Names, lines and notes: time, spread, ratio to the fastest baseline, rates, memory; why a point is missing."""
    at = {(r.mode, r.x, r.provider, r.metric): r.p50 for r in rows}
    baseline, lines, notes = record.fastest_baseline(rows), [], {}
    for r in (r for r in rows if r.metric == "time"):
        if r.p50 is None:
            notes.setdefault((r.provider, r.note), []).append(f"{r.mode} {r.x}")
            continue
        ratio = f"{r.p50 / baseline[r.mode, r.x]:.2f}" if (r.mode, r.x) in baseline else ""
        rates = (at.get((r.mode, r.x, r.provider, m)) for m in ("throughput", "bandwidth", "peak_extra_memory"))
        cells = ("" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in rates)
        lines.append((r.mode, r.x, r.provider, f"{r.p50:.4g}", f"{r.p20:.4g} .. {r.p80:.4g}", ratio, *cells))
    names = ("mode", "T", "provider", "ms", "p20 .. p80", "/ base", "GFLOP/s", "GB/s", "extra MiB")
    missing = [f"{name} has no time for {', '.join(at)}: {note}" for (name, note), at in notes.items()]
    return names, lines, missing


def run_bench(
    what: str, case_name: str | None, lengths: list[int] | None, parse: Callable[[str], list[int]],
    modes: list[str] | None, providers: list[str] | None, selection: str, device: str, out: Path,
    minutes: float | None, threads: int, max_call_s: float, progress,
) -> list[record.Row]:  # fmt: skip
    ...
