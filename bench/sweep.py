"""The sweep: cases x lengths x modes x providers, behind a correctness gate, resumable, into one JSON and one CSV."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hsa_tl import cases as named_cases
from hsa_tl.bench import gate, record, timing
from hsa_tl.bench.providers import DEFAULT_PROVIDERS, MODES, Provider, call, provider
from hsa_tl.cases import Case
from hsa_tl.problem import Problem
from hsa_tl.testing import SELECTIONS, Inputs, make_inputs
from hsa_tl.text import Corpus, text_inputs

GATE_LENGTH = 256  # tokens; TileLang's CPU target and Triton's interpreter take seconds for it
SLOW_S = 1.0  # a provider that needs longer at the gate's length, twice, has its time at others estimated from it
MAX_CALL_S = 60.0  # a point whose one call is expected to take longer is skipped, and its row says so
OVERLAP = 0.8
METRICS = {"time": "ms", "throughput": "GFLOP/s", "peak_extra_memory": "MiB"}


def selection_inputs(problem: Problem, selection: str, corpus: Corpus | None = None) -> Inputs:
    """Inputs on the problem's device with a "random", "overlap", "full" or "text" selection (of corpus)."""
    if selection not in (*SELECTIONS, "text"):
        raise ValueError(f"selection must be one of {', '.join((*SELECTIONS, 'text'))}, got {selection!r}")
    if selection == "text":
        return text_inputs(problem, corpus).to(problem.device_type)
    return make_inputs(problem, kind=selection, overlap=OVERLAP).to(problem.device_type)


def _error_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


@dataclass
class _Sweep:
    """State of one run: the rows so far, and what the gate and the last measurement said of each provider."""

    selection: str
    device: str
    corpus: Corpus | None
    min_repeats: int
    seconds: float
    max_call_s: float
    deadline: float
    rows: dict[tuple, record.Row] = field(default_factory=dict)
    refused: dict[tuple, str] = field(default_factory=dict)
    ns_per_flop: dict[tuple, float] = field(default_factory=dict)
    made: tuple[Problem, Inputs] | None = None

    def __post_init__(self) -> None:
        self.source = (record.device_name(self.device), record.versions(), record.commit())

    def inputs(self, problem: Problem) -> Inputs:
        if self.made is None or self.made[0] != problem:
            self.made = None
            self.made = problem, selection_inputs(problem, self.selection, self.corpus)
        return self.made[1]

    def row(self, case: Case, p: Problem, name: str, mode: str, metric: str, values=(None,) * 3, note="") -> record.Row:
        config = f"{case.name}: HQ={p.HQ} H={p.H} D={p.D} S={p.S} K={p.K} {p.dtype_name}"
        kernel = "dense_attention" if provider(name).dense else "hsa_attention"
        label = f"overlap={OVERLAP}" if self.selection == "overlap" else self.selection
        return record.Row(
            kernel, name, mode, metric, METRICS[metric], "T", p.T, *values, config, label, *self.source, note
        )  # fmt: skip

    def add(self, *args, **kwargs) -> None:
        row = self.row(*args, **kwargs)
        self.rows[row.key] = row

    def missing(self, case: Case, problem: Problem, name: str, mode: str, note: str) -> None:
        self.add(case, problem, name, mode, "time", note=note)

    def is_measured(self, case: Case, problem: Problem, name: str, mode: str) -> bool:
        """A time of this device, versions and commit is there already."""
        old = self.rows.get(self.row(case, problem, name, mode, "time").key)
        return old is not None and old.p50 is not None and (old.device, old.versions, old.commit) == self.source

    def admit(self, case: Case, p: Provider, problem: Problem, inputs: Inputs, want: gate.Expected) -> None:
        """The gate: p's out and gradients against float64 at a small length; a slow one is timed as well."""
        key = (case.name, problem.masked, p.name)
        try:
            start = time.perf_counter()
            results = gate.compare(p.attention, inputs, problem.S, want, baseline=p.dense)
            seconds = time.perf_counter() - start
            if wrong := [r.message for r in results if not r.ok]:
                self.refused[key] = f"refused by the gate: {wrong[0]}"
                return
            if seconds > SLOW_S:
                train = call(p, inputs, problem.S, "train")
                again = timing.measure({"": train}, device=self.device, warmup=0, min_repeats=1, max_repeats=1)
                seconds = again[""].p50 / 1e3
            # The overhead of a fast call at the gate's length would say nothing about long ones.
            if seconds > SLOW_S:
                for mode in MODES:
                    self.ns_per_flop[(*key, mode)] = seconds * 1e9 / max(1, p.flops(problem, "train"))
        except Exception as error:
            self.refused[key] = f"failed in the gate: {_error_line(error)}"

    def point(self, case: Case, problem: Problem, mode: str, names: list[str]) -> None:
        """Measures the providers, interleaved, at one length and mode."""
        late = time.monotonic() > self.deadline
        runnable: dict[str, Callable] = {}
        for name in names:
            key = (case.name, problem.masked, name)
            expected_s = self.ns_per_flop.get((*key, mode), 0.0) * provider(name).flops(problem, mode) * 1e-9
            if reason := provider(name).unavailable(problem):
                self.missing(case, problem, name, mode, f"unavailable: {reason}")
            elif key in self.refused:
                self.missing(case, problem, name, mode, self.refused[key])
            elif late or time.monotonic() + 3 * expected_s > self.deadline:
                self.missing(case, problem, name, mode, "not measured: the sweep's time is up")
            elif expected_s > self.max_call_s:
                note = f"not measured: one call takes about {expected_s:.0f} s, the limit is {self.max_call_s:.0f} s"
                self.missing(case, problem, name, mode, note)
            else:
                try:
                    runnable[name] = self.prepare(case, problem, name, mode)
                except Exception as error:
                    self.missing(case, problem, name, mode, f"failed: {_error_line(error)}")
        try:
            times = timing.measure(
                runnable, device=self.device, warmup=0, min_repeats=self.min_repeats, seconds=self.seconds,
                deadline=self.deadline,
            )  # fmt: skip
        except Exception as error:
            for name in runnable:
                self.missing(case, problem, name, mode, f"failed: {_error_line(error)}")
            return
        for name, t in times.items():
            flops = provider(name).flops(problem, mode)
            self.add(case, problem, name, mode, "time", t[:3], f"{t.repeats} repeats")
            rate = tuple(flops / (x * 1e6) for x in (t.p80, t.p50, t.p20))
            self.add(case, problem, name, mode, "throughput", rate)
            self.ns_per_flop[(case.name, problem.masked, name, mode)] = t.p20 * 1e6 / max(1, flops)

    def prepare(self, case: Case, problem: Problem, name: str, mode: str) -> Callable[[], object]:
        """The call to time, warmed up; its peak of memory is a row."""
        function = call(provider(name), self.inputs(problem), problem.S, mode)
        if torch.device(self.device).type == "cuda":
            function()  # a first launch may tune itself, in memory that later ones do not need
        try:
            peak = timing.peak_extra_bytes(function, self.device) / 2**20
        except OSError as error:
            self.add(case, problem, name, mode, "peak_extra_memory", note=_error_line(error))
            function()
        else:
            self.add(case, problem, name, mode, "peak_extra_memory", (peak,) * 3)
        return function


def run_sweep(
    cases: Iterable[Case],
    lengths: Iterable[int],
    modes: Iterable[str] = ("forward", "train"),
    providers: Iterable[str] | None = None,
    selection: str = "random",
    device: str = "cpu",
    out_dir: Path | None = None,
    deadline_s: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    threads: int | None = 2,
    min_repeats: int = 3,
    seconds: float = 2.0,
    max_call_s: float = MAX_CALL_S,
    resume: bool = True,
    corpus: Corpus | None = None,
) -> list[record.Row]:
    """Measures and returns the rows of this sweep; with out_dir, bench.csv and bench.json grow there point by point.

    Every provider first passes the gate: out and all gradients at GATE_LENGTH tokens as accurate as the eager
    equations (a dense baseline: within BASELINE_SLACK of them). One that fails, is missing, would exceed max_call_s
    seconds a call or comes after deadline_s seconds gets a row that says so. On the CPU the cases run in float32 on
    `threads` threads. resume: times in out_dir of the same device, versions and commit are kept, not measured again.
    corpus: the text of selection "text", by default Python's standard library. progress(done, total, what) is called
    before each point.
    ValueError: an unknown mode, provider or selection, or a length below 1.
    """
    kind = torch.device(device).type
    names = [provider(n).name for n in (DEFAULT_PROVIDERS[kind] if providers is None else providers)]
    lengths, modes, cases = list(lengths), list(modes), list(cases)
    if unknown := [m for m in modes if m not in MODES]:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {unknown[0]!r}")
    if short := [T for T in lengths if T < 1]:
        raise ValueError(f"lengths must be at least 1, got {short[0]}")
    if selection not in (*SELECTIONS, "text"):
        raise ValueError(f"selection must be one of {', '.join((*SELECTIONS, 'text'))}, got {selection!r}")
    if out_dir is not None:
        out_dir.mkdir(parents=True, exist_ok=True)
    progress = progress or (lambda done, total, what: None)
    deadline = float("inf") if deadline_s is None else time.monotonic() + deadline_s
    before = torch.get_num_threads()
    if kind == "cpu" and threads is not None:
        torch.set_num_threads(threads)
    try:
        sweep = _Sweep(selection, device, corpus, min_repeats, seconds, max_call_s, deadline)
        if out_dir is not None and resume:
            sweep.rows = {r.key: r for r in record.read_rows(out_dir / "bench.csv")}
        points = [(c, T, m) for c in cases for T in lengths for m in modes]
        wanted, gated = [], set()
        for i, (c, T, mode) in enumerate(points):
            base = named_cases.on_cpu(c.problem) if kind == "cpu" else c.problem
            problem = named_cases.at_length(base, T)
            todo = [n for n in names if not sweep.is_measured(c, problem, n, mode)]
            wanted += [(c, problem, n, mode) for n in names]
            if todo and (c.name, problem.masked) not in gated and time.monotonic() < deadline:
                gated.add((c.name, problem.masked))
                progress(i, len(points), f"{c.name}: correctness gate")
                tail = problem.S // 2 if problem.masked else 0
                _gate(sweep, c, named_cases.at_length(base, GATE_LENGTH - tail), names)
            if todo:
                progress(i, len(points), f"{c.name} T={T} {mode}")
                sweep.point(c, problem, mode, todo)
                if out_dir is not None:
                    record.write_rows(list(sweep.rows.values()), out_dir)
        progress(len(points), len(points), "done")
        keys = [sweep.row(*w, metric).key for w in wanted for metric in METRICS]
        return [sweep.rows[k] for k in keys if k in sweep.rows]
    finally:
        torch.set_num_threads(before)


def _gate(sweep: _Sweep, c: Case, problem: Problem, names: list[str]) -> None:
    inputs = sweep.inputs(problem)
    wants: dict[Callable, gate.Expected] = {}
    for p in map(provider, names):
        if p.unavailable(problem) is None:
            if p.oracle not in wants:
                wants[p.oracle] = gate.expected(p.oracle, inputs, problem.S)
            sweep.admit(c, p, problem, inputs, wants[p.oracle])
