"""`hsa-tl paper` at toy size: every table trains, asks, prints, draws and resumes."""

import json
from dataclasses import replace

import pytest
import torch
from tiers import tiered
from token_files import write_tokens
from typer.testing import CliRunner

from hsa_tl.bench import paper
from hsa_tl.cli import app
from hsa_tl.model import Model
from hsa_tl.model.recipe import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and the runs that tables share."""
    root = tmp_path_factory.mktemp("paper")
    for split in ("train", "held_out"):
        write_tokens(root / "data" / f"{split}.bin", [f"{split} words and more words, ".encode() * 400])
    return root


@pytest.fixture
def toy(monkeypatch):
    for name, value in (("STEPS", 1), ("TOKENS", 512), ("WINDOWS", 2)):
        monkeypatch.setattr(paper, name, value)


@pytest.mark.parametrize("name", tiered(list(paper.TABLES), quick=["seesaw"]))
def test_a_table(name, folder, toy, monkeypatch):
    args = ["paper", name, "--data", folder / "data", "--out", folder / "out", "--runs", folder / "runs"]
    args = [*map(str, args), "--samples", "2", "--device", "cpu", "--threads", "1"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    table, rows = paper.TABLES[name], json.loads((folder / f"out/{name}-tiny.json").read_text())
    for run in table.runs:
        mine = [r for r in rows if r["model"] == run]
        assert [r["length"] * 64 for r in mine if "bits_per_token" in r] == [*table.bits]
        asked = {(r["task"], r["length"] * 64) for r in mine if "accuracy" in r}
        assert asked == {(t, T) for t in table.tasks for T in table.needles}
        assert {r["finished"] for r in mine} == {True} and mine[0]["commit"] and mine[0]["device"]
        words = paper.RUNS[run].label.split()
        assert all(word in result.output for word in words)
    pictures = [f"{name}-tiny-{x}.png" for x in ("needles", *(["text"] if table.bits else []))]
    assert all((folder / "out" / x).stat().st_size > 5000 for x in pictures)
    monkeypatch.setattr(paper, "train", None)  # a second call trains and asks nothing
    assert CliRunner().invoke(app, args).exit_code == 0
    assert json.loads((folder / f"out/{name}-tiny.json").read_text()) == rows
    asked = []  # more samples than it holds
    monkeypatch.setattr(paper, "train", lambda *args, **options: None)
    monkeypatch.setattr(paper, "ask", lambda *args: asked.append(args[-1]) or [])
    CliRunner().invoke(app, [*args, "--samples", "3"])
    assert asked == [3] * len(table.runs)


def test_small_is_asked_in_words(folder, toy, monkeypatch):
    tiny = paper.recipe_of
    words = lambda name, size: replace(r := tiny(name, "tiny"), model=r.model | {"vocab_size": 400})  # noqa: E731
    monkeypatch.setattr(paper, "recipe_of", words)
    monkeypatch.setitem(paper.TABLES, "seesaw", paper.Table(("wide",), (1024,), (256, 512), ("s-niah", "vt")))
    args = ["paper", "seesaw", "--size", "small", "--samples", 2, "--device", "cpu", "--threads", 1]
    args += ["--data", folder / "data", "--out", folder / "words", "--runs", folder / "words"]
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0 and (folder / "words/seesaw-small-needles.png").exists(), result.output
    rows = json.loads((folder / "words/seesaw-small.json").read_text())
    assert [(r.get("task"), r["length"]) for r in rows] == [(None, 256), (None, 512), ("s-niah", 1024), ("vt", 1024)]


@pytest.mark.parametrize("size", paper.SIZES)
def test_base_and_hsa_have_as_many_parameters(size):
    with torch.device("meta"):
        base, ours = (Model(paper.recipe_of(x, size).config()).num_parameters() for x in ("base", "short"))
        mixture = Model(paper.recipe_of("mixture", size).config()).num_parameters(active=True)
    assert abs(base / ours - 1) < 0.03 and abs(mixture / ours - 1) < 0.01


def test_a_run_has_what_it_starts_from():
    config = lambda name, stage=0: (r := paper.recipe_of(name, "small")).config(r.stages[stage])  # noqa: E731
    assert config("base").attention == config("base-first").attention == "full"
    assert config("mixture-mid").experts == load_recipe("mixture").model["experts"] > 0
    assert [config(x).window for x in ("short-first", "wide-first", "short", "narrow")] == [512, 4096, 4096, 512]
    assert [config(x).topk for x in ("short-first", "wide-first", "short", "short-mid")] == ["all", "all", 64, "all"]
    assert config("nsa").topk == 16 and config("nsa").rope != config("nsa-rope").rope
    assert paper.chain("narrow-mid") == ["short-first", "narrow", "narrow-mid"]


@pytest.mark.parametrize("name", paper.RUNS)
def test_tiny_is_the_papers_size_divided(name):
    """Contexts, windows and retrieved tokens by one number, so that their ratios are the paper's."""
    small, tiny = (paper.recipe_of(name, size) for size in paper.SIZES[::-1])
    if not name.startswith("nsa"):
        a, b = small.config(), tiny.config()
        first = tiny.stages[: len(tiny.stages) - len(small.stages)]
        assert [s.length for s in first] == [64, 128] * (small.start is None)
        assert [s.length for s in small.stages] == [s.length * 64 for s in tiny.stages[len(first) :]]
        assert (a.window, a.hsa_window, a.topk * a.chunk_size) == (
            b.window * 64, b.hsa_window * 64, b.topk * b.chunk_size * 64,
        )  # fmt: skip
        assert a.recency * a.chunk_size == 64 * b.recency * b.chunk_size
    longest = [max(s.length for s in r.stages) for r in (small, tiny)]
    assert longest[0] == longest[1] * 64 and all(s.steps <= 250 for s in tiny.stages)


def test_another_table_is_named(tmp_path):
    for args, words in (
        (["table-3"], "table must be one of table-1"),
        (["seesaw", "--size", "x"], "size must be one of"),
    ):
        result = CliRunner().invoke(app, ["paper", *args, "--runs", str(tmp_path), "--device", "cpu"])
        assert result.exit_code == 2 and words in result.output and not list(tmp_path.iterdir())
