"""Inputs, selections and the check of an attention's results, shared by tests, benchmarks and the tuner."""

from typing import NamedTuple

import torch

from hsa_tl import fusion
from hsa_tl.accuracy import LARGEST, Expected, complaints
from hsa_tl.oracle import expect_attention, expect_scores, expect_selected, retrieve_oracle
from hsa_tl.problem import Problem

SELECTIONS = ("random", "overlap", "full")


class Inputs(NamedTuple):
    """Arguments of `hsa_attention` and an incoming gradient."""

    RESULTS = "out", "dq", "dk", "dv", "dweights"  # by name: outputs, then gradients

    q: torch.Tensor  # [B, T, HQ, D]
    k: torch.Tensor  # [B, T, H, D]
    v: torch.Tensor  # [B, T, H, D]
    weights: torch.Tensor  # [B, T, H or HQ, K] float32
    indices: torch.Tensor  # [B, T, H, K] int32
    do: torch.Tensor  # [B, T, HQ, D]

    def to(self, *args, **kwargs) -> "Inputs":
        return Inputs(*(x.to(*args, **kwargs) for x in self))


class SelectedInputs(NamedTuple):
    """Arguments of `selected_attention` and its incoming gradients."""

    RESULTS = "out", "lse", "dq", "dk", "dv"

    q: torch.Tensor  # [B, T, HQ, D]
    k: torch.Tensor  # [B, T, H, D]
    v: torch.Tensor  # [B, T, H, D]
    indices: torch.Tensor  # [B, T, H, K] int32
    do: torch.Tensor  # [B, T, HQ, D]
    dlse: torch.Tensor  # [B, T, HQ] float32

    @classmethod
    def of(cls, call: Inputs) -> "SelectedInputs":
        """The same call of `selected_attention`; dlse is a normal number for each row."""
        dlse = torch.randn(call.q.shape[:3], generator=torch.Generator().manual_seed(call.indices.numel()))
        dlse = dlse.to(call.q.device, torch.promote_types(torch.float32, call.q.dtype))
        return cls(call.q, call.k, call.v, call.indices, call.do, dlse)


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
    if kind == "full":
        visible = torch.arange(T)[:, None, None] // S
        chosen = (visible - K).clamp(min=0) + torch.arange(K)
        return torch.where(chosen < visible, chosen, -1).int().repeat(B, 1, H, 1)
    g = torch.Generator().manual_seed(seed)
    N = max(1, -(-T // S))
    out = torch.empty(B, H, T, K, dtype=torch.int32)
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


def run_with_gradients(attention, inputs: Inputs | SelectedInputs, **options) -> dict[str, torch.Tensor]:
    """The results by name of `attention(q, k, v, [weights,] indices, **options)` for the incoming gradients."""
    at = inputs._fields.index("indices")
    leaves = [x.detach().requires_grad_() for x in inputs[:at]]
    outputs = attention(*leaves, inputs.indices, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, inputs[at + 1 :])
    return dict(zip(inputs.RESULTS, (*(x.detach() for x in outputs), *gradients), strict=True))


def check_attention(
    results: dict[str, torch.Tensor],
    inputs: Inputs | SelectedInputs,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> list[str]:
    """Complaints about results of `hsa_attention` or `selected_attention`, by the rule of `hsa_tl.accuracy`.

    Args:
        results: any of `inputs.RESULTS` by name: out, dq, dk, dv and dweights, or out, lse, dq, dk and dv.
        inputs: what they are the results of; their type says how accurate they must be.
        chunk_size, scale, cu_seqlens: as the attention was called.

    Returns:
        What is wrong, a line each; [] if all are as accurate as their arithmetic allows.

    Raises:
        ValueError: a result of another name.
    """
    if unknown := results.keys() - set(inputs.RESULTS):
        raise ValueError(f"results must be among {', '.join(inputs.RESULTS)}, got {sorted(unknown)}")
    expect = expect_selected if isinstance(inputs, SelectedInputs) else expect_attention
    at = inputs._fields.index("do") if results.keys() <= {"out", "lse"} else len(inputs)
    expected = expect(*inputs[:at], chunk_size=chunk_size, scale=scale, cu_seqlens=cu_seqlens)
    return [line for name, x in results.items() for line in complaints(name, x, expected[name])]


def assert_attention(results: dict[str, torch.Tensor], inputs: Inputs | SelectedInputs, **options) -> None:
    """AssertionError with what `check_attention` finds, if anything."""
    if found := check_attention(results, inputs, **options):
        raise AssertionError("; ".join(found))


def check_retrieval(
    scores: torch.Tensor,
    indices: torch.Tensor,
    q_slc: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    ties: bool = True,
    **options,
) -> list[str]:
    """Complaints about results of `retrieve_chunks`: its selection beside the oracle's, and its scores' accuracy.

    Args:
        scores, indices: what is checked, [B, T, R, K].
        q_slc, landmarks: what was scored, [B, T, R, D_r] and [B, N, R, D_r].
        ties: whether slots must ascend and the lower of two equal chunks must win.
        options: chunk_size, q_start, exclude_window, scale, recency and recency_span, as `retrieve_chunks` was called.

    Returns:
        What is wrong, a line each; [] if each token chose the best chunks, but for what rounding may swap.
    """
    every, visible = expect_scores(q_slc, landmarks, **options)
    K, none = indices.shape[3], torch.iinfo(torch.int32).max
    indices, scores = (x.detach().to(every.value.device) for x in (indices, scores))
    empty = indices < 0
    if (indices >= visible.shape[3]).any() or not torch.equal((~empty).sum(-1), visible.sum(-1).clamp(max=K)):
        return ["indices: not as many chunks as are visible and wanted"]
    if empty.all():
        none = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        return complaints("scores", scores, Expected(none, torch.zeros_like(none), every.eps))
    at = indices.clamp(min=0).long()
    if not visible.gather(3, at)[~empty].all():
        return ["indices: a chunk that its token may not see"]
    slots = torch.where(empty, none, indices)
    ordered = slots.sort(-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < none)).any():
        return ["indices: a chunk twice in a row"]
    best, wanted = retrieve_oracle(q_slc.double(), landmarks.double(), K, **options)
    best = best.masked_fill(wanted < 0, torch.inf)
    chosen, unit = (x.gather(3, at).masked_fill(empty, torch.inf) for x in (every.value, every.unit))
    worst = every.unit.masked_fill(~visible, 0.0).amax(-1, keepdim=True)
    if (low := chosen < best.amin(-1, keepdim=True) - LARGEST * (unit + worst)).any():
        b, t, r, k = low.nonzero()[0].tolist()
        return [
            f"indices: token {t} of batch {b}, head {r}, chose chunk {int(indices[b, t, r, k])} before a better one"
        ]
    exact = (chosen.sort(-1).values == best.sort(-1).values).all(-1)
    if ties and (not torch.equal(slots, ordered) or not torch.equal(indices[exact].int(), wanted[exact])):
        return ["indices: a tie is not won by the lower chunk, or slots do not ascend"]
    return complaints("scores", scores, Expected(chosen.masked_fill(empty, -torch.inf), unit, every.eps))
