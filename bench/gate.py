"""Accuracy against float64: what lets a provider into a benchmark, and the table of `hsa-tl check` and the demo."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from hsa_tl.testing import Inputs, assert_as_accurate_as, double

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


def _gradients(attention: Callable, inputs: Inputs, chunk_size: int) -> dict[str, torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = attention(*leaves, inputs.indices, chunk_size=chunk_size)
    gradients = torch.autograd.grad(out, leaves, inputs.do, allow_unused=True)
    return {n: x.detach() for n, x in zip(QUANTITIES, (out, *gradients), strict=True) if x is not None}


def expected(oracle: Callable, inputs: Inputs, chunk_size: int) -> Expected:
    """What any implementation is held against for these inputs."""
    return Expected(*(_gradients(oracle, x, chunk_size) for x in (inputs, double(inputs))))


def compare(
    attention: Callable, inputs: Inputs, chunk_size: int, want: Expected, *, baseline: bool = False
) -> list[Accuracy]:
    """Errors of out and every gradient relative to float64, each judged by `assert_as_accurate_as`.

    baseline: others' code has to compute the same thing: its RMS error is up to BASELINE_SLACK times the eager one.
    """
    got, rows = _gradients(attention, inputs, chunk_size), []
    for name, high in want.high.items():
        low, norm = want.low[name], high.norm().clamp(min=torch.finfo(torch.float64).tiny)
        difference = got[name].double() - high
        rms_error, message = float(difference.norm() / norm), ""
        if baseline:
            bound = BASELINE_SLACK * (float((low.double() - high).norm() / norm) + torch.finfo(low.dtype).eps)
            if not rms_error <= bound:
                message = f"{name}: relative RMS error {rms_error:.3e} above {bound:.3e}"
        else:
            try:
                assert_as_accurate_as(name, got[name], low, high)
            except AssertionError as error:
                message = str(error)
        largest = high.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(Accuracy(name, float(difference.abs().max() / largest), rms_error, message))
    return rows
