"""hsa-tl: every command runs, writes what it says, and ends bad input with one line and exit code 2."""

import csv
import json

import pytest
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.autotune import static, tuner
from hsa_tl.bench.providers import DEFAULT_PROVIDERS
from hsa_tl.cli import app, parse_lengths
from hsa_tl.kernels_tilelang.config import CONFIGS, PROGRAMS, TUNED, describe


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def static_row(program="hsa_fwd_token", **changes):
    row = dict.fromkeys(static.COLUMNS) | {
        "case": "paper-d128", "program": program, "config": describe(CONFIGS[program]()), "threads": 128,
        "device": "h200",
        "registers": 64, "spill_bytes": 0, "smem_bytes": 1024, "ctas_per_sm": 3, "hgmma": 4, "hmma": 4,
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
    run("bench", "--device", "cpu", "--lengths", "256", "--mode", "train", "--seconds", 0, "--out", tmp_path)
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


def test_autotune_writes_the_best_rows_and_merges(monkeypatch, tmp_path):
    rows = [static_row(p, ns_per_pair=x) for p in TUNED for x in (5.0, 3.0)]
    monkeypatch.setattr(tuner, "rank", lambda *args, **kwargs: rows)
    out = tmp_path / "h200.json"
    for _ in range(2):
        run("autotune", "--case", "paper-d128", "--device", "h200", "--out", out)
        table = json.loads(out.read_text())["rows"]
        assert [r["program"] for r in table] == sorted(TUNED)
        assert all(r["source"] == "static" and r["ns_per_pair"] == 3.0 for r in table)
    run("autotune", "--case", "paper-d64", "--device", "h200", "--out", out)
    assert len(json.loads(out.read_text())["rows"]) == 2 * len(TUNED)


def test_the_demo_runs_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(f"line {i}: the key of {i % 97} is {i * i % 1009}\n".encode() for i in range(400)))
    output = run(
        "demo", "--text", text, "--tokens", 2048, "--lengths", "512", "--out", tmp_path / "out", "--device", "cpu"
    )
    assert "No static table" in output and "nvcc" in output
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert {r["implementation"] for r in result["accuracy"]["implementations"]} == {"reference", "tilelang", "triton"}
    assert all(not e["message"] for r in result["accuracy"]["implementations"] for e in r["errors"])
    assert result["selections"] and result["speed"] and result["static"] == []
    assert len(list((tmp_path / "out").glob("*.png"))) >= 3


@pytest.mark.parametrize(
    "args, words",
    [
        (("check", "--case", "nonsense"), "case must be one of"),
        (("check", "--impl", "nonsense"), "impl must be one of"),
        (("bench", "--lengths", "4q"), "lengths must be numbers"),
        (("bench", "--device", "tpu"), "device must be cpu or cuda"),
        (("bench", "--provider", "nonsense"), "provider must be one of"),
        (("demo", "--text", "/nonexistent/file"), "/nonexistent/file"),
        (("static", "--device", "v100"), "device must be one of h100, h200, h800"),
        (("autotune", "--case", "nonsense"), "case must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run(*args, code=2)
    assert words in output and len(output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["static", "autotune"])
def test_a_missing_nvcc_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch):
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    monkeypatch.chdir(tmp_path)
    output = run(command, "--out", tmp_path / "x", code=2)
    assert "nvcc" in output and len(output.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_lengths():
    assert parse_lengths("1k..8k,3000") == [1024, 2048, 3000, 4096, 8192]
    assert cases.case("k16-d64").problem.K == 16
