"""What one lease of a Hopper machine does: gpu tests, a short tuning, a sweep; within minutes, resumable, recorded."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from hsa_tl import cases
from hsa_tl.autotune import calibrate, cost, measure, static, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench import record
from hsa_tl.bench.attention import Attention
from hsa_tl.bench.sweep import run_sweep
from hsa_tl.files import write_atomic
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang import config as configs

PREPARED = Path(".bundle/ranked.jsonl")
PREPARED_CONFIGS = 2  # of a group and case: a lease has no time for more
LENGTHS = (4096, 16384, 65536)
SELECTIONS = ("random", "overlap")
SWEPT = ("paper-d128", "k16-d128", "paper-d64")


@dataclass(frozen=True)
class Step:
    """A part of the agenda. run(seconds left) returns a detail for the record and raises when the step fails."""

    name: str
    run: Callable[[float], dict]
    share: float  # of the whole budget, at most
    required: bool = False  # its failure ends the agenda


@dataclass
class State:
    """What is done, for one device, commit and set of versions; another of these starts anew."""

    device: str
    commit: str
    versions: str
    steps: dict[str, dict] = field(default_factory=dict)


def read_state(path: Path, device: str, commit: str, versions: str) -> State:
    """The state in path if it is of the same device, commit and versions, else an empty one."""
    new = State(device, commit, versions)
    if not path.is_file():
        return new
    old = State(**json.loads(path.read_text()))
    return old if (old.device, old.commit, old.versions) == (device, commit, versions) else new


def run_agenda(steps: list[Step], state: State, path: Path, seconds: float, clock=time.monotonic) -> bool:
    """Runs the steps that are not done yet, in order, and records each at once. False if a step failed.

    A failed step is tried again by the next run; a failed required step ends this one.
    """
    end, ok = clock() + seconds, True
    for step in steps:
        if state.steps.get(step.name, {}).get("status") == "done":
            continue
        left = min(end - clock(), step.share * seconds)
        if left <= 0:
            state.steps[step.name] = {"status": "no time left"}
            continue
        begin = clock()
        try:
            detail = step.run(left)
            status = "done" if detail.pop("finished", True) else "unfinished"
        except Exception as error:
            status, detail, ok = "failed", {"error": f"{type(error).__name__}: {error}"[-2000:]}, False
        state.steps[step.name] = {"status": status, "seconds": round(clock() - begin, 1), **detail}
        write_atomic(path, json.dumps(asdict(state), indent=1) + "\n")
        if status == "failed" and step.required:
            break
    write_atomic(path, json.dumps(asdict(state), indent=1) + "\n")
    return ok


def run_tests(seconds: float) -> dict:
    """The gpu tests; RuntimeError with pytest's last lines if they are not all green."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    tail = "\n".join(run.stdout.splitlines()[-25:])
    if run.returncode:
        raise RuntimeError(f"gpu tests failed:\n{tail}")
    return {"result": tail.splitlines()[-1]}


def prepare(path: Path = PREPARED, wanted: tuple[cases.Case, ...] | None = None, jobs: int = 2) -> int:
    """Does without a GPU what tuning would spend a lease on: static ranks to a journal, kernels into TileLang's cache.

    For each case the PREPARED_CONFIGS best predicted configs of each group of each tuned program, and what the others
    run with. Returns how many kernels were compiled. Needs nvcc.
    """
    made, journal = {}, Journal(path)
    for case in cases.find("tune") if wanted is None else wanted:
        chosen = [(program, c) for program in configs.PROGRAMS for c in configs.space(program, case.problem)[:1]]
        groups = Counter()
        for row in tuner.rank(case, "h200", journal=journal, jobs=jobs):
            groups[tuner.group(row)] += 1
            if groups[tuner.group(row)] <= PREPARED_CONFIGS and not static.faults(row):
                chosen.append((row["program"], configs.parse(row["program"], row["config"])))
        for program, config in chosen:
            made.setdefault(tuple(static.identity(program, case.problem, config).values()), (program, case, config))
    for program, case, config in made.values():
        compile.kernel(program, case.problem, config)
    return len(made)


def tune(out: Path, seconds: float) -> dict:
    """Measures the cases tagged tune, best static rank first; every row goes to tuning.json, the best to table.json.

    out/tuning.jsonl is the journal that the next lease goes on from; it begins as what prepare() left. Beside them the
    constants fitted to what was measured, and the rank correlation of the predictions.
    """
    device = table.device_name() or "h100"
    journal = Journal(out / "tuning.jsonl")
    for name, found in Journal(PREPARED).all(kind="static"):
        if journal.get(name) != found:
            journal.add(name, found)
    end, rows, chosen = time.monotonic() + seconds, [], []
    wanted = cases.find("tune")
    for i, case in enumerate(wanted):
        ranked = tuner.rank(case, device, journal=journal)
        left = (end - time.monotonic()) / (len(wanted) - i)
        measured = measure.measure(case, ranked, device=device, seconds=left, journal=journal)
        rows += measured
        chosen += tuner.best(case, [r for r in measured if r["median_us"]])
    write_atomic(out / "tuning.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    table.write(out / "table.json", device, chosen)
    detail = {"candidates": len(rows), "failed": sum(bool(r["error"]) for r in rows), "chosen": len(chosen)}
    if found := calibrate.samples(journal, device):
        times, old = [x.ns_per_pair for x in found], cost.DEVICES[device]
        fitted = calibrate.fit(found, old)
        write_atomic(out / "device.json", calibrate.text(old, fitted))
        for name, constants in (("spearman", old), ("spearman_fitted", fitted)):
            detail[name] = round(calibrate.spearman(calibrate.predictions(found, constants), times), 3)
    return detail


def sweep(out: Path, seconds: float) -> dict:
    """Every provider over lengths and selections; bench.csv and bench.json grow point by point."""
    end, rows = time.monotonic() + seconds, []
    for selection in SELECTIONS:
        for name in SWEPT:
            left = max(0.0, end - time.monotonic())
            rows += run_sweep(
                Attention(), [cases.case(name)], LENGTHS, ("forward", "backward"), None, selection, "cuda", out, left,
                min_repeats=10, seconds=0.3,
            )  # fmt: skip
    late = sum("time is up" in r.note for r in rows)
    return {"rows": len(rows), "not_measured": late, "finished": late == 0}


def main(
    minutes: Annotated[float, typer.Option(help="budget of the whole run")] = 9.0,
    out: Annotated[Path, typer.Option(help="a folder for each device is made in it")] = Path("bench/results"),
    prepare_only: Annotated[bool, typer.Option("--prepare", help="only what needs no GPU: rank, compile")] = False,
) -> None:
    """Exit code 0 when every step that ran is green, 1 when one failed, 2 without a Hopper GPU (or nvcc)."""
    if prepare_only:
        if reason := static.missing_tools():
            typer.echo(f"error: {reason}", err=True)
            raise typer.Exit(2)
        typer.echo(f"ranked and compiled {prepare()} kernels into {PREPARED.parent}")
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        typer.echo("error: make gpu needs a Hopper GPU (compute capability 9.0), and torch sees none here", err=True)
        raise typer.Exit(2)
    name = record.device_name("cuda")
    folder = out / (table.device_name() or name.lower().replace(" ", "-"))
    path = folder / "agenda.json"
    state = read_state(path, name, record.commit(), record.versions())
    steps = [
        Step("tests", run_tests, 0.5, required=True),
        Step("tune", lambda seconds: tune(folder, seconds), 0.3),
        Step("sweep", lambda seconds: sweep(folder, seconds), 1.0),
    ]
    ok = run_agenda(steps, state, path, minutes * 60)
    for step, result in state.steps.items():
        typer.echo(f"{step:8} {json.dumps(result)[:600]}")
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)
