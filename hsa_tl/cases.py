"""Named problems with tags: the one list that tests, tuner and benchmarks read.

Tags: ci (lowered and assembled for sm_90a by the tests), tune (measured by the GPU run), bench (swept over length).
"""

from dataclasses import dataclass, replace

import torch

from hsa_tl.problem import Problem


@dataclass(frozen=True)
class Case:
    name: str
    problem: Problem
    tags: frozenset[str]
    why: str


def _case(name: str, why: str, tags: str, T=16384, HQ=16, H=1, D=128, S=64, K=64, per_head=False) -> Case:
    problem = Problem(1, T, -(-T // S), HQ, H, D, S, K, masked=T % S != 0, per_head=per_head)
    return Case(name, problem, frozenset(tags.split()), why)


CASES = (
    _case("paper-d128", "the paper's head ratio and selection: K * S = 4096", "ci tune bench"),
    _case("paper-d64", "head dimension 64", "ci tune bench", D=64),
    _case("k16-d128", "a small selection: K * S = 1024", "tune bench", K=16),
    _case("k16-d64", "the CPU benchmark's case", "tune bench", D=64, K=16),
    _case("g4", "4 query heads a key/value head: rows pad to 16", "bench", H=4, K=16),
    _case("g1", "multi-head attention: one query head a key/value head", "bench", HQ=4, H=4, K=16),
    _case("g32-s32", "rows and chunk size off the paper's", "ci", HQ=32, S=32, K=16),
    _case("tail-perhead", "a short last chunk, weights per query head", "ci", T=4000, H=4, K=16, per_head=True),
)


def find(tag: str) -> tuple[Case, ...]:
    return tuple(c for c in CASES if tag in c.tags)


def case(name: str) -> Case:
    """The case of that name; ValueError lists the names."""
    for c in CASES:
        if c.name == name:
            return c
    raise ValueError(f"case must be one of {', '.join(c.name for c in CASES)}, got {name!r}")


def at_length(problem: Problem, T: int, **changes) -> Problem:
    """The same problem for T tokens."""
    return replace(problem, T=T, N=-(-T // problem.S), masked=T % problem.S != 0, **changes)


def on_cpu(problem: Problem) -> Problem:
    """The same problem in float32 on the CPU."""
    return replace(problem, dtype=torch.float32, device_type="cpu")
