"""Launchers of the Triton kernels with one softmax over the chosen chunks: those of `triton` without weights."""

from __future__ import annotations

from hsa_tl import fusion
from hsa_tl.impl import triton as base
from hsa_tl.impl import triton_decode

unavailable = base.unavailable
decode_unavailable = triton_decode.unavailable


def forward(q, k, v, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] and lse [B, T, HQ]."""
    return base.run_forward(q, k, v, None, indices, chunk_len, scale, config)


def backward(do, dlse, q, k, v, indices, out, lse, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv). Always deterministic."""
    return base.backward(do, q, k, v, None, indices, pairs, chunk_len, scale, config, True, out, lse, dlse)[:3]


def decode(q, k_pages, v_pages, indices, page_table, scale):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    out, lse = triton_decode.decode_ranges(q, k_pages, v_pages, None, indices, page_table, scale)
    if out.shape[3] > 1:
        weights = fusion.softmax(lse.movedim(3, -1)).movedim(-1, 3)
        out, lse = (out * weights[..., None]).sum(3), lse.logsumexp(3)
    return out.to(q.dtype).view(q.shape), lse.view(q.shape[:3])
