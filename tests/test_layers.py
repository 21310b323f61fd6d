"""The layers of STYLE.md, read from the source: imports point down, kernels stay apart, files stay short."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hsa_tl", "kernels_tilelang", "autotune", "model", "bench", "tests")
MAPPED = ("kernels_tilelang", "autotune", "model", "bench")

PROGRAMS = (
    "hsa_tl.kernels_tilelang.hsa_*",
    "hsa_tl.kernels_tilelang.selected_*",
    "hsa_tl.kernels_tilelang.*_index",
    "hsa_tl.kernels_tilelang.pairs_*",
    "hsa_tl.kernels_tilelang.retrieve_*",
    "hsa_tl.kernels_tilelang.micro",
)

# Lowest layer first. A module imports from lower layers only; those of no pattern are on top and import each other.
LAYERS = (
    (
        "hsa_tl.accuracy",
        "hsa_tl.problem",
        "hsa_tl.files",
        "hsa_tl.products",
        "hsa_tl.workers",
        "hsa_tl.validation",
        "hsa_tl.impl",
        "hsa_tl.autotune",
        "hsa_tl.bench",
    ),  # empty packages
    ("hsa_tl.kernels_tilelang", "hsa_tl.kernels_tilelang.config_base"),
    (
        "hsa_tl.kernels_tilelang.config",
        "hsa_tl.cases",
        "hsa_tl.fusion",
        "hsa_tl.pairs",
        "hsa_tl.retrieval",
        "hsa_tl.oracle",
    ),
    ("hsa_tl.decode_retrieval",),
    ("hsa_tl.near",),
    (
        "hsa_tl.kernels_tilelang.macros",
        "hsa_tl.kernels_tilelang.macros_sort",
        "hsa_tl.kernels_tilelang.cpu_target",
        "hsa_tl.autotune.table",
        "hsa_tl.testing",
    ),
    ("hsa_tl.autotune.cost", "hsa_tl.kernels_tilelang.macros_topk"),
    # Programs whose configs others extend.
    tuple(f"hsa_tl.kernels_tilelang.hsa_{x}" for x in ("?wd_chunk", "fwd_union", "fwd_token", "decode_split")),
    ("hsa_tl.kernels_tilelang.hsa_decode_combine",),
    (*PROGRAMS, "hsa_tl.autotune.plan"),
    ("hsa_tl.kernels_tilelang.compile",),
    ("hsa_tl.impl.triton_launch",),
    ("hsa_tl.impl.triton_kernels",),
    ("hsa_tl.impl.reference", "hsa_tl.impl.tilelang", "hsa_tl.impl.triton"),
    ("hsa_tl.impl.*_decode", "hsa_tl.impl.*_retrieval"),
    ("hsa_tl.impl.*_selected",),
    ("hsa_tl.ops",),
    ("hsa_tl.transforms", "hsa_tl.chunks"),
    ("hsa_tl.api", "hsa_tl.selected"),
    ("hsa_tl",),
)
TOP = len(LAYERS)
# What a module may import of the project, where its layer says too little.
ONLY = {
    "hsa_tl.impl.reference_retrieval": ("hsa_tl.decode_retrieval", "hsa_tl.retrieval"),
    "hsa_tl.impl.reference*": ("hsa_tl.impl.reference*", "hsa_tl.pairs", "hsa_tl.products", "hsa_tl.workers"),
    "hsa_tl.impl.triton_launch": ("hsa_tl.files",),
    "hsa_tl.impl.triton_selected": ("hsa_tl.impl.triton*", "hsa_tl.fusion"),
    "hsa_tl.impl.triton_retrieval": ("hsa_tl.impl.triton_launch", "hsa_tl.problem", "hsa_tl.pairs", "hsa_tl.retrieval"),
    "hsa_tl.impl.triton*": ("hsa_tl.impl.triton*", "hsa_tl.problem", "hsa_tl.pairs"),
    "hsa_tl.impl.tilelang*": (
        "hsa_tl.impl.tilelang*",
        "hsa_tl.autotune.*",
        "hsa_tl.kernels_tilelang.*",
        "hsa_tl.problem",
        "hsa_tl.pairs",
        "hsa_tl.retrieval",
    ),
    "hsa_tl.kernels_tilelang.config": ("hsa_tl.files", "hsa_tl.kernels_tilelang.*"),
    # A hand-specialised program extends the config of the tile-level one.
    "hsa_tl.kernels_tilelang.hsa_*_sm90a": ("hsa_tl.kernels_tilelang.*",),
    "hsa_tl.kernels_tilelang.hsa_decode_combine": ("hsa_tl.kernels_tilelang.*",),  # of what hsa_decode_split splits
    **dict.fromkeys(PROGRAMS, ("hsa_tl.kernels_tilelang.config_base", "hsa_tl.kernels_tilelang.macros*")),
    "hsa_tl.kernels_tilelang.selected_*": ("hsa_tl.kernels_tilelang.*",),  # they extend hsa_*'s configs
    "hsa_tl.kernels_tilelang.compile": ("hsa_tl.files", "hsa_tl.kernels_tilelang.*", "hsa_tl.problem"),
    "hsa_tl.kernels_tilelang.*": ("hsa_tl.kernels_tilelang.*", "hsa_tl.problem"),
    "hsa_tl.model.cli": ("hsa_tl.model*", "hsa_tl.terminal", "hsa_tl.files", "hsa_tl.bench.plot"),
    "hsa_tl.model*": (
        "hsa_tl",
        "hsa_tl.api",
        "hsa_tl.problem",
        "hsa_tl.files",
        "hsa_tl.validation",
        "hsa_tl.workers",
        "hsa_tl.model*",
    ),
    "hsa_tl.ops": (
        "hsa_tl.problem",
        "hsa_tl.workers",
        "hsa_tl.pairs",
        "hsa_tl.retrieval",
        "hsa_tl.decode_retrieval",
        "hsa_tl.near",
    ),  # implementations by name, when first used
    "hsa_tl.bench.*": ("hsa_tl*",),
    "hsa_tl.autotune.*": ("hsa_tl*",),
}
# Third parties that a module may not import, at any level.
BANNED = {
    "hsa_tl.impl.reference": ("tilelang", "tvm", "triton"),
    "hsa_tl.impl.triton*": ("tilelang", "tvm"),
    "hsa_tl.impl.tilelang*": ("triton", "tilelang", "tvm"),  # it compiles through kernels_tilelang.compile
    "hsa_tl.kernels_tilelang.config*": ("tilelang", "tvm", "triton"),
    **dict.fromkeys(PROGRAMS, ("torch", "triton", "numpy")),
    "hsa_tl.kernels_tilelang.macros*": ("torch", "triton", "numpy"),
    "hsa_tl.kernels_tilelang.*": ("triton",),
    **dict.fromkeys(("hsa_tl.autotune.table", "hsa_tl.autotune.plan"), ("tilelang", "tvm", "triton")),
    **{f"hsa_tl.{x}*": () for x in ("cli", "demo", "autotune", "bench")},
    "tests.*": (),
    "*": ("tilelang", "tvm", "triton"),
}
MAX_LINES = {**dict.fromkeys(PROGRAMS, 250), "hsa_tl": 30, "*": 400}


def find(table: dict, module: str):
    """The value of the first pattern that fits, None if none does."""
    return next((value for pattern, value in table.items() if fnmatchcase(module, pattern)), None)


def layer(module: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if any(fnmatchcase(module, n) for n in names)), TOP)


def imports(tree: ast.AST, modules: set[str]):
    """(line, full name, relative) of every import; `from package import x` counts as package.x if that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, x.name, False) for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            for x in node.names:
                name = f"{node.module}.{x.name}"
                yield node.lineno, name if name in modules else node.module or "", node.level > 0


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    """What a module's source breaks, a line each."""
    tree, found = ast.parse(source), []
    for line, name, relative in imports(tree, modules):
        top = name.split(".")[0]
        if relative:
            found.append(f"{line}: relative import")
        elif top in MAPPED:
            found.append(f"{line}: imports {top} and not hsa_tl.{top}")
        elif top in find(BANNED, module):
            found.append(f"{line}: imports {name}")
        elif top == "hsa_tl":
            allowed = find(ONLY, module)
            if not (layer(name) < layer(module) or layer(name) == layer(module) == TOP):
                found.append(f"{line}: imports {name}, which is not below it")
            elif allowed is not None and not any(fnmatchcase(name, x) for x in allowed):
                found.append(f"{line}: imports {name}, not among {', '.join(allowed)}")
        elif name == "__future__" and fnmatchcase(module, "hsa_tl.kernels_tilelang.*"):
            found.append(f"{line}: from __future__ import hides the shapes of prim_func's signature")
    lines, limit = source.count("\n"), find(MAX_LINES, module)
    return found + ([f"{lines} lines, at most {limit}"] if lines > limit else [])


def project() -> dict[str, Path]:
    """Module name -> file."""
    modules = {}
    for file in sorted(f for top in FOLDERS for f in (ROOT / top).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        parts = (("hsa_tl",) if parts[0] in MAPPED else ()) + parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


PROJECT = project()


@pytest.mark.parametrize("module", PROJECT)
def test_module(module):
    found = violations(module, PROJECT[module].read_text(), set(PROJECT))
    assert not found, "\n".join([str(PROJECT[module].relative_to(ROOT)), *found])


# module, source, what the walker must say; None: nothing.
SYNTHETIC = (
    ("hsa_tl.ops", "from hsa_tl import retrieval", None),
    ("hsa_tl.ops", "from hsa_tl import api", "imports hsa_tl.api, which is not below"),
    ("hsa_tl.ops", "def f():\n    import hsa_tl.impl.reference", "imports hsa_tl.impl.reference, not among"),
    ("hsa_tl.api", "def f():\n    import triton.language as tl", "2: imports triton.language"),
    ("hsa_tl.fusion", "from tilelang import language", "1: imports tilelang"),
    ("hsa_tl.problem", "from hsa_tl.pairs import Pairs", "imports hsa_tl.pairs, which is not below"),
    ("hsa_tl.impl.tilelang", "from hsa_tl.impl import reference", "imports hsa_tl.impl.reference, which is not below"),
    ("hsa_tl.impl.tilelang", "from hsa_tl import ops", "imports hsa_tl.ops, which is not below"),
    ("hsa_tl.impl.triton", "from hsa_tl import fusion", "imports hsa_tl.fusion, not among"),
    ("hsa_tl.kernels_tilelang.hsa_fwd_token", "import tilelang.language as T", None),
    ("hsa_tl.kernels_tilelang.hsa_fwd_token", "import torch", "1: imports torch"),
    ("hsa_tl.kernels_tilelang.hsa_fwd_token", "from __future__ import annotations", "from __future__"),
    ("hsa_tl.kernels_tilelang.hsa_fwd_token", "from hsa_tl.problem import Problem", "not among"),
    ("hsa_tl.kernels_tilelang.hsa_fwd_token", "\n" * 251, "251 lines, at most 250"),
    ("hsa_tl.kernels_tilelang.config", "import tilelang", "1: imports tilelang"),
    ("hsa_tl.model.hsa", "from hsa_tl import hsa_attention", None),
    ("hsa_tl.model.hsa", "from hsa_tl.bench import sweep", "imports hsa_tl.bench.sweep, not among"),
    ("hsa_tl.bench.sweep", "from bench import timing", "imports bench and not hsa_tl.bench"),
    ("hsa_tl.bench.sweep", "from . import timing", "relative import"),
    ("tests.test_x", "from hsa_tl.impl import triton\nimport tilelang", None),
    ("tests.test_x", "\n" * 401, "401 lines, at most 400"),
)


@pytest.mark.parametrize("module, source, message", SYNTHETIC)
def test_walker_finds_violations(module, source, message):
    found = violations(module, source, set(PROJECT))
    if message is None:
        assert not found
    else:
        assert len(found) == 1 and message in found[0]
