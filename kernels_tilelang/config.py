"""The registry of the programs, and the one door to their configs: search spaces, and why one is illegal.

A program is the module of its name: the class of its config, and its builder, which names that class in its signature.
"""

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from hsa_tl.files import writable
from hsa_tl.kernels_tilelang.config_base import Config, refused

# Program -> the function of hsa_tl.impl.tilelang that launches it in a plan, None for those that others launch. Where
# predictions tie, the first of a direction is taken; on the CPU target always.
PROGRAMS = {
    "hsa_fwd_token": "fwd_token",
    "hsa_fwd_union_sm90a": "fwd_union",
    "hsa_fwd_union": "fwd_union",
    "hsa_fwd_chunk_sm90a": "fwd_chunk",
    "hsa_fwd_chunk": "fwd_chunk",
    "hsa_bwd_dq_token": "bwd_dq_token",
    "hsa_bwd_dkdv_chunk": "bwd_dkdv_chunk",
    "hsa_bwd_chunk_sm90a": "bwd_chunk",
    "hsa_bwd_chunk": "bwd_chunk",
    "selected_fwd_token": "fwd_token",
    "selected_fwd_union": "fwd_union",
    "selected_bwd_chunk": "bwd_chunk",
    "hsa_combine": None,
    "pairs_count": None,
    "pairs_place": None,
    "union_index": None,
    "hsa_decode_split": None,
    "hsa_decode_combine": None,
    "selected_decode_split": None,
    "selected_decode_combine": None,
    "retrieve_topk": None,
    "retrieve_dlandmarks": None,
    "retrieve_split": None,
    "retrieve_combine": None,
}


@functools.cache
def make_importable() -> None:
    """TileLang cannot even be imported where its cache cannot be written, as in many containers."""
    name = "TILELANG_CACHE_DIR"
    folder = Path(os.environ.get(name) or os.path.expanduser("~/.tilelang/cache"))
    if (found := writable(folder, name)) != folder:
        os.environ[name] = str(found)


def planned() -> tuple[str, ...]:
    """The programs that plans are made of, which the tuner runs through the public operator."""
    return tuple(name for name, launcher in PROGRAMS.items() if launcher)


def tuned() -> tuple[str, ...]:
    """Those of `hsa_attention`, which the tuner takes unless told."""
    return tuple(name for name in planned() if name.startswith("hsa_"))


def builder(program: str) -> Callable:
    """The program's builder: static dims and a config give its IR, without the parameters whose type is None."""
    make_importable()
    return getattr(importlib.import_module(f"hsa_tl.kernels_tilelang.{program}"), program)


def config_of(program: str) -> type[Config]:
    """The class of the program's config."""
    return builder(program).__annotations__["config"]


def problem_of(program: str, problem):
    """What the program is given where an attention's problem is this one: retrieval has a problem of its own."""
    return problem.retrieval() if config_of(program).of_retrieval else problem


def cpu_refusal(program: str) -> str | None:
    """Why the CPU target cannot run the program, or None."""
    if not config_of(program).sm_90a_only:
        return None
    return f"{program} runs on Hopper alone; on a CPU name {program.removesuffix('_sm90a')}"


def why_illegal(program: str, problem, config) -> str | None:
    """Why this config cannot run this problem on Hopper, or None. The space, the tables and the launcher all ask it."""
    if type(config) is not config_of(program):
        return f"{program} takes a {config_of(program).__name__}, got {type(config).__name__}"
    return refused(config, problem)


def space(program: str, problem) -> list:
    """The legal configs that may run without a table, in order of preference; the tests assemble all of them."""
    return [c for c in config_of(program).options(problem) if refused(c, problem) is None]


def candidates(program: str, problem) -> list:
    """The tuner's search space: space() first, then the program's legal variants."""
    usual, make = space(program, problem), config_of(program)
    others = [make(*x) for x in make.VARIANTS]
    return usual + [c for c in others if c not in usual and refused(c, problem) is None]


@functools.lru_cache(maxsize=1024)
def default(program: str, problem):
    """The config of a program that no plan names: the first of its space; on the CPU target a small tile."""
    if problem.device_type == "cpu":
        return config_of(program).on_cpu(problem)
    if not (legal := space(program, problem)):
        raise NotImplementedError(f"{program} has no config for {problem}; name another program in config=")
    return legal[0]


def from_dict(program: str, values: dict):
    """The program's config from a mapping; ValueError names unknown programs and fields."""
    if program not in PROGRAMS:
        raise ValueError(f"config must name programs among {', '.join(PROGRAMS)}, got {program!r}")
    known = [f.name for f in fields(config_of(program))]
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"config of {program} must have fields among {', '.join(known)}, got {sorted(unknown)}")
    return config_of(program)(**values)


def describe(config) -> str:
    """One readable token for tables: field=value, comma separated."""
    return ",".join(f"{k}={v}" for k, v in asdict(config).items())


def parse(program: str, text: str):
    """The config that describe() printed; every field is an integer."""
    return from_dict(program, {k: int(v) for k, v in (item.split("=") for item in text.split(","))})
