"""`hsa-tl bench dispatch`: what it launches, that it leaves everything as it was, and its rows."""

import csv
import itertools

import pytest
from tiers import prove
from typer.testing import CliRunner

from hsa_tl import api, cases, ops
from hsa_tl.bench.dispatch import Dispatch
from hsa_tl.cli import app
from hsa_tl.kernels_tilelang import compile
from hsa_tl.kernels_tilelang.config_base import ChunkConfig

PROBLEM = cases.on_cpu(cases.at_length(cases.case("k16-d128").problem, 128))
LAUNCHES = {
    "forward": ["union_index", "hsa_fwd_union_sm90a"],
    "train": ["pairs_count", "pairs_place", "union_index", "hsa_fwd_union_sm90a"],
    "backward": ["hsa_bwd_chunk_sm90a", "hsa_combine"],
    "decode": ["retrieve_split", "retrieve_combine", "hsa_decode_split", "hsa_decode_combine"],
}


@pytest.fixture
def untouched():
    names = (
        (compile, "_KERNELS"),
        (compile, "emulator"),
        (compile, "lower_ir"),
        (ops, "sort_pairs"),
        (api, "validates"),
        (ChunkConfig, "splits"),
    )
    before, kernels = [getattr(module, name) for module, name in names], dict(compile._KERNELS)
    yield
    assert before == [getattr(module, name) for module, name in names] and kernels == compile._KERNELS


@pytest.mark.parametrize("mode", LAUNCHES)
def test_it_launches_what_hopper_runs(untouched, mode):
    suite = Dispatch()
    call = suite.call("hsa-tilelang", PROBLEM, suite.inputs(PROBLEM, "random"), mode)
    for _ in range(3):
        call()
    assert [[program for program, _ in launches] for launches in suite.seen[PROBLEM, mode]] == [LAUNCHES[mode]] * 3
    assert all(0 < a[1] < b[1] for launches in suite.seen[PROBLEM, mode] for a, b in itertools.pairwise(launches))
    note = suite.work("hsa-tilelang", PROBLEM, mode).note
    assert note.startswith("us to the launches") and all(f"{program} " in note for program in LAUNCHES[mode])
    assert ("of at most" in note) == (mode != "train")


def test_the_gate_finds_a_mode_that_launches_nothing(untouched, monkeypatch):
    assert Dispatch().gate("hsa-tilelang", PROBLEM) == []
    monkeypatch.setattr(Dispatch, "launch", lambda *_: None)
    assert Dispatch().gate("hsa-tilelang", PROBLEM) == ["forward launched nothing"]


@prove
def test_bench_dispatch_writes_its_rows(untouched, tmp_path):
    options = ("--out", str(tmp_path), "--device", "cpu", "--lengths", "128", "--seconds", "0")
    result = CliRunner().invoke(app, ["bench", "dispatch", *options])
    assert result.exit_code == 0, result.output
    rows = [r for r in csv.DictReader((tmp_path / "bench.csv").open()) if r["metric"] == "time"]
    assert {r["mode"] for r in rows} == set(LAUNCHES) and all(0 < float(r["p50"]) < 100 for r in rows)
    assert all("us to the launches" in r["note"] for r in rows)
