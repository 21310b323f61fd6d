"""`hsa-tl bench dispatch`: what a call costs before the device works: from the public function to each launch.

TileLang's plans for Hopper on CPU tensors, with kernels that only write down when they were launched. What PyTorch
itself launches (allocations, casts, sums) runs on the CPU and counts, so T should be small.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch

from hsa_tl import api, cases, ops
from hsa_tl.autotune import plan
from hsa_tl.bench.decode import Step
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.problem import Problem
from hsa_tl.testing import make_inputs

PLANNED_TOKENS = 16384
CHUNKS = 64  # that a decode step retrieves from
LIMITS_US = {"forward": 100, "backward": 150, "decode": 120}  # at most, of the modes that have a goal


def programs(p: Problem) -> dict:
    """What PLANNED_TOKENS run, as config= names it, for fewer tokens."""
    long = cases.at_length(replace(p, dtype=torch.bfloat16, device_type="cuda"), PLANNED_TOKENS)
    return {
        name: {}
        for direction in ("forward", "backward")
        for name, _ in plan.choose(direction, long, device="h100").programs
    }


class Dispatch(Suite):
    """forward and train: a forward without and with what its backward needs; backward; decode: retrieval as well."""

    name = "dispatch"
    providers: ClassVar = {"hsa-tilelang": "dispatch"}
    modes = ("forward", "train", "backward", "decode")
    default_case = "k16-d128"
    cpu_lengths = cuda_lengths = "256"
    multiple_of_chunk = True

    def __init__(self):
        self.kernels: dict = {}
        self.launches: list[tuple[str, float]] = []
        self.seen: dict[tuple, list] = {}  # launches of each call, by problem and mode

    @contextlib.contextmanager
    def stubbed(self) -> Iterator[None]:
        """By hand, since it stands inside what is timed: takes 5 us."""
        from hsa_tl.impl import tilelang
        from hsa_tl.kernels_tilelang import compile
        from hsa_tl.kernels_tilelang.config_base import ChunkConfig

        stubs = (
            (compile, "_KERNELS", self.kernels),
            (compile, "emulator", lambda program, _: functools.partial(self.launch, program)),
            (compile, "build", lambda program, *_: program), (compile, "lower_ir", lambda *_: None),
            (ops, "sort_pairs", tilelang.sort_pairs), (api, "validates", lambda *_: False),
            (ChunkConfig, "splits", lambda *_: 1),  # more partial sums are more zeros, which a device writes
        )  # fmt: skip
        before = [getattr(module, name) for module, name, _ in stubs]
        for module, name, stub in stubs:
            setattr(module, name, stub)
        try:
            yield
        finally:
            for (module, name, _), value in zip(stubs, before, strict=True):
                setattr(module, name, value)

    def launch(self, program: str, *_) -> None:
        self.launches.append((program, time.perf_counter()))

    def unavailable(self, name, problem, mode):
        from hsa_tl.impl import tilelang

        if problem.device_type != "cpu":
            return "it stubs launches on CPU tensors, use --device cpu"
        return None if tilelang.installed() else "the package tilelang is not installed"

    def gate_problem(self, problem):
        return cases.at_length(problem, 2 * problem.S)

    def gate(self, name, problem):
        inputs = self.inputs(problem, "random")
        for mode in self.modes:
            self.call(name, problem, inputs, mode)()
            if not self.seen[problem, mode][-1]:
                return [f"{mode} launched nothing"]
        return []

    def inputs(self, p: Problem, selection):
        return make_inputs(replace(p, dtype=torch.bfloat16))

    def call(self, name, problem, inputs, mode):
        if mode == "decode":
            step = Step(cases.at_length(replace(problem, dtype=torch.bfloat16), CHUNKS * problem.S))
            function = functools.partial(step.decode, impl="tilelang")
        else:
            train = mode != "forward"
            leaves = [x.detach().requires_grad_(train) for x in inputs[:4]]
            options = {"chunk_size": problem.S, "impl": "tilelang", "config": programs(problem)}
            function = functools.partial(api.hsa_attention, *leaves, inputs.indices, **options)
            if mode == "backward":
                with self.stubbed():
                    out = function()
                function = functools.partial(torch.autograd.grad, out, leaves, inputs.do, retain_graph=True)
        seen = self.seen.setdefault((problem, mode), [])

        def run():
            with self.stubbed():
                self.launches = []
                start = time.perf_counter()
                function()
            seen.append([(program, 1e6 * (at - start)) for program, at in self.launches])

        return run

    def work(self, name, problem, mode):
        calls = self.seen.get((problem, mode))
        if not calls or not calls[-1]:
            return Work(0, 0)
        each = (statistics.median(call[i][1] for call in calls) for i in range(len(calls[-1])))
        launches = ", ".join(f"{program} {us:.0f}" for (program, _), us in zip(calls[-1], each, strict=True))
        limit = f" of at most {LIMITS_US[mode]}" if mode in LIMITS_US else ""
        return Work(0, 0, note=f"us to the launches{limit}: {launches}")
