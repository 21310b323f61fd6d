"""What one lease of a Hopper machine does: gpu tests, sweeps, a short tuning; within minutes, resumable, recorded."""

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from hsa_tl import cases
from hsa_tl.autotune import calibrate, cost, measure, static, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench import kernels, page, plot_eval, record, ruler
from hsa_tl.bench.attention import Attention
from hsa_tl.bench.compare import length_label
from hsa_tl.bench.decode import Decode
from hsa_tl.bench.model import ModelBench
from hsa_tl.bench.retrieve import Retrieve
from hsa_tl.bench.roofline import Micro, Roofline
from hsa_tl.bench.suite import Suite
from hsa_tl.bench.sweep import LATE, Sweep
from hsa_tl.files import write_atomic
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.model.generate import prefill
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.recipe import load_recipe
from hsa_tl.model.train import train
from hsa_tl.terminal import make_console, minutes_option, parse_lengths, plot_or_say

PREPARED = Path(".bundle/ranked.jsonl")
PREPARED_CONFIGS = 2  # of a strategy and case: a lease has no time for more


@dataclass(frozen=True)
class Step:
    """A part of the agenda. run(seconds left) returns a detail for the record and raises when the step fails."""

    name: str
    run: Callable[[float], dict]
    share: float  # of the whole budget, at most
    required: bool = False  # its failure ends the agenda


def read_state(path: Path, device: str, commit: str, versions: str) -> dict:
    """What path says is done, under "steps"; of another device, commit or set of versions nothing."""
    new = {"device": device, "commit": commit, "versions": versions}
    old = json.loads(path.read_text()) if path.is_file() else {}
    return new | {"steps": old["steps"] if record.same_source(old, new) else {}}


def run_agenda(steps: list[Step], state: dict, path: Path, seconds: float, clock=time.monotonic) -> bool:
    """Runs the steps that are not done yet, in order, and records each at once, so that the next machine goes on.

    A failed step is tried again by the next run; a failed required step ends this one. False if a step failed.
    """
    end, ok, done = clock() + seconds, True, state["steps"]
    for step in steps:
        if done.get(step.name, {}).get("status") == "done":
            continue
        left, begin = min(end - clock(), step.share * seconds), clock()
        if left <= 0:
            done[step.name] = {"status": "no time left"}
            continue
        try:
            detail = step.run(left)
            status = "done" if detail.pop("finished", True) else "unfinished"
        except Exception as error:
            status, detail, ok = "failed", {"error": f"{type(error).__name__}: {error}"[-2000:]}, False
        done[step.name] = {"status": status, "seconds": round(clock() - begin, 1), **detail}
        write_atomic(path, json.dumps(state, indent=1) + "\n")
        if status == "failed" and step.required:
            break
    write_atomic(path, json.dumps(state, indent=1) + "\n")
    return ok


GPU_TESTS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
WORKERS = ["-n", "12"] if importlib.util.find_spec("xdist") else []  # most of a test's time is the oracle's, on a CPU
SANITIZED = "tilelang and (one-token or g3-per-head)"


def _run(what: str, command: list[str], seconds: float, codes: tuple[int, ...] = (0,)) -> list[str]:
    """Lines of what the command prints; RuntimeError with its last ones if it ends with another code."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    lines = run.stdout.splitlines()
    if run.returncode not in codes:
        raise RuntimeError(f"{what} failed:\n" + "\n".join([*lines[-25:], *run.stderr.splitlines()[-10:]]))
    return lines


def run_tests(out: Path, seconds: float, command: tuple[str, ...] = (*GPU_TESTS, *WORKERS)) -> dict:
    """The gpu tests but those that out/tests.txt says have passed, of this source; it grows test by test.

    RuntimeError if one fails; those that there was no time for are left to the next run.
    """
    path, source = out / "tests.txt", record.origin("cuda")
    first, *lines = path.read_text().splitlines() if path.is_file() else ["{}"]
    failed = {x.removeprefix("failed ") for x in lines}
    known = [x for x in lines if x.startswith("passed ") and x.removeprefix("passed ") not in failed]
    known = known if record.same_source(json.loads(first), source) else []
    write_atomic(path, "\n".join([json.dumps(source), *known, ""]))
    try:  # code 5: none is left
        return {"result": _run("gpu tests", [*command, f"--passed={path}"], seconds, (0, 5) if known else (0,))[-1]}
    except subprocess.TimeoutExpired:
        lines = path.read_text().splitlines()[1:]
        if failed := [x for x in lines if x.startswith("failed ")]:
            raise RuntimeError("gpu tests failed:\n" + "\n".join(failed)) from None
        return {"passed": sum(x.startswith("passed ") for x in lines), "finished": False}


def sanitize(seconds: float) -> dict:
    """compute-sanitizer's memcheck and racecheck over a few small gpu tests; RuntimeError if one finds something."""
    if not (tool := static.find_tool("compute-sanitizer")):
        return {"note": "compute-sanitizer is not installed", "finished": False}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *GPU_TESTS, "-k", SANITIZED]
        lines = _run(check, command, seconds / 2)
        found[check] = next((x for x in reversed(lines) if "SUMMARY" in x), "no summary")
    return found


def prepare(path: Path = PREPARED, wanted: tuple[cases.Case, ...] | None = None) -> int:
    """Does without a GPU what tuning would spend a lease on: static ranks to a journal, kernels into TileLang's cache.

    For each case the PREPARED_CONFIGS best predicted plans of each strategy, and what the other programs run with.
    Returns how many kernels were compiled. Needs nvcc.
    """
    made, journal = {}, Journal(path)
    for case in cases.find("tune") if wanted is None else wanted:
        problems = {program: configs.problem_of(program, case.problem) for program in configs.PROGRAMS}
        chosen = [(program, c) for program, p in problems.items() for c in configs.space(program, p)[:1]]
        groups = Counter()
        for row in tuner.rank(case, "h200", journal=journal):
            groups[tuner.group(row)] += 1
            if groups[tuner.group(row)] <= PREPARED_CONFIGS and not row["faults"]:
                chosen += tuner.programs_of(row)
        for program, config in chosen:
            work = program, problems[program], config
            made.setdefault(tuple(static.identity(*work).values()), work)
    for work in made.values():
        compile.kernel(*work)
    return len(made)


def tune(out: Path, seconds: float) -> dict:
    """Measures the cases tagged tune, best static rank first; every row goes to tuning.json, the best to table.json.

    out/tuning.jsonl is the journal that the next lease goes on from; it begins as what prepare() left. Beside them the
    constants fitted to what was measured, and the rank correlation of the predictions.
    """
    device = cost.device_name() or cost.UNKNOWN
    journal = Journal(out / "tuning.jsonl")
    for name, found in Journal(PREPARED).all(kind="static"):
        if journal.get(name) != found:
            journal.add(name, found)
    end, rows, chosen = time.monotonic() + seconds, [], []
    wanted = cases.find("tune")

    def in_time(done: int, total: int) -> None:
        if done < total and time.monotonic() > end:
            raise TimeoutError

    for i, case in enumerate(wanted):
        try:
            ranked = tuner.rank(case, device, journal=journal, progress=in_time)
        except TimeoutError:  # what is assembled is in the journal
            break
        left = (end - time.monotonic()) / (len(wanted) - i)
        measured = measure.measure(case, ranked, device=device, seconds=left, journal=journal)
        rows += measured
        chosen += tuner.best(case, measured)
    write_atomic(out / "tuning.json", record.json_list(rows))
    table.write(out / "table.json", device, chosen)
    detail = {"candidates": len(rows), "failed": sum(bool(r["error"]) for r in rows), "chosen": len(chosen)}
    detail["finished"] = bool(chosen)
    if importlib.util.find_spec("scipy") is None:
        detail["fitted"] = "no: scipy is not installed; hsa-tl calibrate --journal tuning.jsonl fits elsewhere"
    elif found := calibrate.samples(journal, device):
        old = cost.DEVICES[device]
        fitted = calibrate.fit(found, calibrate.measured(record.read_rows(out / "bench.csv"), old))
        write_atomic(out / "device.json", calibrate.text(old, fitted))
        detail |= {"spearman": round(calibrate.agreement(found, old), 3)}
        detail |= {"spearman_fitted": round(calibrate.agreement(found, fitted), 3)}
    return detail


def needles(
    out: Path, device: str, seconds: float, *, recipe: str = "needle-small", lengths: str = "16k,64k,1m,16m",
    runs: Path = Path("out/train"),
) -> dict:  # fmt: skip
    """Trains the recipe for three quarters of the seconds and evaluates it: out/ruler.json, ruler.png.

    The detail has the seconds and the peak memory of a prefill of each length. An unfinished training goes on in the
    next run from the folder of runs, and what there is is evaluated.
    """
    record.read_json(out / "ruler.json")  # what cannot be added to is known before
    plan = load_recipe(recipe)
    run = runs / plan.name
    model = train(plan, run, device=device, seconds=0.75 * seconds)
    done = ruler.Run.of(run, model)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    detail: dict = {"trained_tokens": done.trained_tokens, "prefill": {}}
    rows = []
    for length in parse_lengths(lengths):
        ids = torch.randint(model.config.vocab_size, (1, length))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        int(prefill(model, ids)[0].argmax())  # waits for the device
        spent = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        detail["prefill"][length_label(length)] = {"seconds": round(spent, 3), "peak_bytes": peak}
        depths = [i / 4 for i in range(5)]
        rows += ruler.run_ruler(LongReader(model), "needles", ["s-niah", "mq-niah"], [length], depths, samples=4)
        ruler.write_rows(rows, done, device, out / "ruler.json")
        about = done.model, done.trained_length, ruler.chance("needles")
        plot_or_say(make_console(), plot_eval.plot_ruler, rows, *about, out / "ruler.png")
    detail["accuracy"] = {f"{r.task} {length_label(r.length)} {r.depth}": r.accuracy for r in rows}
    return detail | {"finished": done.finished}


@dataclass(frozen=True)
class Measure:
    """A step that measures one suite: cases and lengths as `hsa-tl bench` names them; modes None: the suite's."""

    name: str
    suite: Callable[[], Suite]
    cases: tuple[str, ...]
    lengths: str
    share: float  # of the whole budget, at most
    modes: tuple[str, ...] | None = None
    selections: tuple[str, ...] = ("random",)

    def run(self, out: Path, device: str, seconds: float) -> dict:
        """Every provider; bench.csv and bench.json of out grow point by point."""
        end, rows, suite, lengths = time.monotonic() + seconds, [], self.suite(), parse_lengths(self.lengths)
        for selection, name in itertools.product(self.selections, self.cases):
            left = max(0.0, end - time.monotonic())
            what = (suite, suite.find_case(name), lengths, self.modes, None, selection, device, out, left)
            rows += Sweep(*what, min_repeats=10, seconds=0.3).run()
        late = sum(r.note == LATE for r in rows)
        return {"rows": len(rows), "not_measured": late, "finished": late == 0}


BOTH = ("forward", "backward")
TRAINED = f"trained={Path(__file__).parent / 'results/cpu/selections.safetensors'}"
# In the order of bench/AGENDA.md: the roofline, the headline, then what explains it.
SWEEPS = (
    Measure("roofline", Roofline, ("paper-d128",), "8k", 0.05),
    Measure("micro", Micro, ("paper-d128",), "4k,16k,32k,64k,128k,1m", 0.1),
    Measure("headline", Attention, ("paper-d128",), "4k,16k,64k,128k", 0.5, BOTH),
    Measure("decode", Decode, ("paper-d128",), "4k,128k,1m,16m", 0.15),
    Measure("retrieve", Retrieve, ("paper-d128",), "4k,128k,1m,16m", 0.15),
    Measure("selections", Attention, ("paper-d128",), "4k,16k,64k", 0.4, BOTH, ("overlap=0.8", "full", "text")),
    Measure("trained", Attention, ("k16-d128",), "4k,16k", 0.2, BOTH, (TRAINED,)),
    Measure(
        "cases", Attention, ("k16-d128", "paper-d64", "g4", "g1"), "4k,16k,64k", 0.5, BOTH, ("random", "overlap=0.8")
    ),
    Measure("model", ModelBench, ("small",), "4k,16k,64k", 0.3),
)
TUNE_AFTER = "headline"


def profile(out: Path, seconds: float) -> dict:
    """out/kernels.jsonl: the device's time in each kernel of a call, and the host's."""
    base = cases.case("paper-d128").problem
    return kernels.write(out / "kernels.jsonl", (cases.at_length(base, T) for T in (16384, 4096, 65536)), seconds)


def agenda(folder: Path, device: str = "cuda", sweeps: tuple[Measure, ...] = SWEEPS) -> list[Step]:
    """What one lease does, in order; results go to folder."""
    steps = [
        Step("tests", functools.partial(run_tests, folder), 0.5, required=True),
        Step("kernels", functools.partial(profile, folder), 0.1),
    ]
    for plan in sweeps:
        steps.append(Step(plan.name, functools.partial(plan.run, folder, device), plan.share))
        if plan.name == TUNE_AFTER:
            steps.append(Step("tune", functools.partial(tune, folder), 0.3))
    steps.append(Step("sanitize", sanitize, 0.3))
    return [*steps, Step("needles", functools.partial(needles, folder, device), 1.0)]


def main(
    minutes: Annotated[float, minutes_option("budget of the whole run")] = 9.0,
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
    folder = out / (cost.device_name() or name.lower().replace(" ", "-"))
    path = folder / "agenda.json"
    state = read_state(path, name, record.commit(), record.versions())
    ok = run_agenda(agenda(folder), state, path, minutes * 60)
    for step, result in state["steps"].items():
        typer.echo(f"{step:10} {json.dumps(result)[:600]}")
    try:
        page.write_page(out)
    except ValueError as error:  # the figures are in the files; a page can be written anywhere
        typer.echo(f"no page: {error}")
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    typer.run(main)
