"""Where a call's time goes, kernel by kernel."""

import json

import torch
from tiers import prove

from hsa_tl.autotune import plan
from hsa_tl.bench import kernels, record
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.problem import Problem

SMALL = Problem(B=1, T=48, N=3, HQ=2, H=1, D=32, S=16, K=2, dtype=torch.float32, device_type="cpu")


@prove
def test_every_strategy_has_a_line(tmp_path):
    """On a CPU the operators stand for kernels; what the CPU target cannot run says so."""
    kernels.write(tmp_path / "kernels.jsonl", [SMALL], 1e9)
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    strategies = [s for direction in plan.DIRECTIONS for s in plan.strategies(direction)]
    assert [row["call"] for row in rows] == [*map(" ".join, strategies), "retrieve"]
    for strategy, row in zip([*strategies, ()], rows, strict=True):
        assert ("error" in row) == any(configs.cpu_refusal(program) is not None for program in strategy)
        if "error" not in row:
            assert 0 < len(row["python_us"]) <= kernels.FUNCTIONS and min(row["python_us"].values()) >= 0
            assert row["host_us"] > 0 and row["device_us"] > 0 and any("hsa_tl::" in name for name in row["kernels_us"])


def test_calls_that_have_a_line_of_this_commit_are_not_run_again(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(kernels, "calls", lambda problem: {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")})
    monkeypatch.setattr(kernels, "profiled", lambda call, device: call() or {"host_us": 1.0})
    for commit, new in (("abc", "ab"), ("abc", ""), ("def", "ab"), (record.UNKNOWN, "ab"), (record.UNKNOWN, "ab")):
        monkeypatch.setenv("HSA_TL_COMMIT", commit)
        ran.clear()
        assert kernels.write(tmp_path / "kernels.jsonl", [SMALL], 1e9) == {"lines": len(new)} and "".join(ran) == new
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == 8


def test_late_calls_are_left_out(tmp_path):
    assert kernels.write(tmp_path / "kernels.jsonl", [SMALL], -1.0) == {"lines": 0, "finished": False}
