"""The sweep: cases x lengths x modes x providers of a suite, behind its gate, resumable, into one JSON and one CSV."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hsa_tl import cases as named_cases
from hsa_tl.bench import record, timing
from hsa_tl.bench.neighbours import describe, neighbours
from hsa_tl.bench.suite import Suite, error_line, one_of, parse_selection, selection_label
from hsa_tl.cases import Case
from hsa_tl.problem import Problem

SLOW_S = 1.0  # a provider that needs longer in the gate has its time at others estimated from it
PROBE = 8
MAX_CALL_S = 60.0  # a point whose one call is expected to take longer is skipped, and its row says so
METRICS = {"time": "ms", "throughput": "GFLOP/s", "bandwidth": "GB/s", "peak_extra_memory": "MiB"}


@dataclass
class _Sweep:
    """State of one run: the rows so far, and what the gate and the last measurement said of each provider."""

    suite: Suite
    selection: str
    device: str
    min_repeats: int
    seconds: float
    max_call_s: float
    deadline: float
    beside: str = ""  # what else runs
    rows: dict[tuple, record.Row] = field(default_factory=dict)
    refused: dict[tuple, str] = field(default_factory=dict)
    ns_per_flop: dict[tuple, float] = field(default_factory=dict)
    made: tuple[Problem, object] | None = None

    def __post_init__(self) -> None:
        # Part of the device, as its threads are: rows with and without neighbours stand beside each other.
        device = ", ".join(filter(None, (record.device_name(self.device), self.beside)))
        self.source = (device, record.versions(), record.commit())

    def inputs(self, problem: Problem):
        if self.made is None or self.made[0] != problem:
            self.made = None
            self.made = problem, self.suite.inputs(problem, self.selection)
        return self.made[1]

    def row(self, case: Case, p: Problem, name: str, mode: str, metric: str, values=(None,) * 3, note="") -> record.Row:
        config, label = f"{case.name}: {self.suite.label(p)}", selection_label(self.selection)
        kernel, unit = self.suite.kernel(name), METRICS[metric]
        return record.Row(kernel, name, mode, metric, unit, "T", p.T, *values, config, label, *self.source, note)

    def add(self, *args, **kwargs) -> None:
        row = self.row(*args, **kwargs)
        self.rows[row.key] = row

    def missing(self, case: Case, problem: Problem, name: str, mode: str, note: str) -> None:
        for metric in METRICS:  # of an older commit
            self.rows.pop(self.row(case, problem, name, mode, metric).key, None)
        self.add(case, problem, name, mode, "time", note=note)

    def is_measured(self, case: Case, problem: Problem, name: str, mode: str) -> bool:
        """A time of this device, versions and commit is there already."""
        old = self.rows.get(self.row(case, problem, name, mode, "time").key)
        if old is None or old.p50 is None or (old.device, old.versions, old.commit) != self.source:
            return False
        self.learn(case, problem, name, mode, old.p20)
        return True

    def learn(self, case: Case, problem: Problem, name: str, mode: str, ms: float) -> None:
        """Remembers what a call took, to say beforehand how long the next length takes."""
        flops = max(1, self.suite.work(name, problem, mode).flops)
        self.ns_per_flop[(case.name, problem.masked, name, mode)] = ms * 1e6 / flops

    def once(self, problem: Problem, name: str, mode: str) -> float:
        """Milliseconds of one call, after one that warms up."""
        function = self.suite.call(name, problem, self.inputs(problem), mode)
        return timing.measure({"": function}, device=self.device, min_repeats=1, max_repeats=1)[""].p50

    def probe(self, case: Case, problem: Problem, mode: str, names: list[str]) -> None:
        """Where nothing tells how long a call takes, one at shorter lengths does, each PROBE times the one before."""
        key = (case.name, problem.masked)
        unknown = [n for n in names if (*key, n, mode) not in self.ns_per_flop]
        lengths, least, S = [], self.suite.gate_problem(problem).T, problem.S
        while unknown and (T := (lengths or [problem.T])[-1] // PROBE // S * S + problem.T % S) > least:
            lengths.append(T)
        for T in reversed(lengths):
            small = self.suite.problem(problem, T)
            for name in unknown:
                if self.why_not(case, small, name, mode) is None:
                    # What fails here fails at the point itself too, where it is a row.
                    with contextlib.suppress(Exception):
                        self.learn(case, small, name, mode, self.once(small, name, mode))

    def admit(self, case: Case, problem: Problem, name: str, modes: Iterable[str]) -> None:
        """The gate, at a small length; a provider that is slow there is timed as well."""
        key, small = (case.name, problem.masked, name), self.suite.gate_problem(problem)
        try:
            start = time.perf_counter()
            if wrong := self.suite.gate(name, small):
                self.refused[key] = f"refused by the gate: {' '.join(wrong.split())[:200]}"
                return
            # The overhead of a fast call at the gate's length would say nothing about long ones.
            slow = time.perf_counter() - start > SLOW_S
            for mode in (m for m in modes if slow and not self.suite.unavailable(name, small, m)):
                if (ms := self.once(small, name, mode)) > SLOW_S * 1e3:
                    self.learn(case, small, name, mode, ms)
        except Exception as error:
            self.refused[key] = f"failed in the gate: {error_line(error)}"

    def why_not(self, case: Case, problem: Problem, name: str, mode: str) -> str | None:
        """Why this point of a provider is not measured, or None."""
        key = (case.name, problem.masked, name)
        if reason := self.suite.unavailable(name, problem, mode):
            return f"unavailable: {reason}"
        if key in self.refused:
            return self.refused[key]
        work = self.suite.work(name, problem, mode)
        expected_s = self.ns_per_flop.get((*key, mode), 0.0) * work.flops * 1e-9
        have = record.free_bytes(self.device)
        need = work.held_bytes + (0 if self.made else self.suite.input_bytes(problem))
        if need > have:
            return f"not measured: needs {need:.3g} bytes, {have:.3g} are free"
        if expected_s > self.max_call_s:
            return f"not measured: one call takes about {expected_s:.0f} s, the limit is {self.max_call_s:.0f} s"
        if time.monotonic() + 3 * expected_s > self.deadline:
            return "not measured: the sweep's time is up"
        return None

    def point(self, case: Case, problem: Problem, mode: str, names: list[str]) -> None:
        """Measures the providers, interleaved, at one length and mode."""
        self.probe(case, problem, mode, names)
        runnable: dict[str, Callable] = {}
        if self.made and self.made[0] != problem:
            self.made = None  # before memory is asked for
        for name in names:
            reason = self.why_not(case, problem, name, mode)
            if reason is None:
                try:
                    runnable[name] = self.prepare(case, problem, name, mode)
                except Exception as error:
                    reason = f"failed: {error_line(error)}"
            if reason is not None:
                self.missing(case, problem, name, mode, reason)
        try:
            times = timing.measure(
                runnable, device=self.device, warmup=0, min_repeats=self.min_repeats, seconds=self.seconds,
                deadline=self.deadline,
            )  # fmt: skip
        except Exception as error:
            for name in runnable:
                self.missing(case, problem, name, mode, f"failed: {error_line(error)}")
            return
        state = record.device_state(self.device)
        for name, t in times.items():
            work = self.suite.work(name, problem, mode)
            notes = (f"{t.repeats} repeats", work.note, self.beside, state)
            self.add(case, problem, name, mode, "time", t[:3], "; ".join(filter(None, notes)))
            for metric, amount in (("throughput", work.flops), ("bandwidth", work.moved_bytes)):
                self.add(case, problem, name, mode, metric, tuple(amount / (x * 1e6) for x in (t.p80, t.p50, t.p20)))
            self.learn(case, problem, name, mode, t.p20)

    def prepare(self, case: Case, problem: Problem, name: str, mode: str) -> Callable[[], object]:
        """The call to time, warmed up; its peak of memory is a row."""
        function = self.suite.call(name, problem, self.inputs(problem), mode)
        if torch.device(self.device).type == "cuda":
            function()  # a first launch may tune itself, in memory that later ones do not need
        try:
            peak = timing.peak_extra_bytes(function, self.device) / 2**20
        except OSError as error:
            self.add(case, problem, name, mode, "peak_extra_memory", note=error_line(error))
            function()
        else:
            self.add(case, problem, name, mode, "peak_extra_memory", (peak,) * 3)
        return function

    def run(self, points: list, names: list[str], out_dir: Path | None, resume: bool, progress) -> list[record.Row]:
        wanted, gated, kind = [], set(), parse_selection(self.selection)[0]
        for i, (case, problem, mode) in enumerate(points):
            mine = [n for n in names if self.suite.does(n, mode, kind)]
            todo = [n for n in mine if not (resume and self.is_measured(case, problem, n, mode))]
            wanted += [(case, problem, n, mode) for n in mine]
            for n in todo:
                key = (case.name, problem.masked, n)
                if key in gated or self.suite.unavailable(n, problem, mode) or time.monotonic() > self.deadline:
                    continue
                gated.add(key)
                progress(i, len(points), f"{case.name}: correctness gate of {n}")
                self.admit(case, problem, n, dict.fromkeys(m for *_, m in points if self.suite.does(n, m, kind)))
            if todo:
                progress(i, len(points), f"{case.name} T={problem.T} {mode}")
                self.point(case, problem, mode, todo)
                if out_dir is not None:
                    record.write_rows(list(self.rows.values()), out_dir)
        progress(len(points), len(points), "done")
        keys = [self.row(*w, metric).key for w in wanted for metric in METRICS]
        return [self.rows[k] for k in keys if k in self.rows]


def run_sweep(
    suite: Suite,
    cases: Iterable[Case],
    lengths: Iterable[int],
    modes: Iterable[str] | None = None,
    providers: Iterable[str] | None = None,
    selection: str = "random",
    device: str = "cpu",
    out_dir: Path | None = None,
    deadline_s: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    threads: int | None = 2,
    busy: int = 0,
    min_repeats: int = 3,
    seconds: float = 2.0,
    max_call_s: float = MAX_CALL_S,
    resume: bool = True,
) -> list[record.Row]:
    """Measures and returns the rows of this sweep; with out_dir, bench.csv and bench.json grow there point by point.

    Every provider first passes the suite's gate. One that fails it, is missing, does not fit in memory, would exceed
    max_call_s seconds a call or comes after deadline_s seconds gets a row that says so. On the CPU the cases run in
    float32 on `threads` threads, beside `busy` processes that spin; the rows' device and note say so. Rows of out_dir
    that this sweep does not measure stay. resume: times there of the same device, versions and commit are kept, not
    measured again. progress(done, total, what) is called before each point. modes and providers default to the suite's.
    ValueError: an unknown mode, provider or selection, a length below 1 or off the suite's grid, or busy below 0.
    """
    kind = torch.device(device).type
    names = [one_of("provider", n, suite.known()) for n in (providers or suite.default(kind))]
    modes = [one_of("mode", m, suite.modes) for m in (modes or suite.default_modes)]
    chosen = one_of(f"selection of {suite.name}", parse_selection(selection)[0], suite.selections)
    if not any(suite.does(n, m, chosen) for n in names for m in modes):
        raise ValueError(f"providers must have {' or '.join(modes)} of {chosen}, got {', '.join(names)}")
    lengths, cases = list(lengths), list(cases)
    if short := [T for T in lengths if T < 1]:
        raise ValueError(f"lengths must be at least 1, got {short[0]}")
    for S in {c.problem.S for c in cases} if suite.multiple_of_chunk else ():
        if off := [T for T in lengths if T % S]:
            raise ValueError(f"lengths must be multiples of the chunk size {S}, got {off[0]}")
    if busy < 0:
        raise ValueError(f"busy must be at least 0, got {busy}")
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)
    progress = progress or (lambda done, total, what: None)
    deadline = float("inf") if deadline_s is None else time.monotonic() + deadline_s
    before = torch.get_num_threads()
    if kind == "cpu" and threads is not None:
        torch.set_num_threads(threads)
    try:
        sweep = _Sweep(suite, selection, device, min_repeats, seconds, max_call_s, deadline, describe(busy))
        if out_dir is not None:
            sweep.rows = {r.key: r for r in record.read_rows(out_dir / "bench.csv")}
        points = []
        for c in cases:
            base = named_cases.on_cpu(c.problem) if kind == "cpu" else c.problem
            points += [(c, suite.problem(base, T), m) for T in lengths for m in modes]
        with neighbours(busy):
            return sweep.run(points, names, out_dir, resume, progress)
    finally:
        torch.set_num_threads(before)
