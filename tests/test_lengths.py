"""`hsa-tl lengths` and the demo's last act at toy size: rows, resumption, plot."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from tiers import tiered
from typer.testing import CliRunner

from hsa_tl.bench import contenders, lengths, paper, plot_eval
from hsa_tl.bench.contenders import MODELS
from hsa_tl.bench.plot import interval
from hsa_tl.cli import app
from hsa_tl.files import InUse, locked
from hsa_tl.model import Model, needles, preset
from hsa_tl.model.recipe import load_recipe
from hsa_tl.model.train import LOCK

RECIPE = """
preset: tiny
lr: 1e-3
stages:
  - {steps: 2, length: 64, batch: 2, data: {kind: needles, tasks: [{needles: 2, queries: 2}]}, model: {topk: all}}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "toy.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.mark.parametrize("models", tiered((["hsa", "full-yarn"], list(MODELS)), quick=(["hsa", "full-yarn"],)), ids=len)
def test_lengths_command(recipe, tmp_path, models):
    args = ["lengths", "--recipe", recipe, "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--samples", 2]
    args = [*map(str, args), "--lengths", "128,1k", "--seeds", "1", "--threads", "1", "--models", ",".join(models)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0 and "lengths-toy.png" in result.output, result.output
    rows = json.loads((tmp_path / "out/lengths.json").read_text())
    assert len(rows) == len(models) * (len(lengths.TASKS) * 2 - 1)  # 96 needles do not fit into 128 tokens
    assert {"model", "seed", "train_length", "length", "task", "accuracy", "seconds"} <= set(rows[0])
    assert all(0 <= r["accuracy"] <= 1 and r["train_length"] == 64 and r["samples"] == 2 for r in rows)
    assert {r["read_tokens"] for r in rows} == {0, 128} and {r["haystacks"] for r in rows} == {2}
    assert all(r["answers"] + r["near"] == 2 * needles.TASKS[r["task"]]["queries"] for r in rows)
    assert (tmp_path / "out/lengths-toy.png").stat().st_size > 5000
    # A second call measures nothing again; a row that is missing is measured with the model that is there.
    (tmp_path / "out/lengths.json").write_text(json.dumps(rows[1:]))
    trained = sorted((tmp_path / "runs").rglob("step-*/meta.json"))
    stamps = [p.stat().st_mtime_ns for p in trained]
    assert CliRunner().invoke(app, args).exit_code == 0
    again = json.loads((tmp_path / "out/lengths.json").read_text())
    assert again[1:] == rows[1:] and again[0]["accuracy"] == rows[0]["accuracy"]
    assert [p.stat().st_mtime_ns for p in trained] == stamps


@pytest.mark.parametrize("command", ("lengths", "weights"))
def test_a_recipe_of_text_is_refused(command, tmp_path, monkeypatch):
    """It would train for an hour first, and then be asked in ids that it has never read."""
    monkeypatch.chdir(tmp_path)
    args = [command, *(["--recipe"] if command == "lengths" else []), "text-tiny"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and "recipe must be one of needles, got 'text-tiny'" in result.output, result.output
    assert list(tmp_path.iterdir()) == []


def test_the_fair_table_has_the_best_learning_rate(recipe, tmp_path, monkeypatch):
    """Of seed 0's, which a scaling has too, as it has the weights; and each model its own number of seeds."""
    monkeypatch.setitem(MODELS, "full-pi", replace(MODELS["full-pi"], seeds=1))
    console = Console(file=open("/dev/null", "w"))  # noqa: SIM115

    def ask(seeds=(0, 1), runs="runs", **options):
        models = ["full-rope", "full-pi"]
        args = console, tmp_path, tmp_path / runs, models, seeds, [128], ["s-niah"]
        rows = lengths.run_lengths(*args, samples=2, recipe=recipe, **options)
        return {(r.model, r.seed): (r.lr, r.rates) for r in rows}

    assert set(ask().values()) == {(1e-3, 1)}
    found = ask(fair=True)
    assert set(found) == {("full-rope", 0), ("full-rope", 1), ("full-pi", 0)}
    ends = {}
    for rate, name in ((5e-4, "-lr0.5"), (1e-3, ""), (2e-3, "-lr2")):
        log = (tmp_path / f"runs/toy-full-rope{name}-0/log.jsonl").read_text().splitlines()
        ends[rate] = json.loads(log[-1])["validation_loss"]
    assert len(set(ends.values())) == 3 and set(found.values()) == {(min(ends, key=ends.get), 3)}
    ask(seeds=(2,), runs="elsewhere", fair=True)  # trains one model: the rows know the rate
    folder = "toy-full-rope" + {5e-4: "-lr0.5", 1e-3: "", 2e-3: "-lr2"}[min(ends, key=ends.get)]
    assert [x.name for x in (tmp_path / "elsewhere").iterdir()] == [f"{folder}-2"]
    monkeypatch.setattr(lengths, "train", None)
    assert ask(fair=True) == found  # nothing is run again
    assert set(ask().values()) == {(1e-3, 1)}, "the plain rows stay beside the fair ones"


@pytest.mark.parametrize(
    "args, words",
    (
        (("--models", "gpt"), "model must be one of hsa, full-rope"),
        (("--all", "--models", "gpt"), "model must be one of hsa, full-rope"),
        (("--tasks", "x"), "task must be one of s-niah"),
        (("--lengths", "x"), "lengths must be numbers"),
        (("--all", "--seeds", "0"), "Invalid value for '--seeds'"),
    ),
)
def test_bad_lengths_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["lengths", *args])
    assert result.exit_code == 2 and words in result.output and list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "lengths.json").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match=r"lengths.json must hold rows that hsa-tl wrote"):
        lengths.read_rows(tmp_path / "lengths.json")


def test_the_demos_last_act_may_train(recipe, tmp_path):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    (tmp_path / "lengths.json").write_text("[]")
    lengths.train_and_ask(console, tmp_path, recipe, lengths=(128, 1024), samples=2)
    text = console.export_text()
    assert "128 retrieved tokens" in text and "1K" in text
    rows = json.loads((tmp_path / "lengths.json").read_text())
    assert {(r["task"], r["length"]) for r in rows} == {(t, T) for t in lengths.DEMO_TASKS for T in (128, 1024)}


def test_a_layer_more_is_as_wide_as_it_says():
    assert contenders.deeper(preset("tiny")) == contenders.THREE_LAYERS
    assert {"attention": "full", **contenders.deeper(preset("small"))} == paper.FULL


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_matched(name):
    """Within 3 % of HSA's, and all have its embedding, convolution, window and tokens to read."""
    ours, theirs = (Model(lengths.recipe_of(x, 0).config()) for x in ("hsa", name))
    assert abs(theirs.num_parameters() / ours.num_parameters() - 1) < 0.03
    a, b = ours.config, theirs.config
    same = ("dim", "heads", "kv_heads", "head_dim", "conv", "window", "chunk_size", "topk", "embedding_std", "tied")
    assert [getattr(a, x) for x in same] == [getattr(b, x) for x in same]


def test_what_is_asked_by_top_k_is_trained_by_it():
    stages = {m: lengths.recipe_of(m, 0).stages for m in MODELS}
    for name in ("nsa", "nsa-rope", "hsa-topk"):
        assert all(not s.model for s in stages[name])
    assert all(s.model == {"topk": "all", "impl": "dense"} for s in stages["hsa"])
    for name, theirs in stages.items():
        assert [(s.steps, s.length, s.batch, s.data) for s in theirs] == [
            (s.steps, s.length, s.batch, s.data) for s in stages["hsa"]
        ], name
    assert max(s.length for s in stages["hsa"]) == contenders.TRAINED == load_recipe("needle-tiny").stages[-1].length


def test_reading_is_of_the_whole_model_alone():
    """A part that is taken out stays out; another attention has its own top-k."""
    names = "hsa", "hsa-uniform", "nsa"
    read = {name: lengths.recipe_of(name, 0, "needle-hard").config() for name in names}
    assert (read["hsa"].fusion, read["hsa"].topk) == ("mass", 512)
    assert (read["hsa-uniform"].fusion, read["hsa-uniform"].topk, read["nsa"].topk) == ("uniform", 16, 16)


def test_a_scaling_asks_the_weights_of_another():
    plans = {m: lengths.recipe_of(m, 3) for m in ("full-rope", "full-pi", "full-ntk", "full-yarn")}
    assert all(plan == plans["full-rope"] for plan in plans.values())


def row(answers, right, **changes):
    values = {"model": "hsa", "seed": 0, "train_length": 64, "length": 256, "task": "s-niah", "seconds": 1.0}
    values |= {"samples": answers, "read_tokens": 128, "train_seconds": 1.0, "device": "", "versions": "", "commit": ""}
    return lengths.Row(**values | {"accuracy": right / answers, "answers": answers} | changes)


def test_few_answers_are_no_rate():
    assert lengths.rate(28 / 29, 29) == "28 of 29"
    assert lengths.rate(0.96, 100) == "96 (90 to 98)"  # Wilson's, at 95 %


def test_rows_of_other_haystacks_are_measured_again(recipe, tmp_path):
    console = Console(file=open("/dev/null", "w"))  # noqa: SIM115
    ask = lambda n: lengths.run_lengths(  # noqa: E731
        console, tmp_path, tmp_path / "runs", ["hsa"], [0], [128], ["s-niah"], samples=3, haystacks=n, recipe=recipe
    )
    assert [r.haystacks for r in ask(1)] == [1]
    assert [r.haystacks for r in ask(None)] == [3]
    assert [r["haystacks"] for r in json.loads((tmp_path / "lengths.json").read_text())] == [3]


def test_rows_of_fewer_samples_are_measured_again(recipe, tmp_path):
    """But where the budget had ended them."""
    console = Console(file=open("/dev/null", "w"))  # noqa: SIM115

    def ask(samples, budget_s=600.0):
        args = console, tmp_path, tmp_path / "runs", ["hsa"], [0], [128], ["s-niah"]
        (found,) = lengths.run_lengths(*args, samples=samples, haystacks=1, recipe=recipe, budget_s=budget_s)
        return found.samples

    assert [ask(2), ask(3), ask(2), ask(5, 1e-9)] == [2, 3, 3, 3]


def test_two_processes_ask_at_once(recipe, tmp_path, monkeypatch):
    """The file keeps the rows of both, and neither takes the other's run away."""
    console, ask, mine = Console(file=open("/dev/null", "w")), lengths._ask, row(1, 1, model="swa")  # noqa: SIM115
    args = console, tmp_path, tmp_path / "runs", ["hsa"], [0], [128], ["s-niah"]

    def meanwhile(*found, **about):
        lengths.write_rows(tmp_path / "lengths.json", [mine])
        return ask(*found, **about)

    monkeypatch.setattr(lengths, "_ask", meanwhile)
    assert [r.model for r in lengths.run_lengths(*args, samples=1, recipe=recipe)] == ["hsa"]
    assert {r.model for r in lengths.read_rows(tmp_path / "lengths.json")} == {"hsa", "swa"}
    run = lengths.run_folder(tmp_path / "runs", lengths.recipe_of("hsa", 0, recipe))
    (run / "seconds.json").unlink()
    with locked(run / LOCK), pytest.raises(InUse):
        lengths.run_lengths(*args, samples=2, recipe=recipe)
    assert list(run.glob("step-*"))


def test_the_plot_has_intervals_and_no_point_of_few_answers(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot_eval, "band", lambda ax, x, low, middle, high, *_: drawn.append((x, low, middle, high)))
    rows = [row(100, n, seed=i) for i, n in enumerate((90, 96, 100))]
    rows += [row(29, 29, length=512), row(30, 30, length=1024), row(8, 8, task="mq-niah")]
    rows += [row(100, n, length=2048, seed=n) for n in (90, 98)]
    plot_eval.plot_lengths(rows, 1 / 96, tmp_path / "x.png")
    ((x, low, middle, high),) = drawn
    assert x == [256, 1024, 2048] and middle == [0.96, 1.0, 0.94]
    assert (low[0], high[0]) == (interval(90, 100)[0], 1.0) and low[1] == interval(30, 30)[0] < 0.9
