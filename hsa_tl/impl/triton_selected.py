"""Launchers of the Triton kernels with one softmax over the chosen chunks: those of `triton` without weights."""

from __future__ import annotations

import math

import torch

from hsa_tl import fusion
from hsa_tl.impl import triton as base
from hsa_tl.impl import triton_decode
from hsa_tl.impl.triton_kernels import dq_kernel, forward_kernel
from hsa_tl.impl.triton_launch import launch

FORWARD_NEEDS_PAIRS = False


def unavailable(problem) -> str | None:
    """Why this implementation cannot run `problem` here; None if it can."""
    return base.unavailable(problem) or triton_decode.unavailable(problem)


def forward(q, k, v, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] and lse [B, T, HQ]."""
    B, T, HQ, _ = q.shape
    N, H = k.shape[1], k.shape[3]
    q, k, v, indices = (x.contiguous() for x in (q, k, v, indices))
    out, lse = torch.empty_like(q), q.new_empty(B, T, HQ, dtype=torch.float32)
    if q.numel():
        constants, _ = base._setup(forward_kernel, q, k, None, indices, config)
        scale_log2 = scale * math.log2(math.e)
        launch(forward_kernel, (T, H, B), q, k, v, None, indices, chunk_len, out, lse, T, N, scale_log2, **constants)
    return out, lse


def backward(do, dlse, q, k, v, indices, out, lse, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv). Always deterministic."""
    B, T, _, _ = q.shape
    N, H = k.shape[1], k.shape[3]
    if not q.numel():
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    do, dlse, q, k, v, indices = (x.contiguous() for x in (do, dlse, q, k, v, indices))
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    constants, _ = base._setup(dq_kernel, q, k, None, indices, config)
    launch(
        dq_kernel, (T, H, B), do, q, k, v, None, indices, chunk_len, out, lse, dlse, delta, dq, None, T, N, scale,
        scale * math.log2(math.e), **constants,
    )  # fmt: skip
    return dq, *base.gradients_of_chunks(do, q, k, v, None, indices, chunk_len, lse, delta, pairs, scale, config)


def decode(q, k_pages, v_pages, indices, page_table, scale):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    out, lse = triton_decode.decode_ranges(q, k_pages, v_pages, None, indices, page_table, scale)
    if out.shape[3] > 1:
        weights = fusion.softmax(lse.movedim(3, -1)).movedim(-1, 3)
        out, lse = (out * weights[..., None]).sum(3), lse.logsumexp(3)
    return out.to(q.dtype).view(q.shape), lse.view(q.shape[:3])
