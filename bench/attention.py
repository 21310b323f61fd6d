"""`hsa-tl bench forward | backward | train`: HSA's attention, its retrieval and both, beside dense attention."""

import functools
from pathlib import Path
from typing import ClassVar

import torch

from hsa_tl import api, cases
from hsa_tl.bench.providers import D_R, DEFAULT_PROVIDERS, PROVIDERS, provider, selection_complaints
from hsa_tl.bench.selections import load_selection
from hsa_tl.bench.suite import Suite, Work, parse_selection
from hsa_tl.problem import Problem
from hsa_tl.testing import Inputs, make_inputs
from hsa_tl.text import Corpus, read_corpus, text_features, text_inputs

GATE_LENGTH = 256  # tokens; TileLang's CPU target and Triton's interpreter take seconds for it
DIRECTIONS = {"forward": ("forward",), "backward": ("backward",), "train": ("forward", "backward")}


def selection_inputs(problem: Problem, selection: str, corpus: Corpus | None = None) -> Inputs:
    """Inputs on the problem's device with a selection that `parse_selection` knows; "text" is of corpus."""
    kind, overlap = parse_selection(selection)
    if kind == "text":
        return text_inputs(problem, corpus).to(problem.device_type)
    if kind == "trained":
        chosen = load_selection(Path(selection.partition("=")[2]), problem)
        return make_inputs(problem, indices=chosen).to(problem.device_type)
    return make_inputs(problem, kind=kind, overlap=overlap).to(problem.device_type)


def retrieval_inputs(
    p: Problem, kind: str, D_r: int, *, q_start: int = 0, integers: bool = False, corpus: Corpus | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of the tokens from q_start on, landmarks of all; normal, of text, or small whole numbers with ties."""
    if kind == "text":
        data = corpus.data if corpus else read_corpus(at_least=p.T).data
        features = text_features(data, p, retrieval_dim=D_r)
        q_slc, landmarks = (x.to(device=p.device_type, dtype=p.dtype) for x in features[:2])
        return q_slc[:, q_start:], landmarks
    options = {"generator": torch.Generator(p.device_type).manual_seed(1), "device": p.device_type, "dtype": p.dtype}
    shapes = ((p.B, tokens, p.H, D_r) for tokens in (p.T - q_start, p.N))
    return tuple(torch.randint(-2, 3, s, **options) if integers else torch.randn(s, **options) for s in shapes)


def scored_chunks(p: Problem) -> int:
    """(token, chunk) products of the landmarks' scores, of one head: whole chunks in the past."""
    full, tail = divmod(p.T, p.S)
    return p.S * full * (full - 1) // 2 + tail * full


def flops_of(kernel: str, problem: Problem, direction: str) -> int:
    """FLOPs of what the kernel computes, in one direction."""
    p = problem
    if kernel == "dense_attention":
        return p.dense_flops(direction)
    # Every score of the forward; the backward goes over the chosen chunks, for the queries and for the landmarks.
    products = p.B * p.H * scored_chunks(p) if direction == "forward" else 2 * p.pairs
    retrieval = 2 * D_R * products
    if kernel == "retrieval":
        return retrieval
    return p.flops(direction) + (retrieval if kernel == "hsa_with_retrieval" else 0)


class Attention(Suite):
    """corpus: the text of selection "text", by default Python's standard library."""

    name = "attention"
    providers: ClassVar = {p.name: p.kernel for p in PROVIDERS.values()}
    defaults: ClassVar = DEFAULT_PROVIDERS
    modes = tuple(DIRECTIONS)
    default_modes = ("forward", "train")
    selections = ("random", "overlap", "full", "text", "trained")
    cpu_lengths, cuda_lengths = "1k..16k", "4k..128k"

    def __init__(self, corpus: Corpus | None = None):
        self.corpus = corpus
        self.gate_tensors = functools.cache(lambda problem: self.inputs(problem, "random"))
        self.expected: dict[tuple, dict] = {}

    def unavailable(self, name, problem, mode):
        p = provider(name)
        reason = p.unavailable(problem)
        return "it has no backward" if reason is None and mode != "forward" and not p.backward else reason

    def does(self, name, mode, selection):
        """What retrieves for itself has its own selection: of random vectors, or of text."""
        return "own" not in provider(name).uses or selection in ("random", "text")

    def gate_problem(self, problem):
        return cases.at_length(problem, GATE_LENGTH - (problem.S // 2 if problem.masked else 0))

    def gate(self, name, problem):
        p, tensors = provider(name), self.gate_tensors(problem)
        if "own" in p.uses and (wrong := selection_complaints(tensors, problem.S)):
            return wrong
        key = (problem, p.oracle, p.leaves)
        if key not in self.expected:
            self.expected[key] = p.expected(tensors, problem.S)
        results = p.compare(tensors, problem.S, self.expected[key])
        return [r.message for r in results if r.message]

    def inputs(self, problem: Problem, selection: str) -> dict[str, torch.Tensor]:
        """Arguments of `hsa_attention` by name, do and dweights, and q_slc and landmarks with their own selection."""
        p, tensors = problem, selection_inputs(problem, selection, self.corpus)._asdict()
        q_slc, landmarks = retrieval_inputs(p, parse_selection(selection)[0], D_R, corpus=self.corpus)
        _, own = api.retrieve_chunks(q_slc, landmarks, p.K, chunk_size=p.S)
        g = torch.Generator().manual_seed(1)
        dweights = torch.randn(p.B, p.T, p.H, p.K, generator=g).to(p.device_type, tensors["weights"].dtype)
        return tensors | {"q_slc": q_slc, "landmarks": landmarks, "own": own, "dweights": dweights}

    def call(self, name, problem, inputs, mode):
        p = provider(name)
        tensors, attend = {n: inputs[n] for n in p.uses}, functools.partial(p.attention, chunk_size=problem.S)
        if mode == "forward":
            return torch.no_grad()(lambda: attend(**tensors))
        leaves = {n: tensors[n].detach().requires_grad_() for n in p.leaves}
        wanted, incoming = list(leaves.values()), p.incoming(inputs)
        tensors |= leaves
        if mode == "train":
            return lambda: torch.autograd.grad(attend(**tensors), wanted, incoming)
        out = attend(**tensors)
        return lambda: torch.autograd.grad(out, wanted, incoming, retain_graph=True)

    def work(self, name, problem, mode):
        p, t = provider(name), problem
        item, rows = t.itemsize, t.B * t.T
        size = {
            "q": rows * t.HQ * t.D * item, "k": rows * t.H * t.D * item, "v": rows * t.H * t.D * item,
            "weights": 4 * rows * (t.HQ if t.per_head else t.H) * t.K, "indices": 4 * rows * t.H * t.K, "own": 0,
            "q_slc": rows * t.H * D_R * item, "landmarks": t.B * t.N * t.H * D_R * item,
        }  # fmt: skip
        forward = sum(size[n] for n in p.uses) + size["q" if "q" in p.uses else "indices"]  # and the output
        moved = {"forward": forward, "backward": forward + sum(size[n] for n in p.leaves)}
        held = 12 * t.B * t.HQ * t.T**2 if name == "dense-math" else 0  # float32 scores, their softmax, a copy
        flops = sum(flops_of(p.kernel, t, d) for d in DIRECTIONS[mode])
        return Work(flops, sum(moved[d] for d in DIRECTIONS[mode]), held, p.note)
