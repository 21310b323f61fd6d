"""The sweep and the GPU run: a wrong provider is refused, rows resume, steps resume, time ends them."""

import dataclasses
import json

import pytest
import torch
from tuning import FakeGpu, fake_compiler

from hsa_tl import cases
from hsa_tl.bench import gpu, providers, record
from hsa_tl.bench.sweep import run_sweep

CASE = dataclasses.replace(
    cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 128, HQ=2, D=16, S=16, K=2)
)


def sweep(folder, names=("dense", "hsa-reference"), **options):
    return run_sweep(
        [CASE], [64], ("train",), names, "random", "cpu", folder, min_repeats=1, seconds=0.0, **options
    )  # fmt: skip


def test_a_wrong_provider_is_refused(monkeypatch, tmp_path):
    right = providers.PROVIDERS["hsa-reference"]
    wrong = dataclasses.replace(right, attention=lambda *a, **kw: right.attention(*a, **kw) * 1.01)
    monkeypatch.setitem(providers.PROVIDERS, "hsa-reference", wrong)
    rows = {r.provider: r for r in sweep(tmp_path) if r.metric == "time"}
    assert rows["hsa-reference"].p50 is None and rows["hsa-reference"].note.startswith("refused by the gate: out")
    assert rows["dense"].p50 > 0


def test_an_unavailable_provider_is_a_row_that_says_why(tmp_path):
    (row,) = [r for r in sweep(tmp_path, ("dense-fa3",)) if r.metric == "time"]
    assert row.p50 is None and row.note == "unavailable: needs CUDA tensors, the problem is on cpu"


def test_rows_have_the_schema_and_resume(tmp_path):
    first = sweep(tmp_path)
    assert {r.metric for r in first} == {"time", "throughput", "peak_extra_memory"}
    for r in first:
        assert r.device and r.versions and r.commit and r.unit and r.x == 64 and r.config
    assert sweep(tmp_path) == first, "measured again"
    assert sweep(tmp_path, resume=False) != first
    assert {r.key for r in record.read_rows(tmp_path / "bench.csv")} == {r.key for r in first}
    assert len(json.loads((tmp_path / "bench.json").read_text())) == len(first)


def test_a_sweep_out_of_time_says_so(tmp_path):
    assert all("time is up" in r.note for r in sweep(tmp_path, deadline_s=-1.0))


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
