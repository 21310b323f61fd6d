"""hsa-tl demo: every act says what it does before it starts, and bad input ends it before the first one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tuning import compile_by, fake_compiler
from typer.testing import CliRunner

from hsa_tl import cases, demo
from hsa_tl.autotune import static
from hsa_tl.cli import app
from hsa_tl.text import read_corpus

ROOT = Path(__file__).parent.parent
ACTS = list(demo.ACTS)


def run(*args, code=0):
    result = CliRunner().invoke(app, ["demo", "--device", "cpu", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(f"line {i}: the key of {i % 97} is {i * i % 1009}\n".encode() for i in range(400)))
    return path


def test_the_demo_runs_without_nvcc(monkeypatch, tmp_path, text):
    monkeypatch.setattr(static, "find_tool", lambda name: None)
    asked = []
    monkeypatch.setattr(demo, "ask_shipped", lambda console, out: asked.append(out))
    small = dataclasses.replace(demo._base("cpu"), HQ=4, D=16, S=16)
    monkeypatch.setattr(demo, "_base", lambda device: small)
    monkeypatch.setattr(demo, "ACCURACY_TOKENS", {"cpu": 64})
    out = tmp_path / "out"
    output = run("--text", text, "--tokens", 2048, "--lengths", 512, "--out", out).stdout
    assert "No static table" in output and "nvcc" in output
    result = json.loads((out / "demo.json").read_text())
    assert {r["implementation"] for r in result["accuracy"]["implementations"]} == {"reference", "tilelang", "triton"}
    assert all(not e["message"] for r in result["accuracy"]["implementations"] for e in r["errors"])
    assert (
        result["selections"]
        and "against float64: pass" in output
        and result["speed"]
        and result["static"] == []
        and list(result["seconds"]) == ACTS
    )
    assert {r["provider"] for r in result["speed"]} == {"dense-expanded", *demo.SPEED}
    assert len(list(out.glob("*.png"))) >= 3 and asked == [out]
    places = [output.index(f"\n{i}/{len(ACTS)} {name}: ") for i, name in enumerate(ACTS, 1)]
    assert places == sorted(places)


def test_the_static_table_is_of_each_programs_first_config(monkeypatch):
    monkeypatch.setattr(static, "missing_tools", lambda: None)
    monkeypatch.setattr(static, "nvcc_release", lambda: "13.0")
    compile_by(monkeypatch, fake_compiler)
    console = Console(record=True, width=200)
    rows = demo.static_rows(console)
    assert [r["program"] for r in rows] == list(demo.STATIC_PROGRAMS)
    demo.show_static(console, rows, "all")
    assert all(name in console.export_text(clear=False) for name in demo.STATIC_PROGRAMS)


def test_what_fails_and_what_is_missing_is_said():
    error = {"quantity": "dq", "max_error": 1.0, "rms_error": 0.1, "message": "dq: wrong"}
    rows = [{"implementation": "a", "unavailable": None, "errors": [error]}]
    rows.append({"implementation": "b", "unavailable": "no GPU"})
    console = Console(record=True)
    assert not demo.show_accuracy(console, rows, "all")
    text = console.export_text()
    assert all(words in text for words in ("FAIL", "a dq: wrong", "unavailable", "b is unavailable: no GPU"))


def test_a_wrong_selection_is_told(monkeypatch):
    right = demo.api.retrieve_chunks

    def wrong(*args, **options):
        scores, indices = right(*args, **options)
        return scores, (indices - 1).clamp(min=0)

    problem = cases.at_length(demo._base("cpu"), 512)
    corpus = read_corpus(None, at_least=problem.T)
    assert [r["message"] for r in demo.selections(corpus, problem, (2,))[0]] == ["", ""]
    monkeypatch.setattr(demo.api, "retrieve_chunks", wrong)
    rows, _ = demo.selections(corpus, problem, (2,))
    assert [bool(r["message"]) for r in rows] == [True, False]
    console = Console(record=True)
    demo._show_selections(console, rows)
    assert "K=2: indices: " in console.export_text() and ": pass" not in console.export_text()


@pytest.mark.parametrize("stopped", ("accuracy", "selections"))
def test_an_act_is_announced_before_it_starts(stopped, monkeypatch, tmp_path, text):
    def stop(*args):
        raise ValueError("stopped here")

    monkeypatch.setattr(demo, "accuracy", lambda *args: [])
    monkeypatch.setattr(demo, stopped, stop)
    output = run("--text", text, "--tokens", 2048, "--lengths", 512, "--out", tmp_path / "out", code=2).stdout
    last = next(x for x in reversed(output.splitlines()) if x)
    number = ACTS.index(stopped) + 1
    assert last.startswith(f"{number}/{len(ACTS)} {stopped}: ") and last.endswith(" s on two quiet cores"), output


@pytest.mark.parametrize(
    "options, names, words",
    (
        ({}, ACTS, "trained at 256"),
        ({"needles": "train"}, ACTS, "6 minutes"),
        ({"needles": None}, ACTS[:-1], "as pictures"),
        ({"device": "cuda"}, ACTS, "not timed on a GPU"),
    ),
)
def test_the_plan_tells_what_will_run(options, names, words):
    plan = demo._plan(**({"device": "cpu", "needles": "ask"} | options))
    assert list(plan) == names and words in str(list(plan.values())[-1])


BAD_TEXTS = {
    "missing": (None, "No such file or directory"),
    "folder": (None, "Is a directory"),
    "empty": (b"", "text must hold at least 2048 bytes, got 0 from empty"),
    "short": (b"too short", "text must hold at least 2048 bytes, got 9 from short"),
    "latin-1": ("é".encode("latin-1") * 3000, "text must be UTF-8, got the byte 0xe9 at 0 of latin-1"),
}


def refused(tmp_path, *args) -> str:
    """What a demo that must not begin says; the first act would fail the test."""
    before = sorted(tmp_path.rglob("*"))
    result = run("--tokens", 2048, "--lengths", 512, *args, code=2)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return result.stderr


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_is_one_line(kind, tmp_path):
    data, words = BAD_TEXTS[kind]
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    assert words in refused(tmp_path, "--text", path, "--out", tmp_path / "out")


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, text):
    for out, words in ((text, "File exists"), (text / "out", "Not a directory"), ("/proc/out", "out must be")):
        message = refused(tmp_path, "--text", text, "--out", out)
        assert f"out must be a folder that can be written, got {out}: " in message and words in message
    taken = tmp_path / "taken"
    (taken / "demo.json").mkdir(parents=True)
    assert "demo.json must be a file or absent" in refused(tmp_path, "--text", text, "--out", taken)


def test_bad_numbers_are_one_line(tmp_path, text):
    common = ("--text", text, "--out", tmp_path / "out")
    assert "minutes must be positive, got 0" in refused(tmp_path, *common, "--minutes", 0)
    late = run("--tokens", 2048, "--lengths", 512, *common, "--minutes", 1e-9, code=2)
    assert "minutes must suffice for every act, got 1e-09, over before accuracy" in late.stderr
    assert "Invalid value for '--minutes'" in refused(tmp_path, *common, "--minutes", "nan")
    assert "tokens must be at least 1104, got 64" in refused(tmp_path, *common, "--tokens", 64)
    both = ("--train", "--no-needles", "--minutes", 1e-9)  # would end by its time otherwise
    assert "train must be left out with --no-needles" in refused(tmp_path, *common, *both)
    assert "text must hold at least 1048576 bytes" in refused(tmp_path, *common, "--lengths", "1m")


def test_damaged_weights_end_the_demo_before_it_begins(tmp_path, text, monkeypatch):
    def damaged(name):
        raise ValueError(f"{name} must have the sha256 a, got b")

    monkeypatch.setattr(demo, "load", damaged)
    assert "must have the sha256" in refused(tmp_path, "--text", text, "--out", tmp_path / "out")


def test_make_hands_the_text_on(tmp_path):
    """A name with a blank and a quote; nothing is installed."""
    text = tmp_path / "my 'short' text"
    text.write_text("short")
    args = ["make", "-C", ROOT, "demo", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", f"TEXT={text}"]
    result = subprocess.run(args, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: text must hold at least 16384 bytes, got 5 from")
    assert text.name in result.stderr.splitlines()[0]
