"""Where a call's time goes: the device's time in each kernel, and the host's until the last launch."""

import cProfile
import json
import pstats
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hsa_tl import hsa_attention, retrieve_chunks, selected_attention, selection_overlap
from hsa_tl.autotune import plan
from hsa_tl.bench import record
from hsa_tl.files import write_atomic
from hsa_tl.problem import Problem
from hsa_tl.testing import make_inputs

REPEATS = 5
FUNCTIONS = 12


def calls(problem: Problem) -> dict[str, Callable[[], object]]:
    """One call of every strategy with its predicted configs, forward or forward and backward, and of retrieval."""
    inputs = make_inputs(problem).to(problem.device_type)
    q, k, v, _, indices, do = inputs
    overlap, found = selection_overlap(indices), {}

    def attend(attention, config, backward):
        leaves = [
            x.detach().requires_grad_(backward) for x in ((q, k, v) if attention is selected_attention else inputs[:4])
        ]
        out = attention(*leaves, indices, chunk_size=problem.S, impl="tilelang", config=config | {"overlap": overlap})
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out, leaves, do) if backward else out

    for direction in plan.DIRECTIONS:
        attention = selected_attention if direction.startswith("selected_") else hsa_attention
        for programs in plan.strategies(direction):
            arguments = attention, {name: {} for name in programs}, direction.endswith("backward")
            found[" ".join(programs)] = lambda arguments=arguments: attend(*arguments)
    q_slc, landmarks = q[:, :, : problem.H], k[:, :: problem.S]
    found["retrieve"] = lambda: retrieve_chunks(q_slc, landmarks, problem.K, chunk_size=problem.S)
    return found


def profiled(call: Callable[[], object], device: str) -> dict:
    """Microseconds of one call: host, until it returns; device, and of it each kernel (on a CPU each operator)."""
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    call()
    wait()
    begin = time.perf_counter()
    for _ in range(REPEATS):
        call()
    host = (time.perf_counter() - begin) / REPEATS
    wait()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(REPEATS):
            call()
        wait()
    spent = {x.key: x.self_device_time_total if cuda else x.self_cpu_time_total for x in seen.key_averages()}
    kernels = {name: round(us / REPEATS, 1) for name, us in sorted(spent.items(), key=lambda x: -x[1]) if us}
    times = {"host_us": round(1e6 * host, 1), "device_us": round(sum(kernels.values()), 1)}
    return times | {"kernels_us": kernels, "python_us": slowest(call)}


def slowest(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of one call in each of the FUNCTIONS Python functions that take longest, their callees left out."""
    profiler = cProfile.Profile()
    for _ in range(REPEATS):
        profiler.runcall(call)
    found = pstats.Stats(profiler).stats.items()
    ordered = sorted(
        ((spent, f"{Path(file).name}:{name}") for (file, _, name), (_, _, spent, *_) in found), reverse=True
    )
    return {name: round(1e6 * spent / REPEATS, 1) for spent, name in ordered[:FUNCTIONS]}


def write(path: Path, problems: Iterable[Problem], seconds: float) -> dict:
    """Adds to path a JSON line for each call of each problem that it has none of, until the seconds are spent."""
    end, lines = time.monotonic() + seconds, 0
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for problem in problems:
        device = problem.device_type
        about = record.origin(device) | {"problem": str(problem)}
        done = {row["call"] for row in rows if record.same_source(row, about)}
        for name, call in calls(problem).items():
            if name in done:
                continue
            if time.monotonic() > end:
                return {"lines": lines, "finished": False}
            try:
                found = profiled(call, device)
            except NotImplementedError as error:
                found = {"error": str(error)}
            rows.append({"pairs": problem.pairs, "call": name} | found | about)
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
            lines += 1
    return {"lines": lines}
