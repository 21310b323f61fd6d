"""The model's benchmark: the same model with another attention beside it, a gate that refuses, no mode that is not."""

import pytest
import torch
from strategies import SWEEP
from tiers import prove
from typer.testing import CliRunner

from hsa_tl import cases
from hsa_tl.bench import compare, model, record
from hsa_tl.bench.sweep import Sweep
from hsa_tl.cli import app
from hsa_tl.model import Model, ModelConfig, baseline, preset

CASE = model.ModelBench().find_case("tiny")


def bench(folder=None, names=None, lengths=(64,), modes=None):
    return Sweep(model.ModelBench(), CASE, lengths, modes, names, out_dir=folder, **SWEEP).run()


@prove
def test_rows(tmp_path):
    rows = bench(tmp_path)
    assert sorted(rows, key=lambda r: r.key) == record.read_rows(tmp_path / "bench.csv")
    timed = {(r.provider, r.mode) for r in compare.times(rows) if r.p50 > 0}
    assert timed == {(n, m) for n in model.ATTENTIONS for m in ("step", "read", "generate")}
    assert set(compare.fastest_baseline(rows)) == {("step", 64), ("read", 64), ("generate", 64)}
    assert compare.ratios(rows, "step")[0] == "hsa" and "dim=128 layers=2" in rows[0].config


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


def test_a_wrong_cache_is_refused(monkeypatch):
    right = model.Pair.generate
    monkeypatch.setattr(model.Pair, "generate", lambda *x: lambda: right(*x)() * 1.01)
    (row,) = bench(names=("hsa",), modes=("generate",))
    assert row.note.startswith("refused by the gate: logits")


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
    c = baseline(ModelConfig(layers=2, conv=0, tied=True), "full")
    count = model.parameters(c)
    layer = 2 * c.dim * c.head_dim * (c.heads + c.kv_heads) + 3 * c.dim * c.mlp_dim
    assert 0 <= count["0"] - layer < 10 * c.dim and count["0"] == count["1"]
    assert count["output"] == c.dim * c.vocab_size and "embedding" not in count
    suite, p = model.ModelBench(), cases.at_length(CASE.problem, 128)
    assert suite.config(p) == preset("tiny")
    count = model.parameters(baseline(preset("tiny"), "full"))
    products = 2 * (128 * sum(n for part, n in count.items() if part != "output") + count["output"])
    attention = 2 * 4 * p.HQ * p.D * 128 * 129 // 2
    assert suite.work("full-attention", p, "read").flops == products + attention
    longer = cases.at_length(p, 256)
    for mode in suite.modes:
        assert suite.work("hsa", longer, mode).flops > suite.work("hsa", p, mode).flops
    assert suite.work("swa", longer, "generate") == suite.work("swa", p, "generate")
    notes = {(name, mode): suite.work(name, p, mode).note for name in model.ATTENTIONS for mode in suite.modes}
    assert {key for key, note in notes.items() if note} == {("hsa", "generate")}, "the encoder is not in the median"


def test_full_attention_of_as_many_parameters():
    """The layer more costs what a layer does; a mixture's is larger than its encoder, and the sweep says so."""
    suite, p = model.ModelBench(), cases.at_length(CASE.problem, 256)
    ours, deep = (Model(model.config_of(name, preset("tiny"))) for name in ("hsa", "full-matched"))
    assert abs(deep.num_parameters() / ours.num_parameters() - 1) < 0.01
    assert deep.config.kinds == ("full",) * 3
    for mode in suite.modes:
        a, b = (suite.work(name, p, mode).flops for name in ("full-attention", "full-matched"))
        assert 1.5 * a < b < 2 * a
    moe = suite.find_case("trm-moe").problem
    assert "a layer more must fit" in suite.unavailable("full-matched", moe, "read")
    assert suite.unavailable("full-attention", moe, "read") is None


def test_the_command(tmp_path):
    words = f"--device cpu --threads 1 --lengths 64 --mode read --seconds 0 --out {tmp_path}"
    run = CliRunner().invoke(app, f"bench model {words}")
    assert run.exit_code == 0 and "full-attention" in run.output, run.output
    run = CliRunner().invoke(app, ["bench", "model", "--case", "paper-d128"])
    assert run.exit_code == 2 and "preset must be one of tiny" in run.output
