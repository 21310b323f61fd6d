"""Inputs, selections and the one tolerance helper, shared by tests, benchmarks and the tuner."""

from typing import NamedTuple

import torch

from hsa_tl import fusion
from hsa_tl.problem import Problem

SELECTIONS = ("random", "overlap", "full")


class Inputs(NamedTuple):
    """Arguments of `hsa_attention` and an incoming gradient."""

    q: torch.Tensor  # [B, T, HQ, D]
    k: torch.Tensor  # [B, T, H, D]
    v: torch.Tensor  # [B, T, H, D]
    weights: torch.Tensor  # [B, T, H or HQ, K] float32
    indices: torch.Tensor  # [B, T, H, K] int32
    do: torch.Tensor  # [B, T, HQ, D]

    def to(self, *args, **kwargs) -> "Inputs":
        return Inputs(*(x.to(*args, **kwargs) for x in self))


def _random_rows(visible: torch.Tensor, N: int, K: int, generator: torch.Generator) -> torch.Tensor:
    """For each row, min(K, visible) distinct chunks below visible, ascending, then -1: [rows, K] int64."""
    score = torch.rand(visible.shape[0], N, generator=generator)
    score.masked_fill_(torch.arange(N) >= visible[:, None], -1.0)
    value, best = score.topk(min(K, N), dim=-1)
    chosen = torch.where(value >= 0, best, N).sort(dim=-1).values
    chosen = torch.nn.functional.pad(chosen, (0, K - chosen.shape[-1]), value=N)
    return torch.where(chosen == N, -1, chosen)


def make_selection(
    B: int, T: int, H: int, K: int, S: int, *, kind: str = "random", overlap: float = 0.8, seed: int = 0
) -> torch.Tensor:
    """A causal selection [B, T, H, K] int32: token t chooses min(K, t // S) distinct chunks below t // S, ascending.

    "random": independent for each token. "overlap": a token keeps its predecessor's row with probability `overlap`
    a slot, drawn anew in the other slots. "full": the last K visible chunks, all of them when K covers N.
    """
    if kind not in SELECTIONS:
        raise ValueError(f"kind must be one of {', '.join(SELECTIONS)}, got {kind!r}")
    g = torch.Generator().manual_seed(seed)
    N = max(1, -(-T // S))
    out = torch.empty(B, H, T, K, dtype=torch.int32)
    if kind == "full":
        visible = torch.arange(T)[:, None] // S
        chosen = (visible - K).clamp(min=0) + torch.arange(K)
        out[:] = torch.where(chosen < visible, chosen, -1).int()
        return out.transpose(1, 2).contiguous()
    block = max(1, (1 << 22) // N)
    for b in range(B):
        for h in range(H):
            for start in range(0, T, block):
                visible = torch.arange(start, min(T, start + block)) // S
                out[b, h, start : start + block] = _random_rows(visible, N, K, g).int()
            if kind == "overlap":
                _keep_neighbours(out[b, h], overlap, S, g)
    return out.transpose(1, 2).contiguous()


def _keep_neighbours(rows: torch.Tensor, overlap: float, S: int, g: torch.Generator) -> None:
    """Rewrites rows [T, K] in place: each token keeps a share `overlap` of its predecessor's chunks."""
    T, K = rows.shape
    for t in range(S + 1, T):
        previous, fresh = rows[t - 1], rows[t]
        n = min(K, t // S)
        kept = previous[(torch.rand(K, generator=g) < overlap) & (previous >= 0)]
        new = fresh[(fresh >= 0) & ~torch.isin(fresh, kept)]
        row = torch.cat([kept, new[torch.randperm(len(new), generator=g)]])[:n].sort().values
        rows[t, : len(row)] = row
        rows[t, len(row) :] = -1


def make_inputs(
    problem: Problem, *, kind: str = "random", overlap: float = 0.8, seed: int = 0, indices: torch.Tensor | None = None
) -> Inputs:
    """Normal q, k, v, do in the problem's dtype and softmax weights over a selection, all on the CPU."""
    p = problem
    g = torch.Generator().manual_seed(seed)
    if indices is None:
        indices = make_selection(p.B, p.T, p.H, p.K, p.S, kind=kind, overlap=overlap, seed=seed)
    heads = p.HQ if p.per_head else p.H
    scores = torch.randn(p.B, p.T, heads, p.K, generator=g)
    weights = fusion.softmax(scores.masked_fill(indices.repeat_interleave(heads // p.H, 2) < 0, -torch.inf))
    q, do = (torch.randn(p.B, p.T, p.HQ, p.D, generator=g).to(p.dtype) for _ in range(2))
    k, v = (torch.randn(p.B, p.T, p.H, p.D, generator=g).to(p.dtype) for _ in range(2))
    return Inputs(q, k, v, weights.to(torch.promote_types(torch.float32, p.dtype)), indices, do)


def run_with_gradients(attention, inputs: Inputs, **options) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv, dweights of `attention(q, k, v, weights, indices, **options)` for the gradient inputs.do."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = attention(*leaves, inputs.indices, **options)
    gradients = torch.autograd.grad(out, leaves, inputs.do)
    names = ("out", "dq", "dk", "dv", "dweights")
    return dict(zip(names, (out.detach(), *gradients), strict=True))


def double(inputs: Inputs) -> Inputs:
    """The same values in float64; indices stay."""
    return Inputs(*(x.double() if x.is_floating_point() else x for x in inputs))


def assert_as_accurate_as(name: str, actual: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Asserts that `actual` is as near to the float64 `high` as the eager reference `low` of the same dtype.

    First the masks of inf and nan agree; then the maximal and the RMS error are each at most
    2 * (the error of low + eps * max |high|), eps of actual's dtype.
    """
    if actual.dtype != low.dtype or actual.shape != high.shape:
        raise AssertionError(f"{name}: {actual.dtype} {list(actual.shape)}, expected {low.dtype} {list(high.shape)}")
    actual, low, high = (x.detach().cpu() for x in (actual, low, high))
    eps = torch.finfo(actual.dtype).eps
    finite = torch.isfinite(high)
    for kind, mask in (("nan", torch.isnan), ("inf", torch.isinf)):
        differ = mask(actual) != mask(high)
        if differ.any():
            raise AssertionError(f"{name}: {kind} at {differ.nonzero()[0].tolist()} differs from the reference")
    if not finite.any():
        return
    a, l, h = (x.double()[finite] for x in (actual, low, high))
    floor = eps * float(h.abs().max())
    for kind, measure in (("max", lambda x: float(x.abs().max())), ("RMS", lambda x: float(x.square().mean().sqrt()))):
        error, bound = measure(a - h), 2 * (measure(l - h) + floor)
        if not error <= bound:
            raise AssertionError(f"{name}: {kind} error {error:.3e} above {bound:.3e}, twice the eager reference's")
