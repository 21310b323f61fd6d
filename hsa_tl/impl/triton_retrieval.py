"""Triton kernels of retrieval: exact streaming top-k, and the landmarks' gradient. CPU tensors run interpreted.

topk_kernel        one program owns ROWS tokens of a retrieval head and keeps their K best so far, in no order, as
                   integer keys: score, then the lower chunk. A tile of landmarks counts its scores above each row's
                   worst, and that often the row's next best takes the place of its worst. Slots leave by chunk.
dlandmarks_kernel  one program owns a chunk and sums the weighted queries of its pairs in a fixed order: no atomics.
"""

from __future__ import annotations

import torch

from hsa_tl.impl import triton_launch
from hsa_tl.impl.triton_launch import launch, tl
from hsa_tl.pairs import Pairs
from hsa_tl.problem import Retrieval, power_of_two
from hsa_tl.retrieval import empty_slots, merge, visible_chunks, visible_in_decode

MAX_TOPK = 128
SPLIT_CHUNKS = 256  # of a program's share in decode, at least

# Plain functions; form() makes the compiled or the interpreted form. Reductions name their combine function because
# tl.max and tl.sum, jitted when triton was imported, cannot be called by the interpreter.


def topk_kernel(
    q_slc, landmarks, visible, scores, indices, T, N, scale,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks first
    i_r = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    t = i_m * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    slots = tl.arange(0, BLOCK_K)

    row = (i_b * T + t) * R + i_r
    mask = (t < T)[:, None] & (cols < D)[None, :]
    q_tile = tl.load(q_slc + row[:, None] * D + cols[None, :], mask=mask, other=0.0)  # [ROWS, D]
    landmarks += (i_b * N * R + i_r) * D
    visible = tl.load(visible + i_b * T + t, mask=t < T, other=0)  # chunks
    # An empty slot: below the key of every score, and unlike the row's other ones.
    none: tl.constexpr = -(2**31) * 2**32
    best = tl.where(slots < K, slots.to(tl.int64) + none, 2**63 - 1)[None, :] + tl.full([ROWS, 1], 0, tl.int64)
    worst = tl.full([ROWS], none, tl.int64)

    for first in range(0, tl.reduce(visible, 0, tl.standard._elementwise_max), BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        at = i.to(tl.int64)[:, None] * (R * D) + cols[None, :]
        tile = tl.load(landmarks + at, mask=(i < N)[:, None] & (cols < D)[None, :], other=0.0)  # [BLOCK_N, D]
        s = tl.dot(q_tile, tl.trans(tile), input_precision="ieee") * scale + 0.0  # -0 becomes 0
        bits = s.to(tl.int32, bitcast=True)
        bits = tl.where(s != s, 2**31 - 1, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
        key = (bits.to(tl.int64) << 32) + (2**31 - 1 - i)[None, :]
        key = tl.where(i[None, :] < visible[:, None], key, none)
        above = tl.reduce((key > worst[:, None]).to(tl.int32), 1, tl.standard._sum_combine)
        for _ in range(0, tl.reduce(above, 0, tl.standard._elementwise_max)):
            top = tl.reduce(key, 1, tl.standard._elementwise_max)
            enters = top > worst
            best = tl.where((best == worst[:, None]) & enters[:, None], top[:, None], best)
            key = tl.where(key == top[:, None], none, key)
            worst = tl.reduce(best, 1, tl.standard._elementwise_min)

    chunk = 2**31 - 1 - (best & 0x7FFFFFFF)
    # By chunk; behind them, slots without one.
    left = tl.where((slots < K)[None, :] & (best >= (none + 2**32)), chunk, 2**31)
    for slot in range(K):
        lowest = tl.reduce(left, 1, tl.standard._elementwise_min)
        found = lowest < 2**31
        taken = tl.reduce(tl.where(left == lowest[:, None], best, none), 1, tl.standard._elementwise_max)
        bits = (taken >> 32).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        score = tl.where(found, bits.to(tl.float32, bitcast=True), float("-inf"))
        tl.store(scores + row * K + slot, score, mask=t < T)
        tl.store(indices + row * K + slot, tl.where(found, lowest, -1).to(tl.int32), mask=t < T)
        left = tl.where(left == lowest[:, None], 2**31, left)


def dlandmarks_kernel(
    dscores, q_slc, pair, offsets, dlandmarks, T, N, scale,
    R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_c = tl.program_id(0)
    i_r = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    segment = (i_b * R + i_r) * N + i_c
    start = tl.load(offsets + segment)
    count = (tl.load(offsets + segment + 1) - start).to(tl.int32)
    acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    for first in range(0, count, ROWS):
        mask = rows < count - first
        at = tl.load(pair + (start + first) + rows, mask=mask, other=0)
        row = (i_b * T + at // K) * R + i_r
        weight = tl.load(dscores + row * K + at % K, mask=mask, other=0.0) * scale
        in_q = mask[:, None] & (cols < D)[None, :]
        q_tile = tl.load(q_slc + row[:, None] * D + cols[None, :], mask=in_q, other=0.0)  # [ROWS, D]
        acc += weight[:, None] * q_tile.to(tl.float32)
    total = tl.reduce(acc, 0, tl.standard._sum_combine)
    to = ((i_b * N + i_c) * R + i_r) * D + cols
    tl.store(dlandmarks + to, total.to(dlandmarks.dtype.element_ty), mask=cols < D)


def unavailable(problem: Retrieval) -> str | None:
    """Why the kernels cannot run this retrieval here, or None."""
    if problem.K > MAX_TOPK:
        return f"topk must be at most {MAX_TOPK}, got {problem.K}"
    return triton_launch.unavailable(problem)


decode_unavailable = unavailable


def topk_constants(R: int, D_r: int, topk: int, interpreted: bool = False) -> dict:
    """Compile-time arguments of topk_kernel; the interpreter's time goes by program, so its tiles are larger."""
    rows, block_N = (64, 128) if interpreted else (32, 64)
    return {
        "R": R, "D": D_r, "K": topk, "ROWS": rows, "BLOCK_N": block_N, "BLOCK_D": power_of_two(max(16, D_r)),
        "BLOCK_K": power_of_two(max(2, topk)), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def sum_constants(R: int, D_r: int, topk: int) -> dict:
    """Compile-time arguments of dlandmarks_kernel."""
    return {"R": R, "D": D_r, "K": topk, "ROWS": 32, "BLOCK_D": power_of_two(max(16, D_r)), "num_warps": 4}


def _best(q_slc, landmarks, visible, topk, scale):
    """scores, indices [B, T, R, topk]; visible [B, T]: how many of its N chunks a token sees."""
    B, T, R, D_r = q_slc.shape
    N = landmarks.shape[1]
    scores, indices = empty_slots(q_slc, topk)
    if scores.numel() and N:
        constants = topk_constants(R, D_r, topk, q_slc.device.type == "cpu")
        grid = -(-T // constants["ROWS"]), R, B
        tensors = q_slc.contiguous(), landmarks.contiguous(), visible.clamp(0, N).int().contiguous()
        launch(topk_kernel, grid, *tensors, scores, indices, T, N, scale, **constants)
    return scores, indices


def retrieve(q_slc, landmarks, topk, chunk_size, q_start, exclude_window, scale):
    """scores, indices [B, T, R, topk] of sequences that begin together; see hsa_tl.api.retrieve_chunks."""
    position = torch.arange(q_start, q_start + q_slc.shape[1], device=q_slc.device)
    visible = visible_chunks(position, chunk_size, exclude_window).expand(len(q_slc), -1)
    return _best(q_slc, landmarks, visible, topk, scale)


def retrieve_decode(q_slc, landmarks, lengths, chunks, topk, chunk_size, exclude_window, scale):
    """scores, indices [B, T, R, topk] of a few tokens of each sequence; see hsa_tl.api.retrieve_decode.

    Programs share out a sequence's landmarks, as if its parts were sequences, and the best of each part are merged.
    """
    (B, T, R, _), N = q_slc.shape, landmarks.shape[1]
    splits = next(n for n in (64, 32, 16, 8, 4, 2, 1) if n == 1 or (N % n == 0 and N // n >= SPLIT_CHUNKS))
    size = N // splits
    visible = visible_in_decode(lengths, chunks, T, N, chunk_size, exclude_window)
    first = torch.arange(splits, device=lengths.device)[:, None] * size
    visible = (visible[:, None] - first).flatten(0, 1)  # [B * splits, T]
    parts = landmarks.reshape(B * splits, size, *landmarks.shape[2:])
    scores, indices = _best(q_slc.repeat_interleave(splits, 0), parts, visible, topk, scale)
    if splits == 1:
        return scores, indices
    scores, indices = (x.unflatten(0, (B, splits)) for x in (scores, indices))  # [B, splits, T, R, topk]
    indices = torch.where(indices < 0, -1, indices + first[..., None, None].int())
    rows = (x.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1) for x in (scores, indices))
    return tuple(x.view(B, T, R, topk) for x in merge(*rows, topk))


def dlandmarks(dscores, pairs: Pairs, q_slc, num_chunks, scale):
    """The gradient of landmarks [B, num_chunks, R, D_r], in q_slc's dtype."""
    B, T, R, D_r = q_slc.shape
    out = q_slc.new_zeros(B, num_chunks, R, D_r)
    if dscores.numel() and num_chunks:
        launch(
            dlandmarks_kernel, (num_chunks, R, B), dscores.contiguous(), q_slc.contiguous(), *pairs, out, T, num_chunks,
            scale, **sum_constants(R, D_r, dscores.shape[3]),
        )  # fmt: skip
    return out
