"""Measures plans on a Hopper GPU through the public operator: checked, then timed on selections of each class.

First every plan gets a look, in the order of the static rank: its check, and one round on each selection. Then
the contenders of each strategy, those within NEAR of its fastest and the static pick, are timed in interleaved rounds.
A round is a median of the benchmarks' timer, which flushes the L2 cache before each run. All is journaled at once.
"""

import contextlib
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from hsa_tl.autotune import static, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.autotune.plan import strategies
from hsa_tl.autotune.tuner import CLASSES, programs_of
from hsa_tl.bench import timing
from hsa_tl.bench.suite import error_line
from hsa_tl.cases import Case, at_length
from hsa_tl.pairs import selection_overlap
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, SelectedInputs, assert_attention, make_inputs, make_selection, run_with_gradients

CHECK_TOKENS = 512
ROUNDS = 7
LOOK_SHARE = 0.6  # of the time, at most, before the contenders' rounds
NEAR = 1.1  # of the fastest: a contender
CONTENDERS = 2  # of a strategy and selection
MINUTES = 1.0  # HSA_TL_TUNING=tune spends on a direction


def _compile(problem: Problem, programs: tuple) -> None:
    from hsa_tl.kernels_tilelang import compile

    for program, config in programs:
        compile.kernel(program, problem, config)


@contextlib.contextmanager
def compile_ahead(work: list[tuple]) -> Iterator[Callable[[int], None]]:
    """Compiles (problem, programs)s in other processes, in this order, into TileLang's cache.

    Gives what waits for one of them. One that fails says so where it is next compiled, in this process.
    """
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=get_context("spawn"))
    futures = [pool.submit(_compile, *x) for x in work]
    try:
        yield lambda i: wait([futures[i]])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Rig:
    """What measuring needs of the machine; a test brings its own."""

    check: Callable[[str, Problem, tuple], None]  # AssertionError unless the plan computes the right thing
    prepare: Callable[[str, Problem, tuple, str], Callable[[], object]]  # compiles; what runs it on a selection
    time_us: Callable[[Callable[[], object]], float]  # one round
    clock: Callable[[], float] = time.monotonic
    alive: Callable[[], bool] = lambda: True  # whether the device still answers after a failure
    ahead: Callable[[list[tuple]], AbstractContextManager[Callable[[int], None]]] = lambda work: contextlib.nullcontext(
        lambda i: None
    )


def _call(direction: str, programs: tuple, inputs: Inputs, chunk_size: int):
    """The direction's operator by the plan, and its inputs."""
    from hsa_tl import hsa_attention, selected_attention

    attention, forward = hsa_attention, "hsa_fwd_token"
    if direction.startswith("selected_"):
        attention, forward, inputs = selected_attention, "selected_fwd_token", SelectedInputs.of(inputs)
    named = {} if direction.endswith("forward") else {forward: {}}
    config = named | {program: vars(config) for program, config in programs}
    return functools.partial(attention, chunk_size=chunk_size, impl="tilelang", config=config), inputs


def check(direction: str, problem: Problem, programs: tuple, device: str = "cuda") -> None:
    """AssertionError unless the plan is as accurate as its arithmetic allows, at a small length."""
    small = at_length(problem, min(problem.T, CHECK_TOKENS))
    attend, inputs = _call(direction, programs, make_inputs(small).to(device), small.S)
    if direction.endswith("forward"):
        outputs = attend(*inputs[: inputs._fields.index("do")])
        actual = dict(zip(inputs.RESULTS, outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    else:
        actual = {name: x for name, x in run_with_gradients(attend, inputs).items() if name.startswith("d")}
    assert_attention(actual, inputs, chunk_size=small.S)


@functools.lru_cache(maxsize=len(CLASSES))
def _inputs(problem: Problem, selection: str) -> Inputs:
    return make_inputs(problem, kind="overlap", overlap=float(selection)).to("cuda")


def launch(direction: str, problem: Problem, programs: tuple, selection: str) -> Callable[[], object]:
    """A function that runs the direction by the plan on a selection, through the public operator."""
    attend, inputs = _call(direction, programs, _inputs(problem, selection), problem.S)
    at, incoming = (inputs._fields.index(name) for name in ("indices", "do"))
    if direction.endswith("forward"):
        return lambda: attend(*inputs[:incoming])
    leaves = [x.detach().requires_grad_() for x in inputs[:at]]
    outputs = attend(*leaves, inputs.indices)
    return lambda: torch.autograd.grad(outputs, leaves, inputs[incoming:], retain_graph=True)


def _alive() -> bool:
    """False after an illegal access: the CUDA context is lost to this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def gpu_rig() -> Rig:
    def time_us(run: Callable[[], object]) -> float:
        return 1e3 * timing.measure({"": run}, device="cuda", min_repeats=10, seconds=0.1)[""].p50

    return Rig(check, launch, time_us, alive=_alive, ahead=compile_ahead)


@functools.lru_cache(maxsize=64)
def overlaps(problem: Problem) -> dict[str, float]:
    """The overlap that each selection has: what a measurement on it must be compared with."""
    p = problem
    made = {x: make_selection(p.B, p.T, p.H, p.K, p.S, kind="overlap", overlap=float(x)) for x in CLASSES}
    return {x: selection_overlap(indices) for x, indices in made.items()}


def name_of(row: dict, problem: Problem, device: str) -> dict:
    """A measurement's identity in the journal."""
    size = {k: getattr(problem, k) for k in ("B", "T", "H")} | problem.static_key()
    made = {"kind": "measured", "device": device, "direction": row["direction"], "programs": row["programs"]}
    return made | size | {"source": {name: static.source_digest(name) for name in row["programs"]}}


def unfinished(starts: int) -> dict:
    """The record of a candidate that has begun and not ended; after a second time it counts as one that hangs."""
    error = "did not finish: twice the process ended while it ran" if starts > 1 else None
    return {"error": error, "rounds": {}, "starts": starts}


FAILURES = (AssertionError, RuntimeError, ValueError, NotImplementedError, TypeError)


def _look(row: dict, problem: Problem, rig: Rig) -> dict:
    plan = row["direction"], problem, programs_of(row)
    try:
        rig.check(*plan)
        runs = {x: rig.prepare(*plan, x) for x in CLASSES}
        return {"error": None, "rounds": {x: [rig.time_us(run)] for x, run in runs.items()}}
    except (OSError, torch.OutOfMemoryError) as error:  # of the machine as it is now, not of the plan
        warnings.warn(f"{row['programs']} is left to the next run: {error_line(error)}", stacklevel=2)
        return unfinished(0)
    except FAILURES as error:
        return {"error": error_line(error), "rounds": {}}


def summary(record: dict) -> dict:
    """The median of each selection's rounds, how many they are, and the medians' geometric mean."""
    if record["error"]:
        return {"error": record["error"], "median_us": None}
    selections = {x: statistics.median(times) for x, times in record["rounds"].items()}
    median = statistics.geometric_mean(selections.values())
    rounds = {x: len(times) for x, times in record["rounds"].items()}
    return {"error": None, "median_us": float(f"{median:.4g}"), "selections": selections, "rounds": rounds}


Entry = tuple[dict, dict, dict]  # static row, identity in the journal, record


def _looks(
    case: Case, ranked: list[dict], device: str, rig: Rig, journal: Journal, end: float, progress: Callable | None
) -> list[Entry]:
    """A look at each candidate, best first, until the time is up; none where the journal has one of these versions."""
    made = {"versions": tuner.versions()}

    def known(name: dict) -> dict:
        record = journal.get(name)
        return record if record and made.items() <= record.items() else unfinished(0)

    def is_finished(name: dict) -> bool:
        return bool(known(name)["error"] or known(name)["rounds"])

    named = [(row, name_of(row, case.problem, device)) for row in ranked]
    new = [(row, name) for row, name in named if not (row["faults"] or is_finished(name))]
    work = [(case.problem, programs_of(row)) for row, _ in new]
    with rig.ahead(work) if new else contextlib.nullcontext() as ready:
        for place, (row, name) in enumerate(new):
            if rig.clock() >= end:
                break
            journal.add(name, unfinished(known(name)["starts"] + 1) | made)
            ready(place)
            record = _look(row, case.problem, rig) | made
            journal.add(name, record)
            if progress:
                progress(place + 1, len(new))
            if record["error"] and not rig.alive():
                raise RuntimeError(
                    f"{row['programs']} lost the device to this process; run again to go on with the next"
                )
    return [(row, name, known(name)) for row, name in named if is_finished(name)]


def _contenders(mine: list[Entry]) -> list[Entry]:
    """Of one strategy in ranked order: the fastest at first look on each selection, and the static pick."""
    chosen = []
    for selection in CLASSES:
        look = lambda x, selection=selection: x[2]["rounds"][selection][0]  # noqa: E731
        by_time = sorted(mine, key=look)
        chosen += [x for x in by_time[:CONTENDERS] if look(x) <= NEAR * look(by_time[0]) and x not in chosen]
    return chosen if mine[0] in chosen else [*chosen, mine[0]]


def _interleave(contenders: list[Entry], problem: Problem, rig: Rig, journal: Journal, end: float) -> None:
    """Adds rounds to the records until each has ROUNDS of every selection, or the time is up."""
    for selection in CLASSES:
        times = [record["rounds"][selection] for *_, record in contenders]
        if rig.clock() >= end or all(len(x) >= ROUNDS for x in times):
            continue
        runs = [rig.prepare(row["direction"], problem, programs_of(row), selection) for row, *_ in contenders]
        order = list(range(len(contenders)))
        while rig.clock() < end and any(len(x) < ROUNDS for x in times):
            for i in order:
                if len(times[i]) < ROUNDS:
                    times[i].append(rig.time_us(runs[i]))
                    journal.add(*contenders[i][1:])
            order.reverse()  # so that none always follows the same


def measure(
    case: Case, ranked: list[dict], *, device: str, seconds: float, rig: Rig | None = None,
    journal: Journal | None = None, progress: Callable | None = None,
) -> list[dict]:  # fmt: skip
    """The ranked rows that there was time for, with median_us; a failure is recorded in error.

    over_runner_up and over_static are the next fastest's and the static pick's time over a row's own, in its group.
    What the journal holds of this device, problem, source and versions is not measured again. progress(done, total)
    after each look.
    """
    rig, journal = rig or gpu_rig(), Journal(None) if journal is None else journal
    begin = rig.clock()
    seen = _looks(case, ranked, device, rig, journal, begin + LOOK_SHARE * seconds, progress)
    groups: dict[tuple, list[Entry]] = {}
    for entry in seen:
        if entry[2]["error"] is None:
            groups.setdefault(tuner.group(entry[0]), []).append(entry)
    margins = {}
    for mine in groups.values():
        _interleave(_contenders(mine), case.problem, rig, journal, begin + seconds)
        times = [summary(record)["median_us"] for *_, record in mine]
        for (*_, record), us in zip(mine, times, strict=True):
            next_us = min((t for t in times if t > us), default=us)
            margins[id(record)] = {"over_runner_up": round(next_us / us, 4), "over_static": round(times[0] / us, 4)}
    return [row | summary(record) | margins.get(id(record), {}) for row, _, record in seen]


def tune(direction: str, problem: Problem, device: str) -> list[dict]:
    """What HSA_TL_TUNING=tune does on a miss: ranks, measures for MINUTES; the rows that the user's table then has."""
    case = Case(str(problem), problem, frozenset(), "met at run time")
    journal = tuner.default_journal()
    programs = tuple(name for strategy in strategies(direction) for name in strategy)
    ranked = tuner.rank(case, device, programs=programs, journal=journal)
    rows = measure(case, ranked, device=device, seconds=60 * MINUTES, journal=journal)
    if not (chosen := tuner.best(case, rows)):
        raise RuntimeError(f"no plan for the {direction} of {problem} passed its check: {[r['error'] for r in rows]}")
    table.merge(table.user_path(device), device, chosen)
    return chosen
