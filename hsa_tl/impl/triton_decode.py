"""Launchers of the Triton forward kernel over pages. CPU tensors run under Triton's interpreter.

One program owns a token, a key/value head and one of `splits` ranges of its K slots; the ranges' outputs add up. Where
weights is None one softmax runs over all slots of a range, and the ranges are merged by their lse.
"""

from __future__ import annotations

import math

import torch

from hsa_tl.impl import triton as base
from hsa_tl.impl.triton_kernels import forward_kernel
from hsa_tl.impl.triton_launch import launch


def unavailable(problem) -> str | None:
    """Why this implementation cannot run `problem` here; None if it can."""
    return base.unavailable(problem, (forward_kernel,))


def default_splits(device: torch.device, programs: int, K: int) -> int:
    """Ranges of slots, a power of two: enough for two programs on each multiprocessor."""
    wanted = 2 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while 2 * splits <= K and splits * programs < wanted:
        splits *= 2
    return splits


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    out, _ = decode_ranges(q, k_pages, v_pages, weights.contiguous(), indices, page_table, scale)
    return (out if out.shape[3] == 1 else out.sum(3)).to(q.dtype).view(q.shape)


def decode_ranges(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, H, ranges, G, D] of each range of slots, in q's dtype if there is one, and, without weights, lse."""
    q, k_pages, v_pages, indices, page_table = (x.contiguous() for x in (q, k_pages, v_pages, indices, page_table))
    B, T, HQ, D = q.shape
    P, _, H, _ = k_pages.shape
    K, G = indices.shape[3], HQ // H
    splits = default_splits(q.device, B * T * H, K)
    out = q.new_empty(B, T, H, splits, G, D, dtype=q.dtype if splits == 1 else torch.float32)
    lse = None if weights is not None else q.new_empty(out.shape[:-1], dtype=torch.float32)
    constants, _ = base._setup(forward_kernel, q, k_pages[None], weights, indices, "")
    constants["SLOTS"] = -(-K // splits)
    launch(
        forward_kernel, (T * splits, H, B), q, k_pages, v_pages, weights, indices, page_table, None, out, lse, T,
        page_table.shape[1], P, splits, scale * math.log2(math.e), **constants,
    )  # fmt: skip
    return out, lse
