"""`hsa-tl bench decode`: one new token a sequence, HSA's retrieval and attention against dense attention by length.

Keys and values are random, and so are landmarks: the selection is as scattered as it can be, and no bound of a block
of landmarks excludes it (the two-level provider is at its worst).
"""

import functools
from typing import ClassVar

import torch
import torch.nn.functional as F

from hsa_tl import cases, fusion_weights, hsa_decode, landmark_bounds, ops, retrieve_decode
from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench import baselines
from hsa_tl.bench.providers import why_not
from hsa_tl.bench.suite import Suite, Work
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, check_attention, check_retrieval

GATE_LENGTH = 1024  # tokens
GATE_BATCH = 16  # enough numbers that the largest error is not luck


class Step:
    """A decode step: position T of sequences that hold T tokens, in pages that lie in order."""

    def __init__(self, p: Problem):
        g, N = torch.Generator(p.device_type).manual_seed(0), p.T // p.S

        def make(*shape):
            return torch.randn(shape, generator=g, dtype=p.dtype, device=p.device_type)

        self.problem = p
        self.q, self.q_slc = make(p.B, 1, p.HQ, p.D), make(p.B, 1, p.H, p.D)
        self.k, self.v = (make(p.B * N, p.S, p.H, p.D) for _ in range(2))
        self.landmarks = make(p.B, N, p.H, p.D)
        self.bounds = landmark_bounds(self.landmarks)
        self.table = torch.arange(p.B * N, dtype=torch.int32, device=p.device_type).view(p.B, N)
        self.lengths = torch.full((p.B,), p.T, dtype=torch.int32, device=p.device_type)

    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, H, D]."""
        return tuple(x.view(self.problem.B, -1, self.problem.H, self.problem.D) for x in (self.k, self.v))

    def retrieve(self, impl: str = "auto", two_level: bool = False):
        p, bounds = self.problem, self.bounds if two_level else None
        return retrieve_decode(self.q_slc, self.landmarks, self.lengths, p.K, chunk_size=p.S, bounds=bounds, impl=impl)

    def attend(self, weights, indices, impl: str = "auto"):
        return hsa_decode(self.q, self.k, self.v, weights, indices, self.table, impl=impl)

    def decode(self, impl: str = "auto", two_level: bool = False):
        scores, indices = self.retrieve(impl, two_level)
        return self.attend(fusion_weights(scores), indices, impl)


def dense_grouped(q, k, v, *, chunk_size):
    """The query heads of a key/value head as rows of one query: each key is read once."""
    B, _, H, D = k.shape
    return F.scaled_dot_product_attention(q.view(B, H, -1, D), k.transpose(1, 2), v.transpose(1, 2)).view(q.shape)


DENSE = {"dense": baselines.sdpa, "dense-grouped": dense_grouped, "dense-fa3": baselines.flash3}
HSA = {  # impl, and whether retrieval has two levels
    "hsa-auto": ("auto", False),
    "hsa-auto-two-level": ("auto", True),
    "hsa-tilelang": ("tilelang", False),
    "hsa-triton": ("triton", False),
}


class Decode(Suite):
    """Mode "decode" is "retrieve" and "attend" in one call; a dense provider has that mode only."""

    name = "decode"
    providers: ClassVar = dict.fromkeys(DENSE, "dense_attention") | dict.fromkeys(HSA, "hsa_decode")
    defaults: ClassVar = {"cpu": ("dense", "dense-grouped", "hsa-auto", "hsa-auto-two-level")}
    modes = ("retrieve", "attend", "decode")
    cpu_lengths, cuda_lengths = "4k,16k,64k,256k,1m,4m,16m", "4k..16m"
    multiple_of_chunk = True
    dims = f"{Suite.dims} D_r={{p.D}}"

    def does(self, name, mode, selection):
        if name in DENSE:
            return mode == "decode"
        return mode != "attend" or name != "hsa-auto-two-level"  # which is hsa-auto's call

    def unavailable(self, name, problem, mode):
        if name == "dense-fa3":
            return baselines.flash3_unavailable(problem)
        if name in DENSE:
            return None
        impl, _ = HSA[name]
        if (reason := why_not(impl, problem)) or impl == "auto":
            return reason
        return ops.unavailable(impl, problem.retrieval(), "_retrieval", "decode_unavailable")

    def gate_problem(self, problem):
        return cases.at_length(problem, GATE_LENGTH, B=GATE_BATCH)

    def gate(self, name, problem):
        step = Step(problem)
        k, v = step.cache()
        out = self.call(name, problem, step, "decode")()
        if name in DENSE:
            oracle = functools.partial(baselines.dense_oracle, chunk_size=problem.S)
            return complaints("out", out, expect(oracle, step.q, k, v, dtype=k.dtype))
        scores, indices = step.retrieve(*HSA[name])
        found = scores, indices, step.q_slc, step.landmarks
        wrong = check_retrieval(*found, chunk_size=problem.S, q_start=problem.T)
        inputs = Inputs(step.q, k, v, fusion_weights(scores), indices, torch.zeros_like(step.q))
        return wrong + check_attention({"out": out}, inputs, chunk_size=problem.S)

    def inputs(self, problem, selection):
        return Step(problem)

    def call(self, name, problem, inputs, mode):
        step = inputs
        if name in DENSE:
            return lambda: DENSE[name](step.q, *step.cache(), chunk_size=problem.S)
        if mode != "attend":
            return functools.partial(getattr(step, mode), *HSA[name])
        scores, indices = step.retrieve()
        return functools.partial(step.attend, fusion_weights(scores), indices, HSA[name][0])

    def work(self, name, problem, mode):
        p = problem
        cache = 2 * p.B * p.H * p.T * p.D * p.itemsize
        if name in DENSE:
            unsplit = name == "dense-fa3" and not baselines.flash3_splits()
            note = "its keys are not split over the SMs" if unsplit else ""
            return Work(4 * p.B * p.HQ * p.D * p.T, cache, note=note)
        keys, marks = p.S * min(p.K, p.T // p.S), p.T // p.S
        flops = {"attend": 4 * p.B * p.HQ * p.D * keys, "retrieve": 2 * p.B * p.H * p.D * marks}
        moved = {"attend": 2 * p.B * p.H * keys * p.D * p.itemsize, "retrieve": p.B * p.H * marks * p.D * p.itemsize}
        parts = ("retrieve", "attend") if mode == "decode" else (mode,)
        return Work(sum(flops[x] for x in parts), sum(moved[x] for x in parts))

    def input_bytes(self, p):
        return 2 * p.B * p.H * p.T * p.D * p.itemsize
