"""The one accuracy rule: a result's error, counted in the rounding that a correct program may leave.

Beside a value in float64 stands its unit: what rounding does to it where every rounding is by one eps. Roundings are
independent, so a unit adds the squares of what each does; eps is that of the type in which a number is kept, float32
for sums, scores and softmax. A count is error / unit. The bounds, the same for every program, backend and test:

largest  A rounding moves a number by at most eps / 2, evenly spread: a standard deviation of eps / sqrt(12) = 0.29.
         LARGEST = 2 is seven of them, which one of 1e12 elements exceeds. Where all roundings agree instead of being
         independent, n stages that each weigh alike give sqrt(n) / 2: below 2 up to 16 stages, of which there are six.
RMS      0.29 where they are independent. RMS = 0.5 also holds where one stage's all agree (equal probabilities round
         alike: eps / 2 of the value). Of n elements the RMS is that of a sample: 1 / sqrt(2 n) of it, times six.
scale    An error in proportion to the value, <error, value> / <value, value>, is the sum of many: rounding leaves
         next to nothing, except what one stage's agreement leaves, half an eps, and half of float32's own unit
         (a constant like log2(e) is rounded once for all). So 1 % is told apart from bfloat16's eps of 0.8 %.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

LARGEST, RMS, AGREEMENT, DEVIATIONS = 2.0, 0.5, 0.5, 6.0
DEVIATION = 1 / math.sqrt(12)  # of a rounding, in eps


@dataclass(frozen=True)
class Expected:
    """A result in float64 and the unit in which the error of each of its elements is counted."""

    value: torch.Tensor
    unit: torch.Tensor
    eps: float  # of the type that the result's terms are kept in

    def __getitem__(self, at) -> "Expected":
        return Expected(self.value[at], self.unit[at], self.eps)


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def least_of(dtype: torch.dtype) -> float:
    """The rounding of a number that is too small for its relative one; float32's may be flushed to zero.

    Float64's is one whose square float64 holds, since units are added as squares.
    """
    info = torch.finfo(dtype)
    return max(info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0), 1e-140)


def complaints(name: str, actual: torch.Tensor, expected: Expected) -> list[str]:
    """What is wrong with a result: [] if it is as accurate as its arithmetic allows.

    Args:
        name: what the complaints call it.
        actual: of any float type, on any device.
        expected: its value and unit, of the same shape.
    """
    value, unit, eps = expected.value, expected.unit, expected.eps
    if actual.shape != value.shape:
        return [f"{name}: shape {list(actual.shape)}, expected {list(value.shape)}"]
    limit = torch.finfo(actual.dtype).max
    eps = max(eps, eps_of(actual.dtype))
    actual, value, unit = (x.detach().double().cpu() for x in (actual, value, unit))
    # Beyond the type's range a result is inf; at its edge either.
    over = value.abs() > limit * (1 - 4 * eps)
    value = torch.where(over & actual.isinf() & (actual.sign() == value.sign()), actual, value)
    value = torch.where((value.abs() > limit * (1 + 4 * eps)) & value.isfinite(), value.sign() * math.inf, value)
    for kind, mask in (("nan", torch.isnan), ("inf", torch.isinf)):
        differ = mask(actual) != mask(value)
        if differ.any():
            return [f"{name}: {kind} at {differ.nonzero()[0].tolist()} differs from the oracle"]
    if (torch.isinf(value) & (actual != value)).any():
        return [f"{name}: inf of the wrong sign"]
    judged = torch.isfinite(value) & torch.isfinite(unit)
    if not judged.any():
        return []
    error = torch.where(judged, actual - value, 0.0)
    unit, value = torch.where(judged, unit, 0.0), torch.where(judged, value, 0.0)
    if (stray := (unit == 0) & (error != 0)).any():
        return [f"{name}: {actual[stray][0]:.3g} at {stray.nonzero()[0].tolist()} where {value[stray][0]:.3g} is exact"]
    count = torch.where(unit > 0, error / unit, 0.0).abs()
    found, n = [], int((unit > 0).sum())
    if n == 0:
        return []
    if not (largest := float(count.max())) <= LARGEST:
        at = (count == count.max()).nonzero()[0].tolist()
        found.append(f"{name}: largest error {largest:.3g} roundings at {at}, above {LARGEST}")
    bound = RMS * (1 + DEVIATIONS / math.sqrt(2 * n))
    if not (rms := float(count.square().sum().div(n).sqrt())) <= bound:
        found.append(f"{name}: RMS error {rms:.3g} roundings, above {bound:.3g}")
    if message := _scale_complaint(name, error, value, unit, eps):
        found.append(message)
    return found


def _scale_complaint(name, error, value, unit, eps) -> str | None:
    """Rows, along the last dim, are independent; within a row roundings may agree, so |row| bounds what they do."""
    size = float(value.square().sum())
    if size == 0:
        return None
    rows = [x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in (value, unit)]
    value_rows, unit_rows = (torch.linalg.vector_norm(x, dim=-1) for x in rows)
    noise = DEVIATIONS * DEVIATION * float((value_rows * unit_rows).square().sum().sqrt()) / size
    exact = eps_of(torch.float32) / eps  # float32's share of the unit, where that is not the type itself
    bound = AGREEMENT * (eps + exact * float((value.abs() * unit).sum()) / size) + noise
    scale = float((error * value).sum()) / size
    if abs(scale) <= bound:
        return None
    return f"{name}: {1 + scale:.6g} times what it must be, further from 1 than {bound:.3g}"


def assert_accurate(name: str, actual: torch.Tensor, expected: Expected) -> None:
    """AssertionError with the complaints, if there are any."""
    if found := complaints(name, actual, expected):
        raise AssertionError("; ".join(found))


class Rounding(TorchDispatchMode):
    """Moves every operation's float64 result at random by up to two eps of it (Monte Carlo arithmetic).

    A product of matrices is off by sqrt(n) eps of the root of its n terms' squares; another sum and a softmax also by
    eps of the root mean square of the result's last dim. An attention, ours or PyTorch's, hides its sums: what it is
    given moves too. What only moves numbers is exact.
    """

    SUMS = ("sum", "mean", "norm", "softmax", "dot_product", "backward", "_add", "conv", "lerp")  # in an aten name

    def __init__(self, eps: float, seed: int):
        super().__init__()
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)

    def _uniform(self, like, middle=0.0):
        """Numbers within two eps of the middle."""
        random = torch.empty(like.shape, dtype=torch.float64)
        random.uniform_(middle - 2 * self.eps, middle + 2 * self.eps, generator=self.generator)
        return random.to(like.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        hides = space != "aten" or "dot_product" in name
        if hides:
            args = tree_map_only(torch.Tensor, lambda x: x * self._uniform(x, 1.0) if _is_double(x) else x, args)
        out = func(*args, **(kwargs or {}))
        returned = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(not a.is_write for a in returned):  # a view
            return out
        terms = None
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            terms = (a.square() @ b.square()).mul_(a.shape[-1]).sqrt_() if _is_double(a) else None
        total = hides or any(word in name for word in self.SUMS)
        if terms is None and not total and torch.Tag.pointwise not in func.tags:
            return out

        def move(x):
            if not _is_double(x):
                return x
            if terms is not None:
                moved = terms.mul_(self._uniform(x)).add_(x)
            else:
                moved = x * self._uniform(x, 1.0)
                if total and x.dim():
                    size = x.square().mean(-1, keepdim=True).sqrt_().nan_to_num_(0.0, 0.0, 0.0)
                    # An attention's exponentials err by up to 20 units in the last place.
                    size *= 10 if "dot_product" in name else 1
                    moved += self._uniform(x) * size
            return x.copy_(moved) if returned else moved

        return tree_map_only(torch.Tensor, move, out)


def _is_double(x: torch.Tensor) -> bool:
    return x.dtype == torch.float64


SAMPLES = 4


def expect(function, *args, dtype: torch.dtype = torch.float32, out: torch.dtype | None = None):
    """What a function gives in float64, with units from running it again under `Rounding`.

    The unit of an element is a root mean square of how far the samples strayed, half its own and half its row's.

    Args:
        function: of args, to a tensor or a nest of tensors; what it computes with beside args must be float64.
        args: passed on; float tensors in float64, without what they were computed from.
        dtype: the type whose eps every operation is off by.
        out: the type that the results are rounded to in the end, dtype unless given.

    Returns:
        The nest with an `Expected` for each tensor.
    """
    eps = max(eps_of(dtype), eps_of(out or dtype))

    def run():
        doubles = [x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        return tree_map_only(torch.Tensor, lambda x: x.detach(), function(*doubles))

    def judge(value, *moved):
        square = torch.stack([(x - value).square() for x in moved]).mean(0)
        if value.dim():
            square = (square + torch.nan_to_num(square, nan=0.0).mean(-1, keepdim=True)) / 2
        # A number below the type's normal ones is rounded to a fixed step; an exact 0 stays exact.
        last = (eps_of(out or dtype) * value).abs().clamp(min=least_of(out or dtype)).masked_fill(value == 0, 0.0) ** 2
        return Expected(value, (square / DEVIATION**2 + last).sqrt(), eps)

    value, samples = run(), []
    for seed in range(SAMPLES):
        with Rounding(eps_of(dtype), seed):
            samples.append(run())
    return tree_map(judge, value, *samples)
