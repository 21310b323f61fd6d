"""Measures candidates on a Hopper GPU: checked against the oracle, then timed on real selections, best first.

First every candidate gets a look, in the order of the static rank: its check, and one round on each selection. Then
the contenders of each group, those within NEAR of its fastest and the static pick, are timed in interleaved rounds.
A round is the median of TileLang's profiler, which flushes the L2 cache before each run. All is journaled at once.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from hsa_tl.autotune import static, strategy, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.cases import Case, at_length
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.oracle import attention_oracle
from hsa_tl.problem import Problem
from hsa_tl.testing import SELECTIONS, Inputs, assert_as_accurate_as, double, make_inputs, run_with_gradients

CHECK_TOKENS = 512
ROUNDS = 7
LOOK_SHARE = 0.6  # of the time, at most, before the contenders' rounds
NEAR = 1.1  # of the fastest: a contender
CONTENDERS = 4  # of a group
MINUTES = 1.0  # HSA_TL_TUNING=tune spends on a program
QUANTITIES = {  # by direction
    "forward": ("out",),
    "dq": ("dq", "dweights"),
    "dkdv": ("dk", "dv"),
    "backward": ("dq", "dk", "dv", "dweights"),
}


@dataclass(frozen=True)
class Rig:
    """What measuring needs of the machine; a test brings its own."""

    check: Callable[[str, Problem, object], None]  # AssertionError unless the config computes the right thing
    prepare: Callable[[str, Problem, object, str], Callable[[], object]]  # compiles; what runs it on a selection
    time_us: Callable[[Callable[[], object]], float]  # one round
    clock: Callable[[], float] = time.monotonic


def _run(program: str, config, inputs: Inputs, chunk_size: int) -> dict:
    from hsa_tl.api import hsa_attention

    return run_with_gradients(
        hsa_attention, inputs, chunk_size=chunk_size, impl="tilelang", config={program: vars(config)}
    )


def check(program: str, problem: Problem, config, device: str = "cuda") -> None:
    """AssertionError unless the config is as accurate as the eager reference at a small length."""
    small = at_length(problem, min(problem.T, CHECK_TOKENS))
    inputs = make_inputs(small).to(device)
    actual = _run(program, config, inputs, small.S)
    low = run_with_gradients(attention_oracle, inputs, chunk_size=small.S)
    high = run_with_gradients(attention_oracle, double(inputs), chunk_size=small.S)
    for name in QUANTITIES[config.DIRECTION]:
        assert_as_accurate_as(name, actual[name], low[name], high[name])


@functools.lru_cache(maxsize=len(SELECTIONS))
def _inputs(problem: Problem, selection: str) -> Inputs:
    return make_inputs(problem, kind=selection).to("cuda")


def launch(program: str, problem: Problem, config, selection: str) -> Callable[[], object]:
    """A function that runs the one program on a selection, with what it needs run each time; all else is prepared."""
    from hsa_tl import ops
    from hsa_tl.impl.tilelang import LAUNCHERS, Call
    from hsa_tl.pairs import Pairs

    inputs = _inputs(problem, selection)
    k, v = (x.unflatten(1, (problem.N, problem.S)) for x in (inputs.k, inputs.v))
    pairs = Pairs(*ops.build_pairs(inputs.indices, problem.N, False))
    call = Call.of(inputs.q, k, v, inputs.weights, inputs.indices, pairs, None, problem.D**-0.5, inputs.do)
    run, _ = LAUNCHERS[program](call, config)
    return run


def gpu_rig() -> Rig:
    """The Hopper GPU here."""
    from tilelang.profiler import do_bench

    return Rig(check, launch, lambda run: 1e3 * do_bench(run, return_mode="median"))


@functools.lru_cache(maxsize=64)
def shares(problem: Problem) -> dict[str, dict[int, float]]:
    """The union's share of each selection: what a measurement on it must be compared with."""
    return {x: strategy.union_share(make_inputs(problem, kind=x).indices, problem.N, problem.G) for x in SELECTIONS}


def name_of(row: dict, problem: Problem, device: str) -> dict:
    """A measurement's identity in the journal."""
    size = {k: getattr(problem, k) for k in ("B", "T", "H")} | configs.static_key(problem)
    made = {"kind": "measured", "device": device, "program": row["program"], "config": row["config"]}
    return made | size | {"programs": static.programs_digest()}


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


FAILURES = (AssertionError, RuntimeError, ValueError, NotImplementedError, TypeError)


def _look(row: dict, problem: Problem, rig: Rig) -> dict:
    config = configs.parse(row["program"], row["config"])
    try:
        rig.check(row["program"], problem, config)
        runs = {x: rig.prepare(row["program"], problem, config, x) for x in SELECTIONS}
        return {"error": None, "rounds": {x: [rig.time_us(run)] for x, run in runs.items()}}
    except FAILURES as error:
        return {"error": _say(error), "rounds": {}}


def _quantile(rounds: list[float], q: float) -> float:
    """By linear interpolation."""
    rounds = sorted(rounds)
    at = q * (len(rounds) - 1)
    low = math.floor(at)
    return rounds[low] + (at - low) * (rounds[min(low + 1, len(rounds) - 1)] - rounds[low])


def _summary(record: dict) -> dict:
    """Geometric means over the selections of median, p20 and p80, and the selections' medians."""
    columns = {"median_us": 0.5, "p20_us": 0.2, "p80_us": 0.8}
    if record["error"]:
        return {"error": record["error"], **dict.fromkeys(columns)}
    rounds = record["rounds"]
    found = {c: statistics.geometric_mean(_quantile(x, q) for x in rounds.values()) for c, q in columns.items()}
    selections = {x: statistics.median(times) for x, times in rounds.items()}
    return {c: float(f"{value:.4g}") for c, value in found.items()} | {"selections": selections}


def _interleave(contenders: list[tuple[dict, dict]], problem: Problem, rig: Rig, journal: Journal, end: float) -> None:
    """Adds rounds to (identity, record) until each has ROUNDS of every selection, or the time is up."""
    for selection in SELECTIONS:
        runs = []
        for name, _ in contenders:
            config = configs.parse(name["program"], name["config"])
            runs.append(rig.prepare(name["program"], problem, config, selection))
        while rig.clock() < end:
            short = [i for i, (_, r) in enumerate(contenders) if len(r["rounds"][selection]) < ROUNDS]
            if not short:
                break
            for i in short:
                record = contenders[i][1]
                record["rounds"][selection].append(rig.time_us(runs[i]))
            for i in short[::-1]:  # and back, so that none always follows the same
                name, record = contenders[i]
                if len(record["rounds"][selection]) < ROUNDS:
                    record["rounds"][selection].append(rig.time_us(runs[i]))
                journal.add(name, record)


def measure(
    case: Case, ranked: list[dict], *, device: str, seconds: float, rig: Rig | None = None,
    journal: Journal | None = None, progress: Callable | None = None,
) -> list[dict]:  # fmt: skip
    """The ranked rows that there was time for, with median_us and its spread; a failure is recorded in error.

    over_runner_up and over_static are the next fastest's and the static pick's time over the fastest of its group. What
    the journal holds of this device, problem and source is not measured again. progress(done, total) after each look.
    """
    rig, journal = rig or gpu_rig(), Journal(None) if journal is None else journal
    begin = rig.clock()
    end, seen = begin + seconds, []
    for i, row in enumerate(ranked):
        if static.faults(row):
            continue
        name = name_of(row, case.problem, device)
        record = journal.get(name)
        if record is None:
            if rig.clock() >= begin + LOOK_SHARE * seconds:
                continue
            record = _look(row, case.problem, rig)
            journal.add(name, record)
        seen.append((row, name, record))
        if progress:
            progress(i + 1, len(ranked))

    groups: dict[tuple, list] = {}
    for entry in seen:
        if entry[2]["error"] is None:
            groups.setdefault(tuner.group(entry[0]), []).append(entry)
    margins = {}
    for mine in groups.values():
        static_pick, *_ = mine  # ranked best
        by_time = sorted(mine, key=lambda x: _summary(x[2])["median_us"])
        limit = NEAR * _summary(by_time[0][2])["median_us"]
        contenders = [x for x in by_time[:CONTENDERS] if _summary(x[2])["median_us"] <= limit]
        contenders += [] if static_pick in contenders else [static_pick]
        _interleave([x[1:] for x in contenders], case.problem, rig, journal, end)
        times = sorted(_summary(x[2])["median_us"] for x in mine)
        pick = _summary(static_pick[2])["median_us"]
        for _, name, record in mine:
            us = _summary(record)["median_us"]
            others = [t for t in times if t > us] or [us]
            margins[id(record)] = {"over_runner_up": round(min(others) / us, 4), "over_static": round(pick / us, 4)}
    return [row | _summary(record) | margins.get(id(record), {}) for row, _, record in seen]


def tune(program: str, problem: Problem, device: str) -> None:
    """What HSA_TL_TUNING=tune does on a miss: ranks, measures for MINUTES, and keeps the best in the user's cache."""
    case = Case(str(problem), problem, frozenset(), "met at run time")
    journal = tuner.default_journal()
    ranked = tuner.rank(case, device, programs=(program,), journal=journal)
    rows = measure(case, ranked, device=device, seconds=60 * MINUTES, journal=journal)
    timed = [r for r in rows if r["median_us"]]
    if not timed:
        raise RuntimeError(f"no candidate of {program} for {problem} passed its check: {[r['error'] for r in rows]}")
    table.merge(table.user_path(device), device, tuner.best(case, timed))
