"""The retrieval benchmark: the gate knows wrong chunks and wrong ties; what would not fit or was cut says so."""

import dataclasses

import pytest
import torch
from tiers import prove
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.bench import compare, record, retrieve
from hsa_tl.bench.sweep import Sweep
from hsa_tl.cli import app

CASE = dataclasses.replace(
    cases.case("k16-d64"), problem=cases.at_length(cases.case("k16-d64").problem, 128, HQ=4, H=2, D=16, S=16, K=4)
)


def bench(folder=None, names=None, lengths=(64, 128), modes=None, **options):
    options = {"min_repeats": 1, "seconds": 0.0} | options
    return Sweep(
        retrieve.Retrieve(), CASE, lengths, modes, names, device="cpu", out_dir=folder, threads=1, **options
    ).run()


@prove
def test_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(retrieve, "SEGMENT", 32)
    rows = bench(tmp_path)
    assert sorted(rows, key=lambda r: r.key) == record.read_rows(tmp_path / "bench.csv")
    timed = {(r.provider, r.mode, r.x): r for r in rows if r.metric == "time" and r.p50 > 0}
    names, modes = ("materialise", "hsa-auto"), ("prefill", "segment")
    assert set(timed) == {(n, mode, T) for n in names for mode in modes for T in (64, 128)}
    assert "queries 96 to 128 of 128 only" in timed["hsa-auto", "segment", 128].note
    assert "queries" not in timed["hsa-auto", "prefill", 128].note
    assert bench(tmp_path) == rows, "measured again"
    assert set(compare.fastest_baseline(rows)) == {(mode, T) for mode in modes for T in (64, 128)}


def worse(scores, indices):
    """One chunk too few for the last token."""
    return scores, indices.index_fill(1, torch.tensor([indices.shape[1] - 1]), -1)


def backwards(scores, indices):
    return scores.flip(-1), indices.flip(-1)


def louder(scores, indices):
    return scores * 1.01, indices


@pytest.mark.parametrize("name", ["materialise", "hsa-reference"])
@pytest.mark.parametrize(
    "wrong, words", [(worse, "not as many chunks"), (louder, "scores"), (backwards, "do not ascend")]
)
def test_a_wrong_provider_is_refused(name, wrong, words, monkeypatch):
    right = retrieve.Retrieve.run
    monkeypatch.setattr(retrieve.Retrieve, "run", lambda *args: wrong(*right(*args)))
    (row,) = (r for r in bench(names=(name,), lengths=(64,), modes=("prefill",)) if r.metric == "time")
    if wrong is backwards and name == "materialise":
        assert row.p50, "the baseline's order is its own"
    else:
        assert row.p50 is None and row.note.startswith("refused by the gate") and words in row.note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_baseline_passes_in_16_bits(dtype):
    """On a GPU the cases are in bfloat16: scores that are rounded to it are refused, and HSA stands alone."""
    suite = retrieve.Retrieve()
    problem = suite.gate_problem(dataclasses.replace(CASE.problem, dtype=dtype, device_type="cpu"))
    assert suite.gate("materialise", problem) == []
    with FakeTensorMode():  # what CUDA tensors take
        a, b = (torch.empty(2, n, 8, dtype=dtype, device="cuda") for n in (4, 5))
        assert retrieve.float32_products(a, b).dtype == torch.float32


@pytest.mark.parametrize("D", [32, 64])  # 1 / sqrt(32) is no power of two
def test_the_gate_is_exact_whatever_the_scale(D):
    suite = retrieve.Retrieve()
    problem = suite.gate_problem(cases.on_cpu(dataclasses.replace(CASE.problem, D=D)))
    assert suite.gate("materialise", problem) == [] == suite.gate("hsa-reference", problem)


def test_scores_that_do_not_fit_are_a_row_with_their_bytes(monkeypatch):
    monkeypatch.setattr(record, "free_bytes", lambda device: 1000)
    rows = {r.provider: r for r in bench(lengths=(64,), modes=("prefill",)) if r.metric == "time"}
    assert rows["materialise"].note == "not measured: needs 2.56e+03 bytes, 1e+03 are free"
    assert rows["hsa-auto"].p50 > 0


def test_what_was_counted_is_what_is_scored():
    p = CASE.problem
    suite = retrieve.Retrieve()
    assert suite.work("hsa-auto", p, "prefill").flops == 2 * p.H * p.D * sum(t // p.S for t in range(p.T))


def test_the_command(tmp_path):
    command = f"bench retrieve --device cpu --threads 1 --lengths 2k --seconds 0 --out {tmp_path}"
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0 and "materialise" in run.output and (tmp_path / "bench.csv").exists()
    run = CliRunner().invoke(app, f"{command} --selection full")
    assert run.exit_code == 2 and "selection of retrieve must be one of random, text, got 'full'" in run.output
