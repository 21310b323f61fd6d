"""The sweep: lengths x modes x providers of a suite, behind its gate, resumable, into one JSON and one CSV."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hsa_tl import cases
from hsa_tl.bench import record, timing
from hsa_tl.bench.suite import Suite, error_line, one_of, parse_selection, selection_label
from hsa_tl.cases import Case
from hsa_tl.files import locked
from hsa_tl.problem import Problem
from hsa_tl.validation import require

PROBE = 8
MAX_CALL_S = 60.0  # a point whose one call is expected to take longer is skipped, and its row says so
LATE = "not measured: the sweep's time is up"
METRICS = {"time": "ms", "throughput": "GFLOP/s", "bandwidth": "GB/s", "peak_extra_memory": "MiB"}


class Point(NamedTuple):
    """What providers are measured at, in turns."""

    problem: Problem
    mode: str


@dataclass
class Sweep:
    """Measurements of one suite and case; `run` makes them. With out_dir, bench.csv and bench.json grow there.

    Every provider first passes the suite's gate. One that fails it, is missing, does not fit in memory, would exceed
    max_call_s seconds a call or comes after deadline_s seconds gets a row that says so. On the CPU the case runs in
    float32 on `threads` threads, beside `busy` processes that spin; the rows' device and note say so. Rows of out_dir
    that this sweep does not measure stay; times there of the same device, versions and commit are kept, not measured
    again. progress(done, total, what) is called before each point. modes and providers default to the suite's.
    ValueError: an unknown mode, provider or selection, a length below 1 or off the suite's grid, or busy below 0.
    """

    suite: Suite
    case: Case
    lengths: Iterable[int]
    modes: Iterable[str] | None = None
    providers: Iterable[str] | None = None
    selection: str = "random"
    device: str = "cpu"
    out_dir: Path | None = None
    deadline_s: float = math.inf
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    threads: int | None = 2
    busy: int = 0
    min_repeats: int = 3
    seconds: float = 2.0
    max_call_s: float = MAX_CALL_S

    def __post_init__(self) -> None:
        suite, kind = self.suite, torch.device(self.device).type
        self.names = self.providers or suite.defaults.get(kind, suite.providers)
        for name in self.names:
            one_of("provider", name, suite.providers)
        modes = [one_of("mode", m, suite.modes) for m in (self.modes or suite.default_modes or suite.modes)]
        self.selected = one_of(f"selection of {suite.name}", parse_selection(self.selection)[0], suite.selections)
        if not any(suite.does(n, m, self.selected) for n in self.names for m in modes):
            names = ", ".join(self.names)
            raise ValueError(f"providers must have {' or '.join(modes)} of {self.selected}, got {names}")
        base = cases.on_cpu(self.case.problem) if kind == "cpu" else self.case.problem
        self.config, self.points = f"{self.case.name}: {suite.label(base)}", []
        for T in self.lengths:
            require(T >= 1, "lengths", "be at least 1", T)
            whole = not suite.multiple_of_chunk or T % base.S == 0
            require(whole, "lengths", f"be multiples of the chunk size {base.S}", T)
            self.points += [Point(cases.at_length(base, T), m) for m in modes]
        require(self.busy >= 0, "busy", "be at least 0", self.busy)
        self.rows: dict[tuple, record.Row] = {}
        self.refusal = functools.cache(self.ask_gate)
        self.ns_per_flop: dict[tuple, float] = {}
        self.made: tuple[Problem, object] | None = None
        self.beside = f"{self.busy} busy neighbour{'s' if self.busy > 1 else ''}" if self.busy else ""

    def run(self) -> list[record.Row]:
        """The rows of this sweep."""
        self.label = selection_label(self.selection)
        if self.out_dir is not None:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.rows = {r.key: r for r in record.read_rows(self.out_dir / "bench.csv")}
        self.deadline = time.monotonic() + self.deadline_s
        before = torch.get_num_threads()
        if torch.device(self.device).type == "cpu" and self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            # Part of the device, as its threads are: rows with and without neighbours stand beside each other.
            self.source = record.origin(self.device)
            self.source["device"] += f", {self.beside}" if self.beside else ""
            with timing.neighbours(self.busy):
                return self._measure_all()
        finally:
            torch.set_num_threads(before)

    def _measure_all(self) -> list[record.Row]:
        keys = []
        for i, point in enumerate(self.points):
            names = [n for n in self.names if self.suite.does(n, point.mode, self.selected)]
            keys += [self.row(point, n, metric).key for n in names for metric in METRICS]
            if todo := [n for n in names if not self.is_measured(point, n)]:
                self.say = functools.partial(self.progress, i, len(self.points))
                self.say(f"{self.case.name} T={point.problem.T} {point.mode}")
                self.measure(point, todo)
                if self.out_dir is not None:
                    with locked(self.out_dir):  # other processes' rows stay, those that came meanwhile too
                        found = {r.key: r for r in record.read_rows(self.out_dir / "bench.csv")}
                        found |= {k: self.rows.get(k) for k in keys}
                        record.write_rows(list(filter(None, found.values())), self.out_dir)
        self.progress(len(self.points), len(self.points), "done")
        return [self.rows[k] for k in keys if k in self.rows]

    def inputs(self, problem: Problem):
        if self.made is None or self.made[0] != problem:
            self.made = None  # before memory is asked for
            self.made = problem, self.suite.inputs(problem, self.selection)
        return self.made[1]

    def row(self, point: Point, name: str, metric: str, values=(None,) * 3, note="") -> record.Row:
        what = (self.suite.providers[name], name, point.mode, metric, METRICS[metric], "T", point.problem.T)
        return record.Row(*what, *values, self.config, self.label, **self.source, note=note)

    def add(self, *args, **kwargs) -> None:
        row = self.row(*args, **kwargs)
        self.rows[row.key] = row

    def missing(self, point: Point, name: str, note: str) -> None:
        for metric in METRICS:  # of an older commit
            self.rows.pop(self.row(point, name, metric).key, None)
        self.add(point, name, "time", note=note)

    def is_measured(self, point: Point, name: str) -> bool:
        """A time of this device, versions and commit is there already."""
        old = self.rows.get(self.row(point, name, "time").key)
        if old is None or old.p50 is None or not record.same_source(vars(old), self.source):
            return False
        self.learn(point, name, old.p20)
        return True

    def key(self, point: Point, name: str) -> tuple:
        return self.suite.gate_problem(point.problem), name, point.mode

    def learn(self, point: Point, name: str, ms: float) -> None:
        """Remembers what a call took, to say beforehand how long the next length takes."""
        if flops := self.suite.work(name, point.problem, point.mode).flops:
            self.ns_per_flop[self.key(point, name)] = ms * 1e6 / flops

    def probe(self, point: Point, names: list[str]) -> None:
        """Where nothing tells how long a call takes, one at the gate's length does, and at longer ones by PROBE."""
        unknown = [n for n in names if self.key(point, n) not in self.ns_per_flop]
        problem, gate = point.problem, self.suite.gate_problem(point.problem)
        lengths, S = [problem.T], problem.S
        while unknown and (T := lengths[-1] // PROBE // S * S + problem.T % S) > gate.T:
            lengths.append(T)
        shorter = [cases.at_length(problem, T) for T in lengths[:0:-1]]
        for small in [gate, *shorter] if unknown and gate.T < problem.T else ():
            at = point._replace(problem=small)
            for name in unknown:
                if self.why_not(at, name) is None:
                    # What fails here fails at the point itself too, where it is a row.
                    with contextlib.suppress(Exception):
                        function = self.suite.call(name, small, self.inputs(small), point.mode)
                        function()
                        times = timing.measure({name: function}, device=self.device, min_repeats=1, seconds=0)
                        self.learn(at, name, times[name].p50)

    def ask_gate(self, small: Problem, name: str) -> str | None:
        """Why the gate does not let a provider in, or None; `refusal` asks it once, at a small length."""
        self.say(f"correctness gate of {name}")
        try:
            wrong = self.suite.gate(name, small)
            return f"refused by the gate: {' '.join(wrong[0].split())[:200]}" if wrong else None
        except Exception as error:
            return f"failed in the gate: {error_line(error)}"

    def why_not(self, point: Point, name: str) -> str | None:
        """Why this point of a provider is not measured, or None."""
        problem, mode = point.problem, point.mode
        if reason := self.suite.unavailable(name, problem, mode):
            return f"unavailable: {reason}"
        if time.monotonic() > self.deadline:
            return LATE
        if reason := self.refusal(self.suite.gate_problem(problem), name):
            return reason
        work = self.suite.work(name, problem, mode)
        expected_s = self.ns_per_flop.get(self.key(point, name), 0.0) * work.flops * 1e-9
        have = record.free_bytes(self.device)
        need = work.held_bytes + (0 if self.made else self.suite.input_bytes(problem))
        if need > have:
            return f"not measured: needs {need:.3g} bytes, {have:.3g} are free"
        if expected_s > self.max_call_s:
            return f"not measured: one call takes about {expected_s:.0f} s, the limit is {self.max_call_s:.0f} s"
        return LATE if time.monotonic() + 3 * expected_s > self.deadline else None

    def prepare(self, point: Point, name: str) -> Callable[[], object]:
        """The call to time, warmed up; its peak of memory is a row."""
        function = self.suite.call(name, point.problem, self.inputs(point.problem), point.mode)
        if torch.device(self.device).type == "cuda":
            function()  # a first launch may tune itself, in memory that later ones do not need
        try:
            peak = timing.peak_extra_bytes(function, self.device) / 2**20
        except OSError as error:
            self.add(point, name, "peak_extra_memory", note=error_line(error))
            function()
        else:
            self.add(point, name, "peak_extra_memory", (peak,) * 3)
        return function

    def measure(self, point: Point, names: list[str]) -> None:
        """Measures the providers, interleaved, at one point."""
        self.probe(point, names)
        runnable: dict[str, Callable] = {}
        if self.made and self.made[0] != point.problem:
            self.made = None  # before memory is asked for
        for name in names:
            if reason := self.why_not(point, name):
                self.missing(point, name, reason)
                continue
            try:
                runnable[name] = self.prepare(point, name)
            except Exception as error:
                self.missing(point, name, f"failed: {error_line(error)}")
        failed: dict[str, Exception] = {}
        options = {"min_repeats": self.min_repeats, "seconds": self.seconds, "deadline": self.deadline}
        times = timing.measure(runnable, device=self.device, failed=failed, **options)
        for name, error in failed.items():
            self.missing(point, name, f"failed: {error_line(error)}")
        state = record.device_state(self.device)
        for name, t in times.items():
            work = self.suite.work(name, point.problem, point.mode)
            notes = (f"{t.repeats} repeats", work.note, self.beside, state)
            self.add(point, name, "time", t[:3], "; ".join(filter(None, notes)))
            for metric, amount in (("throughput", work.flops), ("bandwidth", work.moved_bytes)):
                self.add(point, name, metric, tuple(amount / (x * 1e6) for x in (t.p80, t.p50, t.p20)))
            self.learn(point, name, t.p20)
