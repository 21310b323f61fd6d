"""The GPU run: steps resume, time ends them, red tests end them; prepared ranks are of their commit."""

import dataclasses
import json

import pytest
import torch
from tuning import FakeGpu, fake_compiler

from hsa_tl import cases
from hsa_tl.bench import gpu

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
    assert {k: v["status"] for k, v in state.steps.items()} == {
        "tests": "done", "tune": "done", "sweep": "no time left",
    }  # fmt: skip
    assert gpu.run_agenda(steps(clock, log), state, path, 70, clock) and log[2:] == [("sweep", 70)]
    assert gpu.read_state(path, "H200", "abc", "torch 2").steps == {}, "another device starts anew"


def test_red_tests_end_the_gpu_run_and_are_tried_again(tmp_path):
    path, clock, log = tmp_path / "agenda.json", Clock(), []
    source = ("H100", "abc", "torch 2")
    assert not gpu.run_agenda(steps(clock, log, {"tests"}), gpu.read_state(path, *source), path, 100, clock)
    assert [name for name, _ in log] == ["tests"]
    state = gpu.read_state(path, *source)
    assert state.steps["tests"]["status"] == "failed" and "red" in state.steps["tests"]["error"]
    assert gpu.run_agenda(steps(clock, log), state, path, 200, clock)
    assert [name for name, _ in log] == ["tests", "tests", "tune", "sweep"]


def test_what_is_prepared_without_a_gpu_is_what_the_lease_measures(monkeypatch, tmp_path):
    """The journal of prepare() ranks for tune(), which measures, writes its files and goes on where it stopped."""
    path, compiled, rank = tmp_path / "ranked.jsonl", [], gpu.tuner.rank
    monkeypatch.setattr(gpu.static, "missing_tools", lambda: None)
    monkeypatch.setattr(gpu.static, "nvcc_release", lambda: "13.0")
    monkeypatch.setattr(gpu.tuner, "rank", lambda *x, **options: rank(*x, **options, compiler=fake_compiler))
    monkeypatch.setattr(gpu.compile, "kernel", lambda program, problem, config: compiled.append((program, config)))
    assert gpu.prepare(path, (CASE,)) == len(compiled) == len(set(compiled))
    assert {program for program, _ in compiled} == {
        p for p in gpu.configs.PROGRAMS if gpu.configs.space(p, CASE.problem)
    }

    def nothing_left(*x, **options):
        raise AssertionError("assembled on the lease")

    monkeypatch.setattr(gpu.tuner, "rank", lambda *x, **options: rank(*x, **options, compiler=nothing_left))
    monkeypatch.setattr(gpu, "PREPARED", path)
    monkeypatch.setattr(gpu.cases, "find", lambda tag: (CASE,))
    fake = FakeGpu()
    monkeypatch.setattr(gpu.measure, "gpu_rig", fake.rig)
    detail = gpu.tune(tmp_path / "out", 1e6)
    rows = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert detail["candidates"] == len(rows) > detail["chosen"] == len(gpu.table.read(tmp_path / "out" / "table.json"))
    assert -1 <= detail["spearman"] <= 1 and gpu.cost.parse_device((tmp_path / "out" / "device.json").read_text())
    looked = len(fake.log)
    assert gpu.tune(tmp_path / "out", 1e6) == detail and len(fake.log) == looked


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run itself starts where there is a GPU")
def test_without_a_gpu_the_gpu_run_says_so(tmp_path, capsys):
    import typer

    with pytest.raises(typer.Exit) as end:
        gpu.main(out=tmp_path)
    assert end.value.exit_code == 2 and "needs a Hopper GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
