"""What rows say about HSA beside its baselines: ratios, the length from which it wins, where it loses."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

from hsa_tl.bench.record import Row

BASELINES = ("dense_attention", "materialised_retrieval", "full_attention_model")  # kernels HSA is held against
# The whole of what a user pays before a part of it.
OURS = ("hsa-with-retrieval", "hsa", "hsa-auto", "hsa-tilelang", "hsa-triton", "hsa-reference")

SUBJECTS = {
    "attention": {"forward", "backward", "train"},
    "retrieval": {"prefill", "segment"},
    "decode": {"retrieve", "attend", "decode"},
    "model": {"step", "read", "generate"},
}


class Group(NamedTuple):
    """What one figure and one table show."""

    config: str
    selection: str
    device: str


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    out: dict[Group, list[Row]] = {}
    for r in sorted(rows, key=lambda r: (r.device, r.config, r.selection, r.x)):
        out.setdefault(Group(r.config, r.selection, r.device), []).append(r)
    return out


def subject(rows: list[Row]) -> str:
    """What a group is about: "attention", "retrieval", "decode" or "model"."""
    modes = {r.mode for r in rows}
    for name, its in SUBJECTS.items():
        if modes & its:
            return name
    return "other"


def times(rows: Iterable[Row]) -> list[Row]:
    """The rows that hold a measured time."""
    return [r for r in rows if r.metric == "time" and r.p50 is not None]


def fastest_baseline(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """(mode, length) -> milliseconds of the fastest provider of what HSA is held against, dense attention for one."""
    out: dict[tuple[str, int], float] = {}
    for r in times(rows):
        if r.kernel in BASELINES:
            out[r.mode, r.x] = min(r.p50, out.get((r.mode, r.x), r.p50))
    return out


def ours(rows: list[Row], mode: str) -> tuple[str, dict[int, float]]:
    """The provider to compare in that mode, and its milliseconds by length; "" where there is none."""
    baseline = fastest_baseline(rows)
    for name in OURS:
        at = {r.x: r.p50 for r in times(rows) if r.provider == name and r.mode == mode and (mode, r.x) in baseline}
        if at:
            return name, at
    return "", {}


def ratios(rows: list[Row], mode: str) -> tuple[str, dict[int, float]]:
    """Time of ours over that of the fastest baseline, by length."""
    baseline = fastest_baseline(rows)
    name, at = ours(rows, mode)
    return name, {T: at[T] / baseline[mode, T] for T in sorted(at)}


def crossover(by_length: dict[int, float]) -> float | None:
    """The length at which the ratio last falls through 1, between measured points on a log-log line; None if never."""
    lengths = sorted(by_length)
    for a, b in reversed(list(itertools.pairwise(lengths))):
        low, high = by_length[a], by_length[b]
        if low > 1 >= high:
            share = math.log(low) / (math.log(low) - math.log(high))
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None


def verdict(rows: list[Row], mode: str, label) -> str:
    """One sentence: where ours wins and where it loses, by how much at both ends. label(T) names a length."""
    name, ratio = ratios(rows, mode)
    if not ratio:
        return ""
    first, last = min(ratio), max(ratio)
    losing = [T for T in ratio if ratio[T] > 1]

    def times_as(T: int) -> str:
        r = ratio[T]
        return f"{r:.2f} times the time" if r > 1 else f"{1 / r:.1f} times as fast"

    ends = f"{times_as(first)} at {label(first)}"
    if last != first:
        ends += f", {times_as(last)} at {label(last)}"
    if not losing:
        return f"`{name}` beats the fastest baseline at every length measured: {ends}."
    if len(losing) == len(ratio):
        return f"**`{name}` loses to the fastest baseline at every length measured**: {ends}."
    at = crossover(ratio)
    from_ = f"; it wins from about {label(round(at))}" if at is not None and ratio[last] <= 1 else ""
    return f"**`{name}` loses to the fastest baseline at {', '.join(map(label, losing))}**: {ends}{from_}."
