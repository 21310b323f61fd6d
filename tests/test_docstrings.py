"""Public docstrings: a sentence, Args that name every parameter, Returns; and their examples run."""

import dataclasses
import doctest
import inspect
import re
import textwrap

import pytest
import torch

import hsa_tl
from hsa_tl import model

MODULES = (hsa_tl, model)
NAMES = {f"{m.__name__}.{name}": getattr(m, name) for m in MODULES for name in m.__all__}
# What users call on these classes; the others are of use inside the project.
METHODS = {
    model.ChunkEncoder: ("forward",),
    model.ChunkMemory: ("retrieve", "attend"),
    model.HSALayer: ("forward",),
    model.Model: ("forward", "generate", "stream", "new_cache", "load_cache"),
    model.PagedMemory: ("append", "replace", "crop", "free", "fork", "retrieve", "attend", "save", "load"),
}
CALLS = {name: x for name, x in NAMES.items() if callable(x)} | {
    f"{c.__module__}.{c.__name__}.{name}": getattr(c, name) for c, names in METHODS.items() for name in names
}


def sections(doc: str) -> dict[str, str]:
    """Section name -> its text, "" -> what stands before the first."""
    parts = re.split(r"^(Args|Returns|Raises|Example):\n", inspect.cleandoc(doc), flags=re.M)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def described(args: str) -> list[str]:
    """Names that a section Args describes, one or several of them before each colon."""
    heads = re.findall(r"^(\w[\w, ]*?)(?: \(.*?\))?:", textwrap.dedent(args).replace("]):", "):"), flags=re.M)
    return [name for head in heads for name in head.split(", ")]


@pytest.mark.parametrize("name", CALLS)
def test_docstring(name):
    x = CALLS[name]
    parts = sections(x.__doc__)
    first = parts[""].split("\n\n")[0]
    assert "\n" not in first.strip() and first.strip()[-1] in ".:", f"{name} must begin with a sentence of one line"
    parameters = [p for p in inspect.signature(x).parameters if p not in ("self", "cls")]
    assert described(parts.get("Args", "")) == parameters, f"{name}: Args must describe {parameters} in this order"
    returns = inspect.signature(x).return_annotation
    if not inspect.isclass(x) and returns is not None:
        assert parts.get("Returns", "").strip(), f"{name} must have Returns"


def is_default(told: str, default) -> bool:
    """Whether a text begins with the default; None is told in words, a float at least by two digits."""
    if isinstance(default, float):
        return float(re.match(r"[\d.e-]*\d", told)[0]) in (default, float(f"{default:.2g}"))
    written = re.escape(repr(default).replace("'", '"'))
    return default is None or re.match(written + r"[.,]?( |$)", told) is not None


def test_a_default_is_told():
    """A parameter that may be left out says its default; options and fields of results have none to tell."""
    for name, x in CALLS.items():
        args = textwrap.dedent(sections(x.__doc__).get("Args", ""))
        for entry in re.split(r"^(?=\w)", args, flags=re.M)[1:]:
            if x is model.ModelOutput or "as there" in entry or "as for" in entry:
                continue
            told = re.search(r"efault: (.*)", " ".join(entry.split()))
            for p in (inspect.signature(x).parameters.get(p) for p in described(entry)):
                if p is not None and p.default is not p.empty:
                    assert told and is_default(told[1], p.default), f"{name}: {entry!r} must tell {p.default!r}"


def test_examples():
    globs = {"torch": torch, "replace": dataclasses.replace} | {n.rsplit(".", 1)[1]: x for n, x in NAMES.items()}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name, x in NAMES.items():
        for test in finder.find(x, name, globs=dict(globs)):
            runner.run(test)
    result = runner.summarize()
    assert result.failed == 0 and result.attempted >= 15
