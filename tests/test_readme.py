"""The README and docs/: their Python runs, their commands, links and the tree exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from hsa_tl.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").rglob("*.md")])
SNIPPETS = [(p, i, s) for p in PAGES for i, s in enumerate(re.findall(r"```python\n(.*?)```", p.read_text(), re.S))]
TEXT = "\n".join(p.read_text() for p in PAGES if "results" not in p.parts)
COMMANDS = sorted({a or b for a, b in re.findall(r"`hsa-tl ([^`]+)`|^    hsa-tl ([^#\n]*)", TEXT, re.M)})


@pytest.mark.parametrize("path, i, code", SNIPPETS, ids=[f"{p.stem}-{i}" for p, i, _ in SNIPPETS])
def test_snippets(path, i, code):
    exec(compile(code, f"{path.name}, snippet {i}", "exec"), {"__name__": "__main__"})


def test_length():
    assert len(README.read_text().splitlines()) <= 110


@pytest.mark.parametrize("path", [p for p in PAGES if "results" not in p.parts], ids=lambda p: p.stem)
def test_width(path):
    """Tables have a line for each row, however long."""
    long = [n for n, x in enumerate(path.read_text().splitlines(), 1) if len(x) > 120 and not x.startswith("|")]
    assert not long


def test_every_variable_of_the_environment_is_listed():
    """In one table, with one prefix."""
    listed = set(re.findall(r"HSA_\w+", (ROOT / "docs" / "operator.md").read_text()))
    folders = ("hsa_tl", "kernels_tilelang", "autotune", "model", "bench", "tests")
    sources = (f.read_text() for folder in folders for f in (ROOT / folder).rglob("*.py"))
    read = {name for text in sources for name in re.findall(r"\"(HSA_[A-Z_]+)\"", text)}
    assert read == listed and all(name.startswith("HSA_TL_") for name in read)


def test_docs_are_linked():
    """Every page of docs/ can be reached from the README."""
    text = README.read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"docs/{p.name}" not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    missing = [t for t in targets if "://" not in t and not (path.parent / t.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line):
    """Every command and option of hsa-tl that the pages name is there."""
    command, *words = shlex.split(line)
    known = typer.main.get_command(app).commands
    options = {"--help"} | {o for p in known[command].params for o in p.opts}
    assert {w.split("=")[0] for w in words if w.startswith("--")} <= options


def test_tree():
    lines = re.findall(r"^    (\w+)/ +(.*)$", README.read_text().split("## The tree")[1], re.M)
    assert {folder for folder, _ in lines} >= {"hsa_tl", "kernels_tilelang", "autotune", "model", "bench", "tests"}
    for folder, what in lines:
        for name in what.split(": ")[1].split(", "):
            path = ROOT / folder / name.rstrip("/")
            assert path.is_dir() if name.endswith("/") else path.with_suffix(".py").is_file(), f"{folder}/{name}"
