"""What rows say about HSA beside its baselines: ratios, the length from which it wins, where it loses."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hsa_tl.bench.record import Row

BASELINES = ("dense_attention", "materialised_retrieval", "full_attention_model")  # kernels HSA is held against
# The whole of what a user pays before a part of it.
OURS = ("hsa-with-retrieval", "hsa", "hsa-auto", "hsa-tilelang", "hsa-triton", "hsa-reference")
# Of each mode: what it is about, and its title.
MODES = {
    "forward": ("attention", "Forward"),
    "backward": ("attention", "Backward"),
    "train": ("attention", "Forward + backward"),
    "prefill": ("retrieval", "Retrieval, all tokens"),
    "segment": ("retrieval", "Retrieval, the last tokens"),
    "retrieve": ("decode", "Retrieval, one token"),
    "attend": ("decode", "Attention, one token"),
    "decode": ("decode", "Decode, one token"),
    "step": ("model", "Training step"),
    "read": ("model", "Prefill"),
    "generate": ("model", "Generation, one token"),
}


class Group(NamedTuple):
    """What one figure and one table show."""

    config: str
    selection: str
    device: str


def length_label(T: int) -> str:
    """4096 -> "4K", 1300 -> "1.3K"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if size <= T:
            return f"{T / size:.3g}{unit}"
    return str(T)


def grouped(rows: Iterable, key: Callable) -> dict:
    """Rows by their key, in order."""
    out: dict = {}
    for r in rows:
        out.setdefault(key(r), []).append(r)
    return out


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """What is compared; not the roofline."""
    ordered = sorted(rows, key=lambda r: (r.device, r.config, r.selection, r.x))
    compared = (r for r in ordered if r.kernel != "roofline")
    return grouped(compared, lambda r: Group(r.config, r.selection, r.device))


def subject(rows: list[Row]) -> str:
    """What a group is about: "attention", "retrieval", "decode" or "model"."""
    modes = {r.mode for r in rows}
    return next((about for mode, (about, _) in MODES.items() if mode in modes), "other")


def times(rows: Iterable[Row]) -> list[Row]:
    """The rows that hold a measured time."""
    return [r for r in rows if r.metric == "time" and r.p50 is not None]


def modes(rows: Iterable[Row]) -> dict[str, str]:
    """Titles of the modes that have a time."""
    timed = {r.mode for r in times(rows)}
    return {mode: title for mode, (_, title) in MODES.items() if mode in timed}


def missing(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Points without a time by provider and reason."""
    without = grouped((r for r in rows if r.metric == "time" and r.p50 is None), lambda r: (r.provider, r.note))
    return {key: ", ".join(f"{r.mode} {length_label(r.x)}" for r in mine) for key, mine in without.items()}


def fastest_baseline(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """(mode, length) -> milliseconds of the fastest provider of what HSA is held against, dense attention for one."""
    found = grouped((r for r in times(rows) if r.kernel in BASELINES), lambda r: (r.mode, r.x))
    return {key: min(r.p50 for r in mine) for key, mine in found.items()}


def ratios(rows: list[Row], mode: str) -> tuple[str, dict[int, float]]:
    """The provider to compare in that mode, and its time over the fastest baseline's by length; "" for none."""
    baseline = fastest_baseline(rows)
    mine = sorted((r for r in times(rows) if r.mode == mode and (mode, r.x) in baseline), key=lambda r: r.x)
    for name in OURS:
        if ratio := {r.x: r.p50 / baseline[mode, r.x] for r in mine if r.provider == name}:
            return name, ratio
    return "", {}


def crossover(by_length: dict[int, float]) -> float | None:
    """The length at which the ratio falls through 1 for good, between points on a log-log line; None if never."""
    if by_length[max(by_length)] > 1:
        return None
    for a, b in reversed(list(itertools.pairwise(sorted(by_length)))):
        low, high = by_length[a], by_length[b]
        if low > 1 >= high:
            return a * (b / a) ** (math.log(low) / math.log(low / high))
    return None


def verdict(rows: list[Row], mode: str) -> str:
    """One sentence: where ours wins and where it loses, by how much at both ends."""
    name, ratio = ratios(rows, mode)
    if not ratio:
        return ""
    losing = [T for T in ratio if ratio[T] > 1]

    def times_as(T: int) -> str:
        r = ratio[T]
        return (f"{r:.2f} times the time" if r > 1 else f"{1 / r:.1f} times as fast") + f" at {length_label(T)}"

    ends = ", ".join(times_as(T) for T in dict.fromkeys((min(ratio), max(ratio))))
    if not losing:
        return f"`{name}` beats the fastest baseline at every length measured: {ends}."
    if len(losing) == len(ratio):
        return f"**`{name}` loses to the fastest baseline at every length measured**: {ends}."
    at = crossover(ratio)
    from_ = f"; it wins from about {length_label(round(at))}" if at is not None else ""
    return f"**`{name}` loses to the fastest baseline at {', '.join(map(length_label, losing))}**: {ends}{from_}."
