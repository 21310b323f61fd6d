"""What one lease of a Hopper machine does: gpu tests, a short tuning, a sweep; within minutes, resumable, recorded."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer

from hsa_tl import cases
from hsa_tl.autotune import static, table, tuner
from hsa_tl.bench import record
from hsa_tl.bench.attention import Attention
from hsa_tl.bench.sweep import run_sweep
from hsa_tl.files import write_atomic
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang import config as configs

PREPARED = Path(".bundle/ranked.json")
PREPARED_CONFIGS = 3  # of a program and case: a lease has no time for more
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


def prepare(path: Path = PREPARED, wanted: tuple[cases.Case, ...] | None = None) -> int:
    """Does without a GPU what tuning would spend a lease on: static ranks to a file, kernels into TileLang's cache.

    For each case the PREPARED_CONFIGS best predicted configs of each tuned program, and what the others run with.
    Returns how many kernels were compiled. Needs nvcc.
    """
    wanted = cases.find("tune") if wanted is None else wanted
    rows, made = [], set()
    for case in wanted:
        ranks = tuner.rank(case, "h200", jobs=2)
        rows += ranks
        chosen = [(program, c) for program in configs.PROGRAMS for c in configs.space(program, case.problem)[:1]]
        for program in configs.TUNED:
            best = [r for r in ranks if r["program"] == program][:PREPARED_CONFIGS]
            chosen += [(program, configs.parse(program, r["config"])) for r in best]
        for program, config in dict.fromkeys(chosen):
            compile.kernel(program, case.problem, config)
            made.add((case.name, program, config))
    write_atomic(path, json.dumps({"commit": record.commit(), "rows": rows}) + "\n")
    return len(made)


def ranked(case: cases.Case, path: Path = PREPARED) -> list[dict]:
    """Static rows of a case: what prepare() left of this commit, else ranked now."""
    if path.is_file():
        prepared = json.loads(path.read_text())
        rows = [r for r in prepared["rows"] if r["case"] == case.name]
        if rows and prepared["commit"] == record.commit():
            return rows
    return tuner.rank(case, table.device_name() or "h100")


def tune(out: Path, seconds: float) -> dict:
    """Measures the cases tagged tune, best static rank first; every row goes to tuning.json, the best to table.json."""
    end, rows, chosen = time.monotonic() + seconds, [], []
    wanted = cases.find("tune")
    for i, case in enumerate(wanted):
        deadline = time.monotonic() + (end - time.monotonic()) / (len(wanted) - i)
        measured = tuner.measure(case, ranked(case), deadline=deadline)
        rows += measured
        chosen += tuner.best(case, [r for r in measured if r.get("median_us")])
    write_atomic(out / "tuning.json", "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    table.write(out / "table.json", table.device_name() or "unknown", chosen)
    return {"candidates": len(rows), "failed": sum(bool(r["error"]) for r in rows), "chosen": len(chosen)}


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
