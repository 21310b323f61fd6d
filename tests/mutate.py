"""make mutate: makes single changes of the source and lists those that no quick test notices.

    python tests/mutate.py --number 200 --seed 0 --jobs 2 --seconds 30
    python tests/mutate.py --again tests/mutants.md --tests test_static.py

Works on copies of the tree under out/mutate. One run of the quick tests with coverage says which of them run each line;
a change is met by those that run its line (of a line outside any function, by all of a file of tests that runs its
file), the shortest first, until one fails. A change that takes ten times the time of its tests is noticed too. Each
change has a process of its own, forked from one that has imported what the tests need besides the project. A run of the
same tree goes on where an earlier one ended. --again meets those that a list names, wherever their lines stand now.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import pytest
from mutants import Mutant, draw, entry, listed

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "mutate"
MUTATED = ("hsa_tl/*.py", "hsa_tl/impl/*.py", "kernels_tilelang/*.py", "model/*.py")
PACKAGES = ("kernels_tilelang", "autotune", "model", "bench")
# Not of the product; they start processes, or read the tree itself.
LEFT_OUT = ("test_mutants.py", "test_conftest.py", "test_packaging.py", "test_layers.py", "test_distributed.py")
WALL = 20  # times its CPU time, and 5 minutes, that a process may take


def files() -> list[str]:
    """The tree: what git knows and what it does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(x for x in names.stdout.splitlines() if (ROOT / x).is_file())


def digest(names: list[str]) -> str:
    made = hashlib.sha256()
    for name in names:
        made.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return made.hexdigest()[:12]


def copy_tree(names: list[str], target: Path) -> None:
    """A copy in which target/site holds the package hsa_tl, by links, as an installation would."""
    shutil.rmtree(target, ignore_errors=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    package = target / "site" / "hsa_tl"
    package.mkdir(parents=True)
    for part in (*(target / "hsa_tl").iterdir(), *(target / name for name in PACKAGES)):
        (package / part.name).symlink_to(part)


def import_what_tests_need() -> None:
    """All that is not the project's, once, before the forks."""
    import hypothesis  # noqa: F401
    import tilelang
    import torch
    import triton.runtime.interpreter  # noqa: F401
    import typer.testing  # noqa: F401

    torch.set_num_threads(1)
    tilelang.set_log_level("WARNING")
    assert not any(name.split(".")[0] == "hsa_tl" for name in sys.modules)


def cpu_seconds() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


class Recorder:
    """A pytest plugin: for each test that passes, its seconds and the lines of the tree that it runs."""

    def __init__(self, tree: Path, out: Path):
        import coverage

        self.tree, self.out, self.passed = tree, out, False
        self.coverage = coverage.Coverage(data_file=None, include=[str(tree / x) for x in MUTATED], config_file=False)

    def pytest_runtest_logreport(self, report):
        self.passed = report.passed and (self.passed or report.when == "setup")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.erase()
        self.coverage.start()
        begin = cpu_seconds()
        result = yield
        seconds = cpu_seconds() - begin
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {os.path.relpath(f, self.tree): sorted(data.lines(f)) for f in data.measured_files() if data.lines(f)}
        if self.passed:
            with self.out.open("a") as file:
                file.write(json.dumps({"test": item.nodeid, "seconds": round(seconds, 3), "lines": lines}) + "\n")
        return result


class Chosen:
    """A pytest plugin: runs these tests alone, in this order."""

    def __init__(self, tests: list[str]):
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((x for x in items if x.nodeid in self.order), key=lambda x: self.order[x.nodeid])


def run_pytest(tree: Path, log: Path, seconds: float, arguments: list[str], plugin) -> None:
    """In a forked process: pytest over a copy of the tree. Exits as pytest does; killed beyond its CPU seconds."""
    os.setsid()
    limit = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    os.chdir(tree)
    site = str(tree / "site")
    sys.path.insert(0, site)
    sys.dont_write_bytecode = True
    cache = OUT / "cache"
    os.environ |= {
        "PYTHONPATH": site, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "mutate",
        "XDG_CACHE_HOME": str(cache), "TMPDIR": str(tree / "tmp"), "TILELANG_CACHE_DIR": str(cache / "tilelang"),
    }  # fmt: skip
    (tree / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = None
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--rootdir={tree}",
            "-c",
            str(tree / "pyproject.toml"),
        ]
        code = pytest.main([*options, *arguments], plugins=[plugin])
        sys.stdout.flush()
        os._exit(int(code))


def processes(jobs: int, work, start, done) -> None:
    """start(place, x) -> (a process, its seconds) for each x of work, so many at a time; then done(place, x, its exit
    code). A process that hangs is killed."""
    work, running = iter(work), {}
    free = list(range(jobs))
    while True:
        while free and (x := next(work, None)) is not None:
            process, seconds = start(place := free.pop(), x)
            process.start()
            running[process.sentinel] = process, place, x, time.monotonic() + WALL * seconds + 300
        if not running:
            return
        ready = connection.wait(list(running), timeout=10)
        late = [s for s, (*_, end) in running.items() if time.monotonic() > end and s not in ready]
        for sentinel in (*ready, *late):
            process, place, x, _ = running.pop(sentinel)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)  # what it started, too
            process.join()
            free.append(place)
            done(place, x, process.exitcode)


def coverage_map(names: list[str], state: Path, jobs: int) -> list[dict]:
    """Every quick test that passes, with its seconds and lines; made once for a tree."""
    parts = [state / f"map-{Path(name).stem}.jsonl" for name in names]
    todo = [p for p in parts if not p.with_suffix(".done").exists()]
    trees = [state / f"tree-{i}" for i in range(jobs)]
    fork = multiprocessing.get_context("fork")

    def start(place, part):
        part.unlink(missing_ok=True)
        arguments = ["-m", "not prove and not gpu", f"tests/{part.stem.removeprefix('map-')}.py"]
        log = state / f"{part.stem}.log"
        plugin = Recorder(trees[place], part)
        return fork.Process(target=run_pytest, args=(trees[place], log, 3600.0, arguments, plugin)), 3600.0

    def done(place, part, code):
        print(f"{part.stem}: exit {code}", flush=True)
        if code in (0, 1, 5):  # a red test is left out
            part.with_suffix(".done").touch()

    processes(jobs, todo, start, done)
    return [json.loads(line) for p in parts if p.exists() for line in p.read_text().splitlines()]


def is_test(name: str) -> bool:
    path = Path(name)
    return path.parts[0] == "tests" and path.name.startswith("test_") and path.name not in LEFT_OUT


def reached(mutant: Mutant, tests: list[dict], seconds: float) -> list[dict]:
    """The tests that run the change, the shortest first: one, and others within so many seconds of them all."""
    first, last = mutant.span
    found = [t for t in tests if any(not mutant.inside or first <= x <= last for x in t["lines"].get(mutant.path, ()))]
    if not mutant.inside:  # it ran when one of these files was imported
        files = {t["test"].split("::")[0] for t in found}
        found = [t for t in tests if t["test"].split("::")[0] in files]
    found = sorted(found, key=lambda t: (t["seconds"], t["test"]))
    ends = itertools.accumulate(t["seconds"] for t in found)
    return [t for i, (t, end) in enumerate(zip(found, ends, strict=True)) if i == 0 or end <= seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of CPU, of the tests that meet a change")
    parser.add_argument("--again", type=Path, metavar="FILE", help="the changes that are listed there, and no draw")
    parser.add_argument("--tests", nargs="+", default=["test_*.py"], help="patterns of test files, by default all")
    parser.add_argument("--only", nargs="+", default=MUTATED, help="patterns of the files to change")
    options = parser.parse_args()
    names = files()
    tag = digest(names)
    state = OUT / tag
    state.mkdir(parents=True, exist_ok=True)
    import_what_tests_need()
    for i in range(options.jobs):
        copy_tree(names, state / f"tree-{i}")
    chosen = [name for name in names if is_test(name) and any(Path(name).match(p) for p in options.tests)]
    tests = coverage_map(chosen, state, options.jobs)
    print(f"{len(tests)} tests, {sum(t['seconds'] for t in tests):.0f} s of CPU", flush=True)
    sources = {name: (ROOT / name).read_text() for name in names if any(Path(name).match(p) for p in options.only)}
    if options.again:
        found = listed(options.again.read_text(), sources)
        for name in (x for x, mutant in found.items() if mutant is None):
            print(f"no longer there: {name}", flush=True)
        mutants, named = [m for m in found.values() if m], f"listed in {options.again}"
    else:
        mutants, named = draw(sources, options.number, options.seed), f"seed {options.seed}"
    results = judge(mutants, sources, tests, state, options)
    report(mutants, results, sources, f"{named}, tree {tag}")


def judge(mutants: list[Mutant], sources: dict, tests: list[dict], state: Path, options) -> dict[str, dict]:
    """By key_of(mutant): which test noticed it, or None, and how many ran it."""
    journal = state / f"results-{len(tests)}-{options.seconds:g}.jsonl"  # of one map
    results = {x["key"]: x for x in map(json.loads, journal.read_text().splitlines())} if journal.exists() else {}
    fork = multiprocessing.get_context("fork")

    def start(place, mutant):
        tree = state / f"tree-{place}"
        (tree / mutant.path).write_text(mutant.apply(sources[mutant.path]))
        chosen = reached(mutant, tests, options.seconds)
        seconds = 10 * sum(t["seconds"] for t in chosen) + 60
        ids = [t["test"] for t in chosen]
        arguments = ["-x", "-m", "not prove and not gpu", *sorted({x.split("::")[0] for x in ids})]
        log = state / f"mutant-{place}.log"
        return fork.Process(target=run_pytest, args=(tree, log, seconds, arguments, Chosen(ids))), seconds

    def done(place, mutant, code):
        (state / f"tree-{place}" / mutant.path).write_text(sources[mutant.path])
        log = (state / f"mutant-{place}.log").read_text()
        failed = [x.split(" - ")[0] for x in log.splitlines() if x.startswith(("FAILED", "ERROR"))]
        by = None if code == 0 else failed[0] if failed else f"exit code {code}"
        found = {"key": key_of(mutant), "killed_by": by, "tests": len(reached(mutant, tests, options.seconds))}
        results[found["key"]] = found
        with journal.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{len(results)}: {key_of(mutant)}: {by or 'SURVIVED'}", flush=True)

    def todo():
        for mutant in mutants:
            if key_of(mutant) in results:
                continue
            if reached(mutant, tests, options.seconds):
                yield mutant
            else:
                results[key_of(mutant)] = {"killed_by": None, "tests": 0}

    processes(options.jobs, todo(), start, done)
    return results


def key_of(mutant: Mutant) -> str:
    return f"{mutant.path}:{mutant.line} [{mutant.start}:{mutant.end}] -> {mutant.text[:40]}"


def report(mutants: list[Mutant], results: dict, sources: dict, of: str) -> None:
    """To the terminal: the share, and those that lived as --again reads them."""
    lived = [m for m in mutants if results[key_of(m)]["killed_by"] is None]
    share = 100 * (len(mutants) - len(lived)) / max(1, len(mutants))
    print(f"\n{of}: {len(mutants) - len(lived)} of {len(mutants)} killed, {share:.1f} %")
    for m in lived:
        print(f"{entry(m, sources[m.path])}: run by {results[key_of(m)]['tests']} tests")


if __name__ == "__main__":
    main()
