"""The decode kernel in Triton and its launcher. CPU tensors run under Triton's interpreter.

One program owns a token, a key/value head and one of `splits` ranges of its K slots; the ranges' outputs add up. Where
weights is None one softmax runs over all slots of a range, and the ranges are merged by their lse.
"""

from __future__ import annotations

import math

import torch

from hsa_tl.impl import triton as base
from hsa_tl.impl.triton_kernels import add_tile, finish, tl
from hsa_tl.impl.triton_launch import launch


def decode_kernel(
    q, k, v, weights, indices, page_table, out, lse, T, N, P, splits, scale_log2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b.to(tl.int64) * T + i_t) * H + i_h
    heads = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)

    q_at = heads[:, None] * D + cols[None, :]
    kv_at = tl.arange(0, S)[:, None] * (H * D) + cols[None, :]
    indices += row * K
    if weights is not None:
        weights += row * (G * K if PER_HEAD else K)
    else:
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.full([ROWS], 0.0, tl.float32)
    page_table += i_b.to(tl.int64) * N
    k += i_h * D
    v += i_h * D
    q_mask = (heads < G)[:, None] & (cols < D)[None, :]
    q_tile = tl.load(q + row * (G * D) + q_at, mask=q_mask, other=0.0)  # [ROWS, D]
    acc_o = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)

    # The next page is looked up one slot ahead, or Triton would spend the pipeline stages on it.
    chunk = tl.load(indices + i_split * SLOTS, mask=i_split * SLOTS < K, other=-1)
    ahead = tl.load(page_table + chunk, mask=(chunk >= 0) & (chunk < N), other=-1)
    for slot in range(i_split * SLOTS, i_split * SLOTS + SLOTS):
        page = ahead
        valid = (page >= 0) & (page < P)
        chunk = tl.load(indices + (slot + 1), mask=slot + 1 < K, other=-1)
        ahead = tl.load(page_table + chunk, mask=(chunk >= 0) & (chunk < N), other=-1)
        if PER_HEAD:
            w = tl.load(weights + heads * K + slot, mask=heads < tl.where(valid, G, 0), other=0.0)
        elif weights is not None:
            w = tl.load(weights + slot, mask=valid, other=0.0)
        # An empty slot reads zeros: a branch here would stop the loads from being pipelined.
        tile = tl.where(valid, page, 0).to(tl.int64) * (S * H * D)
        kv_mask = (cols < tl.where(valid, D, 0))[None, :]
        k_tile = tl.load(k + tile + kv_at, mask=kv_mask, other=0.0)  # [S, D]
        v_tile = tl.load(v + tile + kv_at, mask=kv_mask, other=0.0)

        acc_s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2  # [ROWS, S]
        if weights is None:
            acc_s = tl.where(valid, acc_s, float("-inf"))
            row_max, row_sum, acc_o = add_tile(acc_s, v_tile, row_max, row_sum, acc_o)
        else:
            p = tl.exp2(acc_s - tl.reduce(acc_s, 1, tl.standard._elementwise_max)[:, None])
            row_sum = tl.reduce(p, 1, tl.standard._sum_combine)
            acc_o += tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee") * (w / row_sum)[:, None]

    at = row * splits + i_split
    if weights is None:
        acc_o, row_lse = finish(row_max, row_sum, acc_o)
        tl.store(lse + at * G + heads, row_lse, mask=heads < G)
    tl.store(out + at * (G * D) + q_at, acc_o.to(out.dtype.element_ty), mask=q_mask)


def unavailable(problem) -> str | None:
    """Why this implementation cannot run `problem` here; None if it can."""
    return base.unavailable(problem, (decode_kernel,))


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
    if q.numel():
        constants, _ = base._setup(decode_kernel, q, k_pages[None], weights, indices, "")
        del constants["BLOCK_K"]
        launch(
            decode_kernel, (T * splits, H, B), q, k_pages, v_pages, weights, indices, page_table, out, lse, T,
            page_table.shape[1], P, splits, scale * math.log2(math.e), SLOTS=-(-K // splits), **constants,
        )  # fmt: skip
    return out, lse
