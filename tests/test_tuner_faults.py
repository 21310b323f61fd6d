"""What the machine does to the tuner is no result: full disks and memory, a time that is up; and whose timer it has."""

import resource
import time
from dataclasses import replace

import pytest
import torch
from test_tuner import CASE, UNION, no_machine, ranked, run  # noqa: F401
from tuning import FakeGpu, compile_by, fake_compiler

from hsa_tl.autotune import calibrate, measure, static, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench import timing
from hsa_tl.kernels_tilelang import config as configs


@pytest.mark.parametrize("error", (OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA")), ids=repr)
def test_a_full_machine_is_no_result(tmp_path, error):
    """However often: what it kept from being measured is measured later."""
    rows, path = ranked(), tmp_path / "j.jsonl"
    for _ in range(3):
        gpu = FakeGpu()

        def full(*x, error=error, check=gpu.check):
            check(*x)
            raise error

        rig = replace(gpu.rig(), check=full)
        with pytest.warns(UserWarning, match="is left to the next run"):
            seen = measure.measure(CASE, rows[:2], device="h200", seconds=1e6, rig=rig, journal=Journal(path))
        assert seen == []
    assert len(run(FakeGpu(), rows[:2], journal=Journal(path))) == 2


def test_another_version_is_measured_anew(tmp_path, monkeypatch):
    """A table's row says the versions of now: what older ones took, or refused, is not theirs."""
    rows, path = ranked()[:2], tmp_path / "j.jsonl"
    bad, old = tuner.programs_of(rows[0])[0][1], run(FakeGpu(), rows, journal=Journal(path))
    refused = run(FakeGpu(refused=(bad,)), rows, journal=Journal(tmp_path / "refused.jsonl"))
    assert refused[0]["error"] and not old[0]["error"]
    monkeypatch.setattr(tuner, "versions", lambda: {"torch": "2.11", "tilelang": "0.2"})
    for name in ("j.jsonl", "refused.jsonl"):
        gpu = FakeGpu()
        seen = run(gpu, rows, journal=Journal(tmp_path / name))
        assert len(gpu.checked()) == len(rows) and not any(r["error"] for r in seen)


@pytest.mark.parametrize("programs", ({"hsa_fwd_toy": "threads=32"}, {"hsa_fwd_token": "threads=128,tiles=2"}), ids=str)
def test_measurements_of_a_strategy_that_is_gone_are_passed_over(tmp_path, programs):
    """The journal outlives it."""
    journal = Journal(tmp_path / "j.jsonl")
    run(FakeGpu(), ranked(journal=journal), journal=journal)
    found = calibrate.samples(journal, "h200")
    (name, record), *_ = journal.all(kind="measured")
    journal.add(name | {"programs": programs, "source": dict.fromkeys(programs, "older")}, record)
    assert found and calibrate.samples(journal, "h200") == found


def test_a_record_that_a_full_disk_cut_takes_no_other_with_it(tmp_path):
    """A write of which a part fits is no error of the system's."""
    path, limits = tmp_path / "j.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(path)
    journal.add({"a": 1}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        journal.add({"a": 2}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.add({"a": 3}, {})
    assert [name for name, _ in Journal(path).all()] == [{"a": 1}, {"a": 3}]


def test_a_folder_is_no_journal(tmp_path):
    """It is known before anything is assembled."""
    with pytest.raises(IsADirectoryError):
        Journal(tmp_path)


def test_a_full_disk_is_no_property_of_a_program(monkeypatch):
    def full(*x):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hsa_tl.kernels_tilelang.compile.lower", full)
    with pytest.raises(OSError, match="No space left"):
        static.analyse("hsa_fwd_token", CASE.problem, configs.space("hsa_fwd_token", CASE.problem)[:1])


def test_ranking_ends_where_its_caller_has_enough(monkeypatch):
    compiled = []

    def compiler(*x):
        compiled.append(x)
        time.sleep(0.02)
        return fake_compiler(*x)

    def enough(done, total):
        if done:
            raise TimeoutError

    candidates = len(ranked())
    compile_by(monkeypatch, compiler)
    with pytest.raises(TimeoutError):
        tuner.rank(CASE, "h200", programs=UNION, progress=enough)
    assert 0 < len(compiled) < candidates


def test_a_round_is_of_the_benchmarks_timer(monkeypatch):
    asked = []

    def timed(functions, **options):
        asked.append(options["device"])
        return {name: timing.Timing(1.0, 2.0, 3.0, 10) for name in functions}

    monkeypatch.setattr(timing, "measure", timed)
    assert measure.gpu_rig().time_us(lambda: None) == 2000.0 and asked == ["cuda"]
