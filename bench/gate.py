"""Accuracy against float64: what lets a provider into a benchmark, and the table of `hsa-tl check` and the demo."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from hsa_tl import api
from hsa_tl.accuracy import Expected, complaints, expect
from hsa_tl.bench.providers import HSA, RETRIEVAL, Provider
from hsa_tl.oracle import attention_oracle, expect_attention
from hsa_tl.testing import check_retrieval

Tensors = Mapping[str, torch.Tensor]


class Accuracy(NamedTuple):
    quantity: str
    max_error: float  # max |actual - high| / max |high|
    rms_error: float  # RMS of actual - high over the RMS of high
    message: str  # what is wrong by the rule of `hsa_tl.accuracy`, "" if nothing

    @property
    def ok(self) -> bool:
        return not self.message


def _gradients(p: Provider, function, tensors: Tensors, chunk_size: int) -> dict[str, torch.Tensor]:
    leaves = {n: tensors[n].detach().requires_grad_() for n in p.leaves}
    out = function(**{n: leaves.get(n, tensors[n]) for n in p.uses}, chunk_size=chunk_size)
    if not leaves:
        return {"out": out}
    gradients = torch.autograd.grad(out, list(leaves.values()), p.incoming(tensors).to(out.dtype))
    return {"out": out.detach()} | dict(zip((f"d{n}" for n in leaves), gradients, strict=True))


def expected(p: Provider, tensors: Tensors, chunk_size: int) -> dict[str, Expected]:
    """What any implementation of p's equations is held against for these inputs."""
    if p.oracle is attention_oracle:
        return expect_attention(*(tensors[n] for n in (*HSA, "do")), chunk_size=chunk_size)
    kept = tensors["q" if "q" in p.uses else "weights"].dtype

    def oracle(*values):
        return _gradients(p, p.oracle, dict(zip(tensors, values, strict=True)), chunk_size)

    return expect(oracle, *tensors.values(), dtype=kept, out=tensors["q"].dtype)


def selection_complaint(tensors: Tensors, chunk_size: int) -> str | None:
    """What is wrong with what `retrieve_chunks` chooses for the inputs, and with "own" in them; None if nothing."""
    q_slc, landmarks, own = (tensors[n] for n in RETRIEVAL)
    scores, indices = api.retrieve_chunks(q_slc, landmarks, own.shape[3], chunk_size=chunk_size)
    if not torch.equal(indices, own):
        return "the selection differs from call to call"
    return next(iter(check_retrieval(scores, indices, q_slc, landmarks, chunk_size=chunk_size)), None)


def compare(p: Provider, tensors: Tensors, chunk_size: int, want: dict[str, Expected]) -> list[Accuracy]:
    """Errors of out and every gradient relative to float64, each judged by the rule of `hsa_tl.accuracy`."""
    rows = []
    for name, value in _gradients(p, p.attention, tensors, chunk_size).items():
        high = want[name].value
        difference = value.double() - high
        least = torch.finfo(torch.float64).tiny
        largest, rms = (float(m(difference) / m(high).clamp(min=least)) for m in (_largest, torch.linalg.norm))
        rows.append(Accuracy(name, largest, rms, "; ".join(complaints(name, value, want[name]))))
    return rows


def _largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max()
