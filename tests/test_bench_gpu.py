"""The GPU run: steps resume, time ends them, red tests end them; prepared ranks are of their commit."""

import dataclasses
import functools
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from tiers import prove
from tuning import FakeGpu, compile_by, fake_compiler

from hsa_tl import cases
from hsa_tl.bench import gpu, page, record, roofline
from hsa_tl.bench.roofline import Roofline
from hsa_tl.bench.selections import load_selection

CASE = dataclasses.replace(cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 2048))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def steps(clock, log, broken=()):
    def step(name, cost):
        def run(left):
            clock.now += cost
            log.append((name, left))
            if name in broken:
                raise RuntimeError("red")
            return {"detail": name}

        return run

    return [
        gpu.Step("tests", step("tests", 40), 0.5, required=True),
        gpu.Step("tune", step("tune", 30), 0.3),
        gpu.Step("sweep", step("sweep", 30), 1.0),
    ]


def test_the_gpu_run_resumes_and_keeps_to_its_time(tmp_path):
    path, clock, log = tmp_path / "agenda.json", Clock(), []
    source = ("H100", "abc", "torch 2")
    assert gpu.run_agenda(steps(clock, log), gpu.read_state(path, *source), path, 70, clock)
    assert log == [("tests", 35), ("tune", 21)]
    state = gpu.read_state(path, *source)
    assert {k: v["status"] for k, v in state["steps"].items()} == {
        "tests": "done", "tune": "done", "sweep": "no time left",
    }  # fmt: skip
    assert gpu.run_agenda(steps(clock, log), state, path, 70, clock) and log[2:] == [("sweep", 70)]
    assert gpu.read_state(path, "H200", "abc", "torch 2")["steps"] == {}, "another device starts anew"


def test_red_tests_end_the_gpu_run_and_are_tried_again(tmp_path):
    path, clock, log = tmp_path / "agenda.json", Clock(), []
    source = ("H100", "abc", "torch 2")
    assert not gpu.run_agenda(steps(clock, log, {"tests"}), gpu.read_state(path, *source), path, 100, clock)
    assert [name for name, _ in log] == ["tests"]
    state = gpu.read_state(path, *source)
    assert state["steps"]["tests"]["status"] == "failed" and "red" in state["steps"]["tests"]["error"]
    assert gpu.run_agenda(steps(clock, log), state, path, 200, clock)
    assert [name for name, _ in log] == ["tests", "tests", "tune", "sweep"]


def test_tests_that_time_ended_do_not_end_the_gpu_run(tmp_path):
    late = gpu.Step("tests", lambda left: {"finished": False}, 0.5, required=True)
    state, clock, log = {"steps": {}}, Clock(), []
    assert gpu.run_agenda([late, *steps(clock, log)[1:]], state, tmp_path / "agenda.json", 100, clock)
    assert [x["status"] for x in state["steps"].values()] == ["unfinished", "done", "done"]


PLAN = (
    gpu.Measure("roofline", Roofline, ("k16-d64",), "64", 0.5),
    gpu.Measure("headline", gpu.Attention, ("k16-d64",), "64,128", 0.5, ("forward",)),
    gpu.Measure("retrieve", gpu.Retrieve, ("k16-d64",), "64", 0.5, ("prefill",)),
)


@prove
def test_the_whole_agenda_goes_on_from_one_machine_to_the_next(monkeypatch, tmp_path):
    """A fake device and clock: the second machine has the first one's folder and does what is left, then nothing."""
    monkeypatch.setattr(record, "device_name", lambda device: "NVIDIA H200 (a fake)")
    monkeypatch.setattr(roofline, "COPIED_BYTES", 1 << 20)
    quick = {"min_repeats": 1, "seconds": 0.0, "threads": 1}
    monkeypatch.setattr(gpu, "Sweep", lambda *x, sweep=gpu.Sweep, **options: sweep(*x, **options | quick))
    clock, done = Clock(), []

    def takes(cost, function):
        def run(*args):
            clock.now += cost
            done.append(function)
            return {"result": function}

        return run

    monkeypatch.setattr(gpu, "run_tests", takes(2000, "tests"))
    monkeypatch.setattr(gpu, "profile", takes(0, "kernels"))
    monkeypatch.setattr(gpu, "tune", takes(2000, "tune"))
    monkeypatch.setattr(gpu, "sanitize", takes(0, "sanitize"))
    monkeypatch.setattr(gpu, "needles", takes(2000, "needles"))
    monkeypatch.setattr(
        gpu.Measure, "run", lambda self, *x, run=gpu.Measure.run: takes(2000, self.name)() and run(self, *x)
    )
    folder = tmp_path / "h200"

    def lease(seconds):
        path, source = folder / "agenda.json", (record.device_name("cuda"), "abc", "torch 2")
        state = gpu.read_state(path, *source)
        assert gpu.run_agenda(gpu.agenda(folder, "cpu", PLAN), state, path, seconds, clock)
        return [name for name, step in state["steps"].items() if step["status"] == "done"]

    assert lease(5000) == ["tests", "kernels", "roofline", "headline"]
    first = record.read_folder(folder)
    assert {r.device for r in first} == {"NVIDIA H200 (a fake)"} and not [r for r in first if "is up" in r.note]
    assert lease(3000) == ["tests", "kernels", "roofline", "headline", "tune", "retrieve"]
    second = record.read_folder(folder)
    assert set(first) < set(second) and {r.kernel for r in second} >= {"roofline", "retrieval", "hsa_attention"}
    assert lease(5000)[-1] == "needles"
    before = len(done)
    lease(5000)
    assert len(done) == before and record.read_folder(folder) == second
    page.write_page(tmp_path)
    assert "NVIDIA H200 (a fake)" in (tmp_path / "README.md").read_text()


SLOW = """
import time

def test_quick(): pass

def test_quick_too(): pass

def test_slow(): time.sleep({seconds})
"""


def test_tests_that_time_ends_go_on_where_they_stopped(monkeypatch, tmp_path):
    """A time limit is no failure, and what has passed at this commit is not run again; a failure is one."""
    monkeypatch.setenv("HSA_TL_COMMIT", "abc")
    monkeypatch.setattr(record, "device_name", lambda device: "a fake")
    folder, out = tmp_path / "tests", tmp_path / "out"
    folder.mkdir()
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    command = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(folder))

    def lease(text, lines=None):
        """Ended where tests.txt has so many lines."""

        def run(command, timeout, **options):
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
                while process.poll() is None and (out / "tests.txt").read_text().count("\n") < lines:
                    time.sleep(0.05)
                process.kill()
            raise subprocess.TimeoutExpired(command, timeout)

        (folder / "test_it.py").write_text(text)
        with monkeypatch.context() as patch:
            if lines:
                patch.setattr(gpu.subprocess, "run", run)
            return gpu.run_tests(out, 600.0, command)

    slow, quick = (SLOW.format(seconds=x) for x in (600, 0))
    assert lease(slow, 3) == {"passed": 2, "finished": False}
    assert "1 passed" in lease(quick)["result"] and "no tests ran" in lease(slow)["result"]
    monkeypatch.setenv("HSA_TL_COMMIT", "def")
    with pytest.raises(RuntimeError, match=r"gpu tests failed:\nfailed .*test_quick$"):
        lease(slow.replace("pass", "assert False", 1), 3)
    with pytest.raises(RuntimeError, match="1 failed, 1 passed"):
        lease(quick.replace("pass", "assert False", 1))


@pytest.mark.parametrize("code, errors", [(0, 0), (9, 2)])
def test_sanitize_runs_each_check(code, errors, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(gpu.static, "find_tool", lambda name: None)
        assert gpu.sanitize(60.0) == {"note": "compute-sanitizer is not installed", "finished": False}
    tool = tmp_path / "compute-sanitizer"
    lines = "#!/bin/sh", "echo no driver >&2", "echo $2", f"echo '== ERROR SUMMARY: {errors} errors'", f"exit {code}"
    tool.write_text("\n".join(lines))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu.static, "find_tool", lambda name: str(tool))
    if code:
        with pytest.raises(RuntimeError, match=r"memcheck failed:\nmemcheck\n== ERROR SUMMARY: 2 errors\nno driver"):
            gpu.sanitize(60.0)
    else:
        assert gpu.sanitize(60.0) == dict.fromkeys(("memcheck", "racecheck"), "== ERROR SUMMARY: 0 errors")


def test_the_agenda_names_what_there_is():
    names = [s.name for s in gpu.agenda(gpu.Path("x"))]
    assert names[:6] == ["tests", "kernels", "roofline", "micro", "headline", "tune"] and len(set(names)) == len(names)
    for plan in gpu.SWEEPS:
        suite = plan.suite()
        assert all(suite.find_case(name) for name in plan.cases) and gpu.parse_lengths(plan.lengths)
        assert set(plan.modes or ()) <= set(suite.modes)
        for file in (x.removeprefix("trained=") for x in plan.selections if x.startswith("trained=")):
            for name, T in itertools.product(plan.cases, gpu.parse_lengths(plan.lengths)):
                load_selection(Path(file), cases.at_length(suite.find_case(name).problem, T))


TOY = """
preset: tiny
lr: 1.0e-3
stages:
  - {steps: 2, length: 64, batch: 2, data: {kind: needles, tasks: [{}]}}
"""


@prove
def test_needles_train_in_parts(tmp_path):
    """Training that runs out of time is evaluated as it is and goes on in the next lease."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY)
    lease = functools.partial(gpu.needles, tmp_path, "cpu", recipe=recipe, lengths="256,512", runs=tmp_path)
    first, second = lease(0.0), lease(60.0)
    assert (first["finished"], first["trained_tokens"]) == (False, 128)
    assert (second["finished"], second["trained_tokens"]) == (True, 256) and second["prefill"].keys() == {"256", "512"}
    rows = json.loads((tmp_path / "ruler.json").read_text())
    assert len(rows) == len(second["accuracy"]) == 2 * 2 * 5 and {r["trained_tokens"] for r in rows} == {256}
    assert (tmp_path / "ruler.png").stat().st_size > 5000


@prove
def test_needles_are_asked_without_matplotlib(monkeypatch, tmp_path):
    """As a machine of a lease may be: the figures are in the file, the picture can be made anywhere."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(TOY)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert len(gpu.needles(tmp_path, "cpu", 60.0, recipe=recipe, lengths="256,512", runs=tmp_path)["prefill"]) == 2
    assert (tmp_path / "ruler.json").exists() and not (tmp_path / "ruler.png").exists()


def test_a_sweep_without_time_is_unfinished(tmp_path):
    detail = PLAN[1].run(tmp_path, "cpu", 0.0)
    assert not detail["finished"] and detail["not_measured"] > 0


def test_what_is_prepared_without_a_gpu_is_what_the_lease_measures(monkeypatch, tmp_path):
    """The journal of prepare() ranks for tune(), which measures, writes its files and goes on where it stopped."""
    path, compiled = tmp_path / "ranked.jsonl", []
    monkeypatch.setattr(gpu.static, "missing_tools", lambda: None)
    monkeypatch.setattr(gpu.static, "nvcc_release", lambda: "13.0")
    compile_by(monkeypatch, fake_compiler)
    monkeypatch.setattr(gpu.compile, "kernel", lambda program, problem, config: compiled.append((program, config)))
    assert gpu.prepare(path, (CASE,)) == len(compiled) == len(set(compiled))
    assert {program for program, _ in compiled} == {
        p for p in gpu.configs.PROGRAMS if gpu.configs.space(p, gpu.configs.problem_of(p, CASE.problem))
    }

    def nothing_left(*_):
        raise AssertionError("assembled on the lease")

    compile_by(monkeypatch, nothing_left)
    monkeypatch.setattr(gpu, "PREPARED", path)
    monkeypatch.setattr(gpu.cases, "find", lambda tag: (CASE,))
    fake = FakeGpu()
    monkeypatch.setattr(gpu.measure, "gpu_rig", fake.rig)
    detail = gpu.tune(tmp_path / "out", 1e6)
    rows = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert detail["candidates"] == len(rows) > detail["chosen"] == len(gpu.table.read(tmp_path / "out" / "table.json"))
    assert -1 <= detail["spearman"] <= 1
    assert gpu.cost.make_device(**json.loads((tmp_path / "out" / "device.json").read_text()))
    looked = len(fake.log)
    assert gpu.tune(tmp_path / "out", 1e6) == detail and len(fake.log) == looked and detail["finished"]
    late = gpu.tune(tmp_path / "late", 0.0)
    assert not late["finished"] and late["chosen"] == 0, "nothing is measured"
    monkeypatch.setattr(gpu, "PREPARED", tmp_path / "none")  # so that ranking would assemble
    assert gpu.tune(tmp_path / "unranked", -1.0)["candidates"] == 0


def test_the_bundle_is_unpacked_whole_and_again_when_it_changes(tmp_path):
    (tmp_path / "bench").mkdir()
    script, archive = tmp_path / "bench" / "gpu.sh", tmp_path / ".bundle" / "tilelang.tar.xz"
    script.write_text((Path(gpu.__file__).parent / "gpu.sh").read_text())
    archive.parent.mkdir()

    def unpack(data, age):
        archive.write_bytes(data)
        os.utime(archive, (time.time() - age,) * 2)
        run = subprocess.run(["bash", script], env=os.environ | {"PYTHON": "true"}, capture_output=True)
        return run.returncode == 0, sorted(p.name for p in (archive.parent / "site").glob("*"))

    def packed(name):
        file, data = tarfile.TarInfo(name), io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as tar:
            tar.addfile(file)
        return data.getvalue()

    assert unpack(packed("a")[:-30], 100) == (False, []), "torn"
    assert unpack(packed("a"), 100) == (True, ["a"])
    assert unpack(packed("b"), 100) == (True, ["a"]), "no newer one"
    assert unpack(packed("b"), -100) == (True, ["b"])


def test_checkouts_in_the_bundle_are_named(tmp_path):
    (tmp_path / "bench").mkdir()
    script, python = tmp_path / "bench" / "gpu.sh", tmp_path / "python"
    script.write_text((Path(gpu.__file__).parent / "gpu.sh").read_text())
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    for name in ("hils", "moba"):
        (tmp_path / ".bundle" / name).mkdir(parents=True)
    given = {name: x for name, x in os.environ.items() if not name.startswith("HSA_TL_")}
    given |= {"PYTHON": str(python), "HSA_TL_HILS": "/mine"}
    run = subprocess.run(["bash", script], env=given, capture_output=True, text=True, check=True)
    named = {x for x in run.stdout.splitlines() if x.startswith("HSA_TL_")}
    assert named == {"HSA_TL_HILS=/mine", f"HSA_TL_MOBA={tmp_path}/.bundle/moba"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run itself starts where there is a GPU")
def test_without_a_gpu_the_gpu_run_says_so(tmp_path, capsys):
    import typer

    with pytest.raises(typer.Exit) as end:
        gpu.main(out=tmp_path)
    assert end.value.exit_code == 2 and "needs a Hopper GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
