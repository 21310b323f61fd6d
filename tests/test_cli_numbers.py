"""Numbers of the command line have their ranges, nothing is done in silence, and nothing ends in a traceback."""

import inspect
import os
import runpy
import subprocess
import sys
import typing
from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tiers import prove
from typer.testing import CliRunner

from hsa_tl import cases, terminal
from hsa_tl.bench import sweep
from hsa_tl.cli import app, caches
from hsa_tl.impl import tilelang
from hsa_tl.model import cli
from hsa_tl.model.convert import DEFAULTS
from hsa_tl.model.landmarks import add_landmarks

NUMBERS = (int, float)
# command, option, its typer.Option, int or float
OPTIONS = [
    (command.name or command.callback.__name__.replace("_", "-"), name, info, kind)
    for command in app.registered_commands
    for name, hint in typing.get_type_hints(command.callback, include_extras=True).items()
    if typing.get_origin(hint) is typing.Annotated
    for info in hint.__metadata__
    for kind in NUMBERS
    if kind in (typing.get_args(hint)[0], *typing.get_args(typing.get_args(hint)[0]))
]


def invoke(*args, code=2):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output


def test_every_command_declares_its_options():
    """By Annotated, which is what the next test reads."""
    for command in app.registered_commands:
        for name, p in inspect.signature(command.callback).parameters.items():
            assert typing.get_origin(p.annotation) is typing.Annotated, f"{command.callback.__name__}: {name}"
    assert len(OPTIONS) >= 30


@pytest.mark.parametrize("command, name, info, kind", OPTIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_number_has_its_range(command, name, info, kind):
    assert info.min is not None and info.max is not None, f"{command} {name} must have min and max"
    option = next((o for o in info.param_decls or () if o.startswith("--")), f"--{name.replace('_', '-')}")
    for value in (info.min - 1, info.max + 1, "x", *(("nan", "inf") if kind is float else ("1.5",))):
        output = invoke(command, f"{option}={value}")
        assert option in output and len(output.strip().splitlines()) == 1, output


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a text, its token files in data, a recipe r.yaml and its run."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "book.txt").write_text("".join(f"line {i}, hello world\n" for i in range(400)))
    (folder / "r.yaml").write_text(
        "preset: tiny\nlr: 1.0e-3\ncheckpoint_every: 1\n"
        "model: {dim: 32, heads: 4, kv_heads: 2, head_dim: 16, mlp_dim: 48, retrieval_dim: 16, encoder_mlp_dim: 32,\n"
        "        window: 16, chunk_size: 16, topk: 2, vocab_size: 300}\n"
        "stages:\n  - {steps: 2, length: 64, batch: 2, data: {kind: text, path: "
        f"{folder}/data/train.bin}}}}\n"
    )
    invoke("prepare", folder / "book.txt", "--out", folder / "data", code=0)
    train = ("train", folder / "r.yaml", "--out", folder / "run", "--device", "cpu", "--threads", 1)
    output = invoke(*train, code=0)
    assert "step 1: validation loss 5." in output and "tokens/s" in output and "loss.png" in output
    assert (folder / "run/loss.png").stat().st_size > 5000
    return folder


@pytest.mark.parametrize(
    "args, words",
    (
        ("train {d}/r.yaml --out {d}/no --device cpu --threads 0", "--threads"),
        ("train {d}/r.yaml --out {d}/no --device cpu --threads 1 --context-parallel 0", "--context-parallel"),
        ("train {d}/r.yaml --out {d}/no --device cpu --threads 1 --seed 100000000000000000000", "--seed"),
        ("train {d}/r.yaml --out {d}/no --device cpu --threads 1 --minutes nan", "--minutes"),
        ("eval --run {d}/run --out {d}/no ruler --lengths 256 --samples 0", "--samples"),
        ("eval --run {d}/run --out {d}/no perplexity --data {d}/data/train.bin --windows 0", "--windows"),
        ("lengths --seeds 0 --out {d}/no --runs {d}/no", "--seeds"),
        ("autotune --device h200 --T 4k --D 7", "problem must suit one of hsa_fwd_token"),
        ("eval --run {d}/run --out {d}/no ruler --lengths 9999999m", "lengths must be at most 1048576m"),
        ("train", "train must have a recipe, which hsa-tl recipes lists, or --data, got neither"),
        ("train needle-tiny --steps 3", "--steps must stand beside --data, got it beside a recipe"),
        ("train --data {d}/book.txt --length x --out {d}/no", "lengths must be numbers"),
        ("recipes nonsense", "name must be one of anneal"),
        ("train {d}/r.yaml --out {d}/run --attention full --threads 1", "another folder and start: "),
        ("nonsense", "No such command"),
    ),
)
def test_what_is_out_of_range_is_one_line(toy, args, words):
    output = invoke(*args.format(d=toy).split())
    assert words in output and len(output.strip().splitlines()) == 1
    assert not (toy / "no/log.jsonl").exists()


def test_a_finished_run_says_so(toy):
    output = invoke("train", toy / "r.yaml", "--out", toy / "run", "--device", "cpu", "--threads", 1, code=0)
    assert "nothing was left to do: all 2 steps" in output


def test_a_text_trains_without_a_recipe(toy, tmp_path):
    common = ("--steps", 2, "--length", 64, "--batch", 2, "--seed", 3, "--device", "cpu", "--threads", 1)
    output = invoke("train", "--data", toy / "book.txt", *common, "--out", tmp_path / "a", code=0)
    assert "book, 2 steps" in output and "validation loss" in output
    assert (tmp_path / "a/data/held_out.bin").is_file()
    # The run's text is that one and no other.
    again = invoke("train", "--data", toy / "book.txt", *common, "--out", tmp_path / "a", code=0)
    assert "nothing was left to do" in again
    other = tmp_path / "book.txt"
    other.write_text("another book\n" * 2000)
    words = " ".join(invoke("train", "--data", other, *common, "--out", tmp_path / "a", code=2).split())
    assert "--data must be what" in words and "got another text" in words
    missing = invoke("train", "--data", tmp_path / "nowhere.txt", *common, "--out", tmp_path / "a", code=2)
    assert "a source of text must be a folder or a file, got" in missing
    output = invoke(
        "train", "--data", toy / "data/train.bin", *common, "--out", tmp_path / "b", "--start", tmp_path / "a",
        "--minutes", 0, code=0,
    )  # fmt: skip
    assert "out of time after 1 of 2 steps: the same call goes on" in output and "data, 2 steps" in output


def test_a_folder_trains_beside_its_own_run(tmp_path, monkeypatch):
    """What the run wrote into the folder is none of its text; "." has a name too."""
    (tmp_path / "words").mkdir()
    for i in range(12):
        (tmp_path / f"words/{i}.txt").write_text(f"file {i} hello world " * 60)
    monkeypatch.chdir(tmp_path / "words")
    assert cli.recipe_from(None, Path("."), tmp_path / "other", 1, "64", 2, None)[0].name == "words"
    call = ("train", "--data", ".", "--steps", 1, "--length", 64, "--batch", 2, "--device", "cpu", "--threads", 1)
    invoke(*call, "--out", "run", code=0)
    assert "nothing was left to do" in invoke(*call, "--out", "run", code=0)


def test_recipes_are_listed_and_explained():
    output = " ".join(invoke("recipes", code=0).split())
    assert all(word in output for word in ("needle-tiny", "text-tiny-baselm", "Needles in noise", "hsa-tl train NAME"))
    assert invoke("recipes", "needle-tiny", code=0).startswith("# Needles in noise")


def test_a_sweep_without_a_time_fails(tmp_path):
    where = ("bench", "--device", "cpu", "--threads", 1, "--out", tmp_path)
    output = invoke(*where, "--lengths", 128, "--minutes", 0, "--provider", "hsa-auto", code=1)
    assert "the sweep's time is up" in " ".join(output.split())


def test_a_fault_is_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr("hsa_tl.bench.cli.Sweep", fails)
    output = invoke("bench", "--device", "cpu", code=1)
    assert output == f"error: RuntimeError: a fault of two lines; {terminal.TRACEBACK}=1 shows where\n"
    monkeypatch.setenv(terminal.TRACEBACK, "1")
    assert isinstance(CliRunner().invoke(app, ["bench", "--device", "cpu"]).exception, RuntimeError)
    assert sweep.Sweep is not fails


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch):
    out = StringIO()
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with terminal.progress_bar(Console(file=out)) as bar:
        tasks = [bar.add_task("train", total=n) for n in (9, 5)]
        for i in range(9):
            bar.update(tasks[0], advance=1, description=f"loss {9 - i}")
        for _ in range(3):
            bar.update(tasks[1], advance=1)
    assert out.getvalue().splitlines() == ["loss 7: 3 of 9", "loss 4: 6 of 9", "loss 1: 9 of 9", "train: 3 of 5"]


@pytest.mark.parametrize(
    "command, function", ((cli.landmarks, add_landmarks), (cli.convert, DEFAULTS)), ids=("landmarks", "convert")
)
def test_an_option_s_default_is_the_function_s(command, function):
    told = {name: p.default for name, p in inspect.signature(command).parameters.items() if p.default is not p.empty}
    if callable(function):
        function = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for name in told.keys() - {"threads"}:
        default = told[name]
        if isinstance(default, str) and default[0].isdigit():
            default = terminal.parse_length(default)
        assert default == function[name], name


def test_version():
    assert invoke("--version", code=0).startswith("hsa-tl 0.")


def test_a_missing_compiler_is_said_before_the_call(monkeypatch):
    problem = cases.on_cpu(cases.at_length(cases.case("k16-d64").problem, 128))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    assert tilelang.unavailable(problem) is None
    monkeypatch.setenv("PATH", "/nowhere")
    reason = "on a CPU it needs a C++ compiler, and there is no g++, clang++ or c++ on PATH"
    assert tilelang.unavailable(problem) == reason
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert tilelang.unavailable(problem).endswith("there is no /nowhere/g++")


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    for name in ("XDG_CACHE_HOME", "TILELANG_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert all("cannot be written: what is compiled is kept for one" in x for x in caches().values())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    assert caches()["TRITON_CACHE_DIR"] == str(tmp_path / "new")


@prove  # a process that imports torch and tilelang and compiles: 6 s of a core
def test_what_works_does_without_a_cache(tmp_path):
    """As in a container: HOME and every cache folder are files, which root cannot write into either."""
    file = tmp_path / "file"
    file.touch()
    names = ("HOME", "XDG_CACHE_HOME", "TILELANG_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = os.environ | dict.fromkeys(names, str(file)) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hsa_tl.cli", "info"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [x.split() for x in run.stdout.split("Implementations on")[1].splitlines()]
    works = {line[0]: line[1] for line in lines if len(line) > 1}
    text = " ".join(run.stdout.split())
    assert all(works[name] == "yes" for name in ("reference", "tilelang", "triton")), run.stdout
    assert "auto takes reference: on a CPU it is the fastest" in text and "GPU none: torch" in text
    assert text.count("cannot be written: what is compiled is kept for one process only") == 3


def test_a_seed_is_any_int64_from_0_on():
    option = terminal.seed_option("")
    assert (option.min, option.max) == (0, 2**63 - 1)


def test_the_module_is_the_command(monkeypatch, capsys):
    """torchrun starts it so."""
    monkeypatch.setattr(sys, "argv", ["hsa-tl", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(inspect.getfile(caches), run_name="__main__")
    assert "retrieve" in capsys.readouterr().out


def test_the_walk_sees_every_command():
    names = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands}
    assert set(typer.main.get_command(app).commands) == names and not app.registered_groups
