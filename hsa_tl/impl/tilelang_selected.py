"""Launchers of the TileLang programs of one softmax over the chosen chunks: on Hopper, and on the CPU (float32)."""

from dataclasses import replace

import torch

from hsa_tl.impl import tilelang as launchers
from hsa_tl.impl.tilelang import Call
from hsa_tl.impl.tilelang_decode import split_and_combine
from hsa_tl.problem import Problem, power_of_two

MOST_ELEMENTS = 64 * 128  # of a chunk's keys, whose gradients the backward keeps in registers


def parts(problem: Problem) -> int:
    """Into how many a chunk is split for the backward: one softmax does not mind where a chunk ends."""
    return power_of_two(max(1, problem.S * problem.D // MOST_ELEMENTS))


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    n = parts(problem)
    small = replace(problem, N=problem.N * n, S=problem.S // n, K=problem.K * n)
    forward = launchers.unavailable(problem, ("selected_fwd_token",))
    return forward or launchers.unavailable(small, ("selected_bwd_chunk",))


def decode_unavailable(problem: Problem) -> str | None:
    """As `unavailable`, for `selected_decode`, which has no backward."""
    return launchers.unavailable(problem, ("selected_decode_split",))


def forward(q, k, v, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    call = Call.of(q, k, v, None, indices, pairs, chunk_len, scale)
    results = launchers.run_plan("selected_forward", call, config, deterministic)
    return results["out"].flatten(2, 3), results["lse"].flatten(2, 3)


def backward(do, dlse, q, k, v, indices, out, lse, pairs, chunk_len, scale, config="", deterministic=False):
    """dq, dk, dv. See hsa_tl.ops for the arguments."""
    delta = (do.float() * out.float()).sum(-1) - dlse
    shape, n = k.shape, parts(Problem.of(q, k, None, indices, chunk_len))
    if n > 1:
        inside = torch.arange(n, dtype=torch.int32, device=indices.device)
        indices = torch.where(indices[..., None] < 0, -1, indices[..., None] * n + inside).flatten(-2)
        k, v = (x.flatten(1, 2).unflatten(1, (shape[1] * n, shape[2] // n)) for x in (k, v))
        if chunk_len is not None:
            chunk_len = (chunk_len[:, None] - inside * (shape[2] // n)).clamp(0, shape[2] // n).flatten().int()
        pairs = None
    call = Call.of(q, k, v, None, indices, pairs, chunk_len, scale, do, lse, delta)
    results = launchers.run_plan("selected_backward", call, config, deterministic)
    return results["dq"].flatten(2, 3), results["dk"].view(shape), results["dv"].view(shape)


def decode(q, k_pages, v_pages, indices, page_table, scale):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    return split_and_combine("selected_decode", q, k_pages, v_pages, None, indices, page_table, scale)
