"""`hsa-tl bench retrieve`: `retrieve_chunks`, which streams over the landmarks, against materialised scores and topk.

Mode "prefill" retrieves for all T tokens at once; "segment" for the last SEGMENT tokens of T only, as one segment of a
chunked prefill does (q_start = T - SEGMENT), and its rows say so. Nothing is extrapolated.
"""

import functools
import itertools
from typing import ClassVar

import torch

from hsa_tl import cases
from hsa_tl.api import IMPLS, retrieve_chunks
from hsa_tl.bench.attention import retrieval_inputs, scored_chunks
from hsa_tl.bench.providers import why_not
from hsa_tl.bench.suite import Suite, Work, parse_selection
from hsa_tl.problem import Problem
from hsa_tl.testing import check_retrieval

SEGMENT = 4096  # queries of mode "segment"
GATE_QUERIES = 128  # at the start and at the end of the gate's sequence


def float32_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [n, T, D] times b [n, N, D], transposed: rounded to 16 bits, scores would choose other chunks."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float().mT)


def materialise(q_slc, landmarks, topk, *, chunk_size, q_start=0):
    """All scores [B, T, R, N] in memory, then torch.topk: best first, ties as torch.topk has them."""
    (B, T, R, D_r), N = q_slc.shape, landmarks.shape[1]
    s = float32_products(*(x.transpose(1, 2).flatten(0, 1) for x in (q_slc, landmarks)))
    s = s.view(B, R, T, N).transpose(1, 2)
    position = torch.arange(q_start, q_start + T, device=s.device)
    future = torch.arange(N, device=s.device) >= (position // chunk_size)[:, None]
    scores, indices = s.masked_fill_(future[None, :, None], -torch.inf).topk(min(topk, N), dim=-1)
    return scores * D_r**-0.5, indices.masked_fill_(scores == -torch.inf, -1).int()  # of the chosen alone


def first_query(problem: Problem, mode: str) -> int:
    return 0 if mode == "prefill" else max(0, problem.T - SEGMENT)


class Retrieve(Suite):
    name = "retrieve"
    providers: ClassVar = {"materialise": "materialised_retrieval"} | {f"hsa-{impl}": "retrieval" for impl in IMPLS}
    defaults: ClassVar = {"cpu": ("materialise", "hsa-auto")}
    modes = ("prefill", "segment")
    selections = ("random", "text")
    cpu_lengths, cuda_lengths = "4k,16k,64k,256k,1m,4m,16m", "4k..16m"
    multiple_of_chunk = True
    dims = "R={p.H} D_r={p.D} S={p.S} K={p.K}"

    def unavailable(self, name, problem, mode):
        impl = name.removeprefix("hsa-")
        return None if impl == "materialise" else why_not(impl, problem.retrieval(), "_retrieval")

    def run(self, name, q_slc, landmarks, problem, q_start):
        p = problem
        if name == "materialise":
            return materialise(q_slc, landmarks, p.K, chunk_size=p.S, q_start=q_start)
        impl = name.removeprefix("hsa-")
        return retrieve_chunks(q_slc, landmarks, p.K, chunk_size=p.S, q_start=q_start, impl=impl)

    def gate_problem(self, problem):
        return cases.at_length(problem, 4 * problem.K * problem.S)

    def gate(self, name, problem):
        """Selection and scores against the oracle's, of whole numbers with many ties and of normal vectors.

        The baseline's ties are torch.topk's: of it only the scores of the chosen chunks are compared.
        """
        for q_start, integers in itertools.product((0, problem.T - GATE_QUERIES), (True, False)):
            q_slc, landmarks = retrieval_inputs(problem, "random", problem.D, q_start=q_start, integers=integers)
            q = q_slc[:, :GATE_QUERIES]
            found = self.run(name, q, landmarks, problem, q_start)
            options = {"ties": name != "materialise", "chunk_size": problem.S, "q_start": q_start}
            if wrong := check_retrieval(*found, q, landmarks, **options):
                return [f"from token {q_start} on: {wrong[0]}"]
        return []

    def inputs(self, problem, selection):
        """Of a first query; the last ones are kept for the next provider."""
        kind = parse_selection(selection)[0]
        return functools.lru_cache(1)(lambda q_start: retrieval_inputs(problem, kind, problem.D, q_start=q_start))

    def call(self, name, problem, inputs, mode):
        q_start = first_query(problem, mode)
        q_slc, landmarks = inputs(q_start)
        return torch.no_grad()(lambda: self.run(name, q_slc, landmarks, problem, q_start))

    def work(self, name, problem, mode):
        p, q_start = problem, first_query(problem, mode)
        scores = scored_chunks(p) - scored_chunks(cases.at_length(p, q_start))
        queries = p.T - q_start
        rows = p.B * p.H * ((queries + p.N) * p.D * p.itemsize + queries * p.K * 8)
        # float32 scores and the mask of the future
        held = 5 * p.B * p.H * queries * p.N if name == "materialise" else 0
        note = f"queries {q_start} to {p.T} of {p.T} only" if q_start else ""
        return Work(2 * p.B * p.H * p.D * scores, rows, held, note)
