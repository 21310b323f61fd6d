"""Every script of examples/ runs and shows what it says; none is longer than 60 lines."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
# What each is called with here, and what its output must match.
RUNS = {
    "operator_in_your_transformer": (
        ["--tokens", "256"],
        r"exactly 0: True\n.*before differ by 0\.0e\+00",
    ),
    "layer": (["--steps", "2"], r"step 0: loss \d.*\nvalues right after 2 steps, with .*\n.*without"),
    "decode_with_pages": (["--tokens", "3000"], r"sequence 1: the same chunks .*\nsaved and loaded, .*: True"),
    "train_needles": (
        ["--steps", "2", "--batch", "2", "--lengths", "256", "1024", "--samples", "2"],
        r"step 6 of 6, 256 tokens: loss .*\n256 tokens, 1 times .*\n1024 tokens, 4 times the training length: \d of 2",
    ),
    "generate": (["--tokens", "2000"], r"3 of 3 right\n.*\n.*\n2 of 2 right.*\n.*with the same seed: True"),
}


def test_all_are_listed():
    assert {p.stem for p in FOLDER.glob("*.py")} == set(RUNS)
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, f"{path.name} has {len(lines)} lines"
        assert f"    python examples/{path.name}" in "\n".join(lines), f"{path.name} must say how it is run"
        assert not re.search(r"(import|from) .*\b_\w+", "\n".join(lines)), f"{path.name} must import public names only"


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, monkeypatch, capsys, tmp_path):
    arguments, output = RUNS[name]
    monkeypatch.chdir(tmp_path)  # where those that write, write
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(output, printed), printed
