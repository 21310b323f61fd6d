"""`hsa-tl lengths` and the demo's last act at toy size: rows, resumption, plot."""

import json

import pytest
from rich.console import Console
from tiers import tiered
from typer.testing import CliRunner

from hsa_tl.bench import lengths
from hsa_tl.cli import app

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


@pytest.mark.parametrize(
    "models", tiered((["hsa", "full-rope"], list(lengths.MODELS)), quick=(["hsa", "full-rope"],)), ids=len
)
def test_lengths_command(recipe, tmp_path, models):
    args = ["lengths", "--recipe", recipe, "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--samples", 2]
    args = [*map(str, args), "--lengths", "128,1k", "--seeds", "1", "--models", ",".join(models)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0 and "lengths-toy.png" in result.output, result.output
    rows = json.loads((tmp_path / "out/lengths.json").read_text())
    assert len(rows) == len(models) * len(lengths.TASKS) * 2
    assert {"model", "seed", "train_length", "length", "task", "accuracy", "seconds"} <= set(rows[0])
    assert all(0 <= r["accuracy"] <= 1 and r["train_length"] == 64 and r["samples"] == 2 for r in rows)
    assert {r["read_tokens"] for r in rows} == {0, 128}
    assert (tmp_path / "out/lengths-toy.png").stat().st_size > 5000
    # A second call measures nothing again; a row that is missing is measured with the model that is there.
    (tmp_path / "out/lengths.json").write_text(json.dumps(rows[1:]))
    trained = sorted((tmp_path / "runs").rglob("step-*/meta.json"))
    stamps = [p.stat().st_mtime_ns for p in trained]
    assert CliRunner().invoke(app, args).exit_code == 0
    again = json.loads((tmp_path / "out/lengths.json").read_text())
    assert again[1:] == rows[1:] and again[0]["accuracy"] == rows[0]["accuracy"]
    assert [p.stat().st_mtime_ns for p in trained] == stamps


@pytest.mark.parametrize(
    "args, words",
    (
        (("--models", "gpt"), "model must be one of hsa, full-rope"),
        (("--tasks", "x"), "task must be one of s-niah"),
        (("--lengths", "x"), "lengths must be numbers"),
    ),
)
def test_bad_lengths_input(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["lengths", *args])
    assert result.exit_code == 2 and words in result.output and list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "lengths.json").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match=r"lengths.json must hold the rows of hsa-tl lengths"):
        lengths.read_rows(tmp_path / "lengths.json")


def test_the_demos_last_act_may_train(recipe, tmp_path):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    (tmp_path / "lengths.json").write_text("[]")
    lengths.train_and_ask(console, tmp_path, recipe, lengths=(128, 1024), samples=2)
    text = console.export_text()
    assert "128 retrieved tokens" in text and "1K" in text
    rows = json.loads((tmp_path / "lengths.json").read_text())
    assert {(r["task"], r["length"]) for r in rows} == {(t, T) for t in lengths.DEMO_TASKS for T in (128, 1024)}
