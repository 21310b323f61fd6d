"""Accuracy against float64: what lets a provider into a benchmark, and the table of `hsa-tl check` and the demo."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from hsa_tl.bench.providers import Provider
from hsa_tl.testing import assert_as_accurate_as

BASELINE_SLACK = 8.0
QUANTITIES = ("out", "dq", "dk", "dv", "dweights")


class Accuracy(NamedTuple):
    quantity: str
    max_error: float  # max |actual - high| / max |high|
    rms_error: float  # RMS of actual - high over the RMS of high
    message: str  # "" if as accurate as the eager equations in the same dtype

    @property
    def ok(self) -> bool:
        return not self.message


class Expected(NamedTuple):
    """The oracle's out and gradients in the inputs' dtype and in float64."""

    low: dict[str, torch.Tensor]
    high: dict[str, torch.Tensor]


def _gradients(p: Provider, function, tensors: Mapping[str, torch.Tensor], chunk_size: int) -> dict[str, torch.Tensor]:
    leaves = {n: tensors[n].detach().requires_grad_() for n in p.leaves}
    out = function(**{n: leaves.get(n, tensors[n]) for n in p.uses}, chunk_size=chunk_size)
    if not leaves:
        return {"out": out}
    gradients = torch.autograd.grad(out, list(leaves.values()), p.incoming(tensors).to(out.dtype))
    return {"out": out.detach()} | dict(zip((f"d{n}" for n in leaves), gradients, strict=True))


def expected(p: Provider, tensors: Mapping[str, torch.Tensor], chunk_size: int) -> Expected:
    """What any implementation of p's equations is held against for these inputs."""
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    return Expected(*(_gradients(p, p.oracle, x, chunk_size) for x in (tensors, doubles)))


def compare(p: Provider, tensors: Mapping[str, torch.Tensor], chunk_size: int, want: Expected) -> list[Accuracy]:
    """Errors of out and every gradient relative to float64, each judged by `assert_as_accurate_as`.

    Others' code has to compute the same thing: its RMS error is up to BASELINE_SLACK times the eager one.
    """
    got, rows = _gradients(p, p.attention, tensors, chunk_size), []
    for name, value in got.items():
        low, high = want.low[name], want.high[name]
        norm = high.norm().clamp(min=torch.finfo(torch.float64).tiny)
        difference = value.double() - high
        rms_error, message = float(difference.norm() / norm), ""
        if p.ours:
            try:
                assert_as_accurate_as(name, value, low, high)
            except AssertionError as error:
                message = str(error)
        else:
            bound = BASELINE_SLACK * (float((low.double() - high).norm() / norm) + torch.finfo(low.dtype).eps)
            if not rms_error <= bound:
                message = f"{name}: relative RMS error {rms_error:.3e} above {bound:.3e}"
        largest = high.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(Accuracy(name, float(difference.abs().max() / largest), rms_error, message))
    return rows
