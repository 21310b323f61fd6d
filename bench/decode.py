"""`hsa-tl bench decode`: one new token a sequence, HSA's retrieval and attention against dense attention by length.

Keys and values are random, and so are landmarks: the selection is as scattered as it can be, and no bound of a block
of landmarks excludes it (the two-level provider is at its worst).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hsa_tl import cases, fusion_weights, hsa_decode, landmark_bounds, retrieve_decode
from hsa_tl.accuracy import complaints, expect
from hsa_tl.bench import baselines
from hsa_tl.bench.providers import provider, why_not
from hsa_tl.bench.suite import Suite, Work, one_of
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, check_attention, check_retrieval

GATE_LENGTH = 1024  # tokens
GATE_BATCH = 16  # enough numbers that the largest error is not luck
DENSE = ("dense", "dense-grouped", "dense-fa3")
HSA = ("hsa-auto", "hsa-auto-two-level", "hsa-tilelang", "hsa-triton")


@dataclass(frozen=True)
class Step:
    """A decode step: position T of sequences that hold T tokens, in pages that lie in order."""

    problem: Problem
    q: torch.Tensor  # [B, 1, HQ, D]
    q_slc: torch.Tensor  # [B, 1, H, D]
    k: torch.Tensor  # [B * N, S, H, D], as v
    v: torch.Tensor
    landmarks: torch.Tensor  # [B, N, H, D]
    bounds: torch.Tensor
    table: torch.Tensor  # [B, N]
    lengths: torch.Tensor  # [B]

    @classmethod
    def of(cls, p: Problem, seed: int = 0) -> "Step":
        g = torch.Generator(p.device_type).manual_seed(seed)
        N = p.T // p.S

        def make(*shape):
            return torch.randn(shape, generator=g, dtype=p.dtype, device=p.device_type)

        landmarks = make(p.B, N, p.H, p.D)
        k, v = (make(p.B * N, p.S, p.H, p.D) for _ in range(2))
        table = torch.arange(p.B * N, dtype=torch.int32, device=p.device_type).view(p.B, N)
        lengths = torch.full((p.B,), p.T, dtype=torch.int32, device=p.device_type)
        q, q_slc = make(p.B, 1, p.HQ, p.D), make(p.B, 1, p.H, p.D)
        return cls(p, q, q_slc, k, v, landmarks, landmark_bounds(landmarks), table, lengths)

    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, T, H, D]."""
        return tuple(x.view(self.problem.B, -1, self.problem.H, self.problem.D) for x in (self.k, self.v))

    def retrieve(self, two_level: bool = False):
        bounds = self.bounds if two_level else None
        p = self.problem
        return retrieve_decode(self.q_slc, self.landmarks, self.lengths, p.K, chunk_size=p.S, bounds=bounds)

    def attend(self, weights, indices, impl: str = "auto"):
        return hsa_decode(self.q, self.k, self.v, weights, indices, self.table, impl=impl)


def dense(step: Step) -> torch.Tensor:
    """SDPA of the new token over the whole cache."""
    q, k, v = (x.transpose(1, 2) for x in (step.q, *step.cache()))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def dense_grouped(step: Step) -> torch.Tensor:
    """As `dense`, with the query heads of a key/value head as rows of one query: each key is read once."""
    p = step.problem
    q = step.q.view(p.B, p.H, p.G, p.D)
    return F.scaled_dot_product_attention(q, *(x.transpose(1, 2) for x in step.cache())).view(p.B, 1, p.HQ, p.D)


def dense_fa3(step: Step) -> torch.Tensor:
    """FlashAttention-3; its causal mask is aligned to the last key."""
    return baselines.flash3(step.q, *step.cache(), chunk_size=step.problem.S)


DENSE_CALLS = {"dense": dense, "dense-grouped": dense_grouped, "dense-fa3": dense_fa3}


def dense_oracle(q, k, v):
    heads_BTHGD = q.unflatten(2, (k.shape[2], -1))
    s = torch.einsum("bthgd,bshd->bthgs", heads_BTHGD, k) * q.shape[3] ** -0.5
    return torch.einsum("bthgs,bshd->bthgd", s.softmax(-1), v).flatten(2, 3)


class Decode(Suite):
    """Mode "decode" is "retrieve" and "attend" in one call; a dense provider has that mode only."""

    name = "decode"
    modes = ("retrieve", "attend", "decode")
    default_modes = modes
    default_case = "k16-d64"
    cpu_lengths, cuda_lengths = "4k,16k,64k,256k,1m,4m,16m", "4k..16m"
    multiple_of_chunk = True

    def known(self):
        return (*DENSE, *HSA)

    def default(self, device_type):
        return ("dense", "dense-grouped", "hsa-auto", "hsa-auto-two-level") if device_type == "cpu" else self.known()

    def kernel(self, name):
        return "dense_attention" if name in DENSE else "hsa_decode"

    def does(self, name, mode, selection):
        return mode == "decode" or name not in DENSE

    def unavailable(self, name, problem, mode):
        one_of("provider", name, self.known())
        if name == "dense-fa3":
            return provider(name).unavailable(problem)
        return None if name in DENSE else why_not(name.split("-")[1], problem)

    def gate_problem(self, problem):
        return cases.at_length(problem, GATE_LENGTH, B=GATE_BATCH)

    def gate(self, name, problem):
        step = Step.of(problem)
        k, v = step.cache()
        out = self.call(name, problem, step, "decode")()
        if name in DENSE:
            return next(iter(complaints("out", out, expect(dense_oracle, step.q, k, v, dtype=k.dtype))), None)
        scores, indices = step.retrieve(name.endswith("two-level"))
        wrong = []
        for b, length in enumerate(step.lengths.tolist()):
            one = slice(b, b + 1)
            found = (x[one] for x in (scores, indices, step.q_slc, step.landmarks))
            wrong += check_retrieval(*found, chunk_size=problem.S, q_start=length)
        inputs = Inputs(step.q, k, v, fusion_weights(scores), indices, torch.zeros_like(step.q))
        return next(iter(wrong + check_attention({"out": out}, inputs, chunk_size=problem.S)), None)

    def inputs(self, problem, selection):
        return Step.of(problem)

    def call(self, name, problem, inputs, mode):
        step = inputs
        if name in DENSE:
            return lambda: DENSE_CALLS[name](step)
        impl, two_level = name.split("-")[1], name.endswith("two-level")
        if mode == "retrieve":
            return lambda: step.retrieve(two_level)
        if mode == "attend":
            scores, indices = step.retrieve()
            weights = fusion_weights(scores)
            return lambda: step.attend(weights, indices, impl)

        def decode():
            scores, indices = step.retrieve(two_level)
            return step.attend(fusion_weights(scores), indices, impl)

        return decode

    def work(self, name, problem, mode):
        p = problem
        cache = 2 * p.B * p.H * p.T * p.D * p.itemsize
        if name in DENSE:
            return Work(4 * p.B * p.HQ * p.D * p.T, cache)
        keys, marks = p.S * min(p.K, p.T // p.S), p.T // p.S
        flops = {"attend": 4 * p.B * p.HQ * p.D * keys, "retrieve": 2 * p.B * p.H * p.D * marks}
        moved = {"attend": 2 * p.B * p.H * keys * p.D * p.itemsize, "retrieve": p.B * p.H * marks * p.D * p.itemsize}
        parts = ("retrieve", "attend") if mode == "decode" else (mode,)
        return Work(sum(flops[x] for x in parts), sum(moved[x] for x in parts))

    def input_bytes(self, p):
        return 2 * p.B * p.H * p.T * p.D * p.itemsize

    def label(self, p):
        return f"HQ={p.HQ} H={p.H} D={p.D} S={p.S} K={p.K} D_r={p.D} {p.dtype_name}"
