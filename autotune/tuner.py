"""Ranks configs: statically on any machine with nvcc, by measurement on a Hopper GPU. Best rows become a table."""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from hsa_tl import ops
from hsa_tl.autotune import static
from hsa_tl.cases import Case, at_length
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.oracle import attention_oracle
from hsa_tl.pairs import Pairs
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, assert_as_accurate_as, double, make_inputs, run_with_gradients

CHECK_TOKENS = 512
QUANTITIES = {  # by direction
    "forward": ("out",),
    "dq": ("dq", "dweights"),
    "dkdv": ("dk", "dv"),
    "backward": ("dq", "dk", "dv", "dweights"),
}


def versions() -> dict[str, str]:
    """Versions of what decides a kernel's speed."""
    return {name: importlib.metadata.version(name) for name in ("torch", "tilelang")}


def rank(case: Case, device: str, *, jobs: int | None = None, progress: Callable | None = None) -> list[dict]:
    """Static rows of the case: every program's best predicted config, then every second best, ...; failures last."""
    rows = static.table_rows((case,), device=device, programs=configs.TUNED, jobs=jobs, progress=progress)
    order = {name: i for i, name in enumerate(configs.TUNED)}
    rows.sort(key=lambda r: (bool(static.faults(r)), r["ns_per_pair"] or float("inf")))
    place = {id(r): sum(x["program"] == r["program"] for x in rows[:i]) for i, r in enumerate(rows)}
    return sorted(rows, key=lambda r: (bool(static.faults(r)), place[id(r)], order[r["program"]]))


def _run(program: str, config, inputs: Inputs, chunk_size: int) -> dict[str, torch.Tensor]:
    from hsa_tl.api import hsa_attention

    return run_with_gradients(
        hsa_attention, inputs, chunk_size=chunk_size, impl="tilelang", config={program: vars(config)}
    )


def check(program: str, problem: Problem, config, device: str = "cuda") -> None:
    """AssertionError unless the config is as accurate as the eager reference at a small length."""
    small = at_length(problem, min(problem.T, CHECK_TOKENS))
    inputs = make_inputs(small).to(device)
    actual = _run(program, config, inputs, small.S)
    low = run_with_gradients(attention_oracle, inputs, chunk_size=small.S)
    high = run_with_gradients(attention_oracle, double(inputs), chunk_size=small.S)
    for name in QUANTITIES[config.DIRECTION]:
        assert_as_accurate_as(name, actual[name], low[name], high[name])


def launch(program: str, problem: Problem, config, inputs: Inputs) -> Callable[[], object]:
    """A function that runs the one program on the inputs, with what it needs run each time; all else is prepared."""
    from hsa_tl.impl.tilelang import LAUNCHERS, Call

    k, v = (x.unflatten(1, (problem.N, problem.S)) for x in (inputs.k, inputs.v))
    pairs = Pairs(*ops.build_pairs(inputs.indices, problem.N, False))
    call = Call.of(inputs.q, k, v, inputs.weights, inputs.indices, pairs, None, problem.D**-0.5, inputs.do)
    run, _ = LAUNCHERS[program](call, config)
    return run


def measure(case: Case, ranked: list[dict], *, deadline: float, progress: Callable | None = None) -> list[dict]:
    """Adds median_us to the ranked rows, best predicted first, until time.monotonic() passes the deadline.

    Needs a Hopper GPU. A candidate is checked against the oracle before it is timed; a failure is recorded in error.
    """
    from tilelang.profiler import do_bench

    problem = case.problem
    inputs = make_inputs(problem).to("cuda")
    measured = []
    for i, row in enumerate(ranked):
        if time.monotonic() > deadline:
            break
        program = row["program"]
        config = configs.parse(program, row["config"])
        row = row | {"median_us": None}
        try:
            check(program, problem, config)
            row["median_us"] = 1e3 * do_bench(launch(program, problem, config, inputs), return_mode="median")
        except (AssertionError, RuntimeError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        measured.append(row)
        if progress:
            progress(i + 1, len(ranked))
    return measured


def best(case: Case, rows: list[dict]) -> list[dict]:
    """One table row for each program: the fastest measured candidate, else the best predicted one without a fault."""
    chosen = []
    for program in configs.TUNED:
        mine = [r for r in rows if r["program"] == program and not static.faults(r)]
        timed = [r for r in mine if r.get("median_us")]
        if not mine:
            continue
        key = (lambda r: r["median_us"]) if timed else (lambda r: r["ns_per_pair"])
        row = min(timed or mine, key=key)
        chosen.append(
            {"program": program, **configs.static_key(case.problem), "T": case.problem.T}
            | {"config": asdict(configs.parse(program, row["config"])), "source": "measured" if timed else "static"}
            | {"median_us": row.get("median_us"), "ns_per_pair": row["ns_per_pair"], "candidates": len(mine)}
            | {"versions": versions()}
        )
    return chosen
