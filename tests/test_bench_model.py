"""The model's benchmark: the same model with another attention beside it, a gate that refuses, no mode that is not."""

import pytest
import torch
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.bench import compare, model, record
from hsa_tl.bench.sweep import run_sweep
from hsa_tl.cli import app
from hsa_tl.model import Model, ModelConfig, baseline, preset

CASE = model.model_case("tiny")


def bench(folder=None, names=None, lengths=(64,), modes=("step", "read")):
    return run_sweep(
        model.ModelBench(), [CASE], lengths, modes, names, device="cpu", out_dir=folder, min_repeats=1, seconds=0.0
    )


def test_rows(tmp_path):
    rows = bench(tmp_path)
    assert sorted(rows, key=lambda r: r.key) == record.read_rows(tmp_path / "bench.csv")
    timed = {(r.provider, r.mode) for r in compare.times(rows) if r.p50 > 0}
    assert timed == {(n, m) for n in ("hsa", "full-attention", "swa") for m in ("step", "read")}
    assert set(compare.fastest_baseline(rows)) == {("step", 64), ("read", 64)}
    assert compare.ours(rows, "step")[0] == "hsa" and "dim=128 layers=2" in rows[0].config


@pytest.mark.parametrize("name", ["hsa", "full-attention"])
def test_a_wrong_model_is_refused(name, monkeypatch):
    right = model.Pair.model

    def wrong(self, which):
        out = right(self, which)
        out.head = lambda h: Model.head(out, h) * 1.01
        return out

    monkeypatch.setattr(model.Pair, "model", wrong)
    (row,) = bench(names=(name,), modes=("read",))
    assert row.note.startswith("refused by the gate: loss")


def test_generation_is_measured_or_said_to_be_missing():
    rows = bench(names=("hsa", "full-attention"), modes=("generate",))
    if hasattr(Model, "new_cache"):
        assert all(r.p50 > 0 for r in rows if r.metric == "time")
    else:
        assert all(r.note.endswith("has no new_cache: it does not decode") for r in rows)


def test_a_step_trains():
    suite = model.ModelBench()
    problem = suite.gate_problem(cases.on_cpu(CASE.problem))
    pair = suite.inputs(problem, "random")
    step = suite.call("hsa", problem, pair, "step")
    before = [x.clone() for x in pair.model("hsa").parameters()]
    step()
    changed = [not torch.equal(x, y) for x, y in zip(before, pair.model("hsa").parameters(), strict=True)]
    assert all(changed)


def test_products_are_counted():
    c = ModelConfig(layers=2, conv=0)
    full = baseline(c, "full")
    attention = 2 * c.dim * c.head_dim * (c.heads + c.kv_heads)
    mlp = 3 * c.dim * c.mlp_dim
    norms = model.parameters(full) - c.layers * (attention + mlp) - c.dim * c.vocab_size
    assert 0 < norms < 10 * c.dim
    suite, problem = model.ModelBench(), CASE.problem
    more = cases.at_length(problem, 2 * problem.T)
    for mode in ("step", "read"):
        assert suite.work("full-attention", more, mode).flops > 2 * suite.work("full-attention", problem, mode).flops
    assert suite.config(problem) == preset("tiny")


def test_the_command(tmp_path):
    words = ["bench", "model", "--device", "cpu", "--lengths", "64", "--mode", "read", "--seconds", "0"]
    run = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert run.exit_code == 0 and "full-attention" in run.output, run.output
    run = CliRunner().invoke(app, ["bench", "model", "--case", "paper-d128"])
    assert run.exit_code == 2 and "preset must be one of tiny" in run.output
