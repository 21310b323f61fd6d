"""hsa-tl: every command runs, writes what it says, and ends bad input with one line and exit code 2."""

import csv
import json

import pytest
from tuning import FakeGpu, compile_by, fake_compiler
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.autotune import cost, measure, plan, static, table, tuner
from hsa_tl.autotune.journal import Journal
from hsa_tl.bench.providers import DEFAULT_PROVIDERS
from hsa_tl.cli import app, parse_lengths
from hsa_tl.kernels_tilelang.config import PROGRAMS, candidates, config_of, describe, tuned


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def static_row(program="hsa_fwd_token", **changes):
    row = dict.fromkeys(static.COLUMNS) | {
        "case": "paper-d128", "program": program, "config": describe(config_of(program)()), "threads": 128,
        "device": "h200",
        "registers": 64, "spill_bytes": 0, "smem_bytes": 1024, "ctas_per_sm": 3, "hgmma": 4, "hmma": 4, "copies": 4,
        "ns_per_pair": 4.5, "limiter": "l2", "roofline_ns": 4.0,
    }  # fmt: skip
    return row | changes


def test_info_names_every_implementation():
    output = run("info")
    assert all(word in output for word in ("reference", "tilelang", "triton", "torch", "commit"))


def test_check_passes_on_the_reference():
    output = run("check", "--T", 128, "--impl", "reference", "--device", "cpu")
    assert all(word in output for word in ("out", "dq", "dk", "dv", "dweights", "pass")) and "FAIL" not in output


def test_bench_writes_rows_and_a_plot(tmp_path):
    run(
        "bench",
        "--device",
        "cpu",
        "--threads",
        1,
        "--lengths",
        "256",
        "--mode",
        "train",
        "--seconds",
        0,
        "--out",
        tmp_path,
    )
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    timed = {r["provider"] for r in rows if r["metric"] == "time" and r["p50"]}
    assert timed == set(DEFAULT_PROVIDERS["cpu"]) and json.loads((tmp_path / "bench.json").read_text())
    assert any(p.stat().st_size > 5000 for p in tmp_path.glob("*.png"))


def test_static_prints_writes_and_fails_on_spills(monkeypatch, tmp_path):
    rows = [static_row(p) for p in PROGRAMS]
    monkeypatch.setattr(static, "table_rows", lambda *args, **kwargs: rows)
    output = run("static", "--out", tmp_path / "static.csv")
    assert all(p in output for p in PROGRAMS)
    assert all(f"`{p}`" in (tmp_path / "README.md").read_text() for p in PROGRAMS)
    read = list(csv.DictReader((tmp_path / "static.csv").open()))
    assert [r["program"] for r in read] == list(PROGRAMS) and read[0]["registers"] == "64"
    rows[0]["spill_bytes"] = 16
    assert "16 bytes of spills" in run("static", code=1)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Candidates are read back by the fake compiler, into a fresh cache folder."""
    plan.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(static, "missing_tools", lambda: None)
    monkeypatch.setattr(static, "nvcc_release", lambda: "13.0")
    compile_by(monkeypatch, fake_compiler)
    return tmp_path / "cache" / "hsa-tl" / "tuning.jsonl"


def test_autotune_ranks_and_says_what_calls_get(compiler, tmp_path):
    for _ in range(2):
        output = run("autotune", "--device", "h200", "--device", "h100")
    assert "nvcc refused the program" in output and "16 bytes of spills" in output and "one CTA on an SM" in output
    assert all(word in output for word in ("h100", "forward", "backward", "0.9", "ns/pair"))
    lines = compiler.read_text().splitlines()
    assert len(lines) == sum(len(candidates(p, cases.case("paper-d128").problem)) for p in tuned()), "once each"
    assert "a table has no predictions" in run("autotune", "--device", "h200", "--out", tmp_path / "t", code=2)


def test_autotune_writes_what_it_measures(compiler, tmp_path, monkeypatch):
    """The fastest plan of each class, into the user's table or a file; dims and lengths as they were given."""
    monkeypatch.setattr(cost, "device_name", lambda index=None: "h200")
    monkeypatch.setattr(measure, "gpu_rig", lambda: FakeGpu().rig())
    dims = ("--HQ", 8, "--H", 2, "--D", 64, "--S", 32, "--K", 8, "--T", "1000,4k", "--dtype", "float16")
    out = tmp_path / "t.json"
    output = run("autotune", *dims, "--program", "hsa_fwd_token", "--minutes", 5e5, "--out", out)
    rows = table.read(out)
    assert len(rows) == 2 * len(tuner.CLASSES) and {next(iter(r["programs"])) for r in rows} == {"hsa_fwd_token"}
    assert {tuple(r["T"]) for r in rows} == {(513, 1024), (2049, 4096)} and "Spearman" in output
    assert {(r["G"], r["D"], r["S"], r["K"], r["dtype"]) for r in rows} == {(4, 64, 32, 8, "float16")}
    run("autotune", "--program", "hsa_bwd_chunk", "--minutes", 5e5)
    assert {r["direction"] for r in table.read(table.user_path("h200"))} == {"backward"}


def test_autotune_explains(compiler):
    output = run("autotune", "--explain", "--device", "h200", "--program", "hsa_fwd_union_sm90a")
    words = ("chosen: block_M=192", "because: ", "predicted: ", "roofline: ", "measured: not yet", "num_stages 2 -> 3")
    assert all(word in output for word in words) and "threads must be 32 to 384" in " ".join(output.split())
    devices = ("--device", "h200", "--device", "h100", "--program", "hsa_fwd_token")
    output = run("autotune", "--explain", *devices)
    assert all(output.count(f"bfloat16, {device}") == 1 for device in ("h200", "h100")), "each device"
    for option in (("--out", "t.json"), ("--minutes", 1)):
        assert "must be left out with --explain" in run("autotune", "--explain", *devices, *option, code=2)


def test_calibrate_fits_what_was_measured(compiler, tmp_path):
    assert "must be in the journal, got none" in run("calibrate", "--device", "h200", code=2)
    case = cases.case("k16-d64")
    journal = Journal(compiler)
    rows = tuner.rank(case, "h200", programs=("hsa_fwd_chunk",), journal=journal)
    measure.measure(case, rows, device="h200", seconds=1e6, rig=FakeGpu().rig(), journal=journal)
    output = run("calibrate", "--device", "h200", "--out", tmp_path / "h200.json")
    assert "Spearman" in output and "l2" in output
    assert cost.make_device(**json.loads((tmp_path / "h200.json").read_text())).name == "h200"


@pytest.mark.parametrize(
    "args, words",
    [
        (("check", "--case", "nonsense"), "case must be one of"),
        (("check", "--impl", "nonsense"), "impl must be one of"),
        (("bench", "--lengths", "4q"), "lengths must be numbers"),
        (("bench", "--device", "tpu"), "device must be cpu or cuda"),
        (("bench", "--provider", "nonsense"), "provider must be one of"),
        (("static", "--device", "v100"), "device must be one of h100, h200, h800"),
        (("autotune", "--case", "nonsense"), "case must be one of"),
        (("autotune", "--device", "v100"), "device must be one of h100, h200, h800"),
        (("autotune", "--program", "nonsense"), "program must be one of hsa_fwd_token"),
        (("autotune", "--tag", "nonsense"), "tag must be one that a case has"),
        (("autotune", "--HQ", 3, "--H", 2), "HQ must be a multiple of H = 2, got 3"),
        (("autotune", "--S", 48), "S must be a power of two between 16 and 128, got 48"),
        (("autotune", "--dtype", "float32"), "dtype must be one of bfloat16, float16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run(*args, code=2)
    assert words in output and len(output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["static", "autotune"])
def test_a_missing_nvcc_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_suffix(".cache")))
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    monkeypatch.chdir(tmp_path)
    output = run(command, *(("--out", tmp_path / "x") if command == "static" else ()), code=2)
    assert "nvcc" in output and len(output.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_lengths():
    assert parse_lengths("1k..8k,3000") == [1024, 2048, 3000, 4096, 8192]
    assert cases.case("k16-d64").problem.K == 16
