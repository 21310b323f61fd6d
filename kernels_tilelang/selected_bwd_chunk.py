"""dq, dk, dv of softmax(q[t] . K^T * scale) V over all chunks that token t chose: one pass, chunk-stationary.

P = exp(scores - lse) and dS = P * (dP - delta), dP = dout V^T, delta = rowsum(dout * out) - dlse: with lse saved, a
pair needs nothing of the others. As hsa_bwd_chunk otherwise: dk and dv in registers, a row of dq for each pair.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig
from hsa_tl.kernels_tilelang.macros import (
    LOG2E,
    add_gradient,
    gather_rows,
    gradient_products,
    split_begins,
    tile_products,
)


@dataclass(frozen=True)
class SelectedBwdChunkConfig(BwdChunkConfig):
    """As BwdChunkConfig."""

    DIRECTION: ClassVar[str] = "selected_backward"
    weighs: ClassVar[bool] = False
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "masked", "dtype")


def selected_bwd_chunk(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedBwdChunkConfig):
    rows = config.block_M
    tile = rows // G  # pairs; rows past tile * G are padding
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, partial_rows, splits = T.dynamic("pairs, segments, partial_rows, splits")
    dq_shape = (B, tokens, H, G, D) if config.reduce_add else (B, H, partial_rows, G, D)

    @T.prim_func
    def selected_bwd_chunk(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
        delta: T.Tensor((B, tokens, H, G), "float32"),
        pair: T.Tensor((pairs,), "int32"),
        begin: T.Tensor((segments,), "int64"),
        end: T.Tensor((segments,), "int64"),
        start: T.int32,
        chunk_len: T.Tensor((N,), "int32"),
        dout: T.Tensor((B, tokens, H, G, D), dtype),
        scale: T.float32,
        dq_partial: T.Tensor(dq_shape, "float32" if config.reduce_add else dtype),
        dk: T.Tensor((splits, B, N, S, H, D), "float32"),
        dv: T.Tensor((splits, B, N, S, H, D), "float32"),
    ):
        with T.Kernel(N * splits, H, B, threads=config.threads) as (i_x, i_h, i_b):
            i_c, i_s = i_x // splits, i_x % splits
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([rows, D], dtype)
            do_shared = T.alloc_shared([rows, D], dtype)
            k_shared = T.alloc_shared([S, D], dtype)
            v_shared = T.alloc_shared([S, D], dtype)
            p_shared = T.alloc_shared([rows, S], dtype)
            ds_shared = T.alloc_shared([rows, S], dtype)
            slot_shared = T.alloc_shared([rows], "int32")
            head_shared = T.alloc_shared([rows], "int32")
            q_rows = T.alloc_fragment([rows, D], dtype)
            do_rows = T.alloc_fragment([rows, D], dtype)
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_dp = T.alloc_fragment([rows, S], "float32")
            acc_dq = T.alloc_fragment([rows, D], "float32")
            acc_dk = T.alloc_fragment([S, D], "float32")
            acc_dv = T.alloc_fragment([S, D], "float32")
            row_lse2 = T.alloc_fragment([rows], "float32")
            row_delta = T.alloc_fragment([rows], "float32")
            first = T.alloc_var("int64")
            last = T.alloc_var("int64")
            real = T.alloc_var("int32")
            length = T.alloc_var("int32")

            segment = (i_b * H + i_h) * N + i_c
            first = split_begins(begin, end, segment, i_s, splits)
            last = split_begins(begin, end, segment, i_s + 1, splits)
            length = chunk_len[i_c] if masked else S
            if last > first:
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                for r in T.Parallel(rows):
                    head_shared[r] = r % G
                T.clear(acc_dk)
                T.clear(acc_dv)

                for i_m in T.serial(T.ceildiv(last - first, tile)):
                    real = T.Cast("int32", T.min(last - first - i_m * tile, tile)) * G  # rows; padding repeats a pair
                    for r in T.Parallel(rows):
                        slot_shared[r] = pair[T.min(first + i_m * tile + r // G, last - 1)]
                    gather_rows(
                        lambda r: (i_b, slot_shared[r] // K, i_h, head_shared[r]),
                        q, dout, q_rows, do_rows, q_shared, do_shared,
                    )  # fmt: skip
                    for r in T.Parallel(rows):
                        row_lse2[r] = lse[i_b, slot_shared[r] // K, i_h, head_shared[r]] * LOG2E
                    for r in T.Parallel(rows):
                        row_delta[r] = delta[i_b, slot_shared[r] // K, i_h, head_shared[r]]

                    tile_products(q_shared, k_shared, do_shared, v_shared, acc_s, acc_dp)
                    for r, s in T.Parallel(rows, S):
                        acc_s[r, s] = T.if_then_else(
                            (r < real) & (s < length), T.exp2(acc_s[r, s] * (scale * LOG2E) - row_lse2[r]), 0.0
                        )
                    for r, s in T.Parallel(rows, S):
                        acc_dp[r, s] = acc_s[r, s] * (acc_dp[r, s] - row_delta[r]) * scale
                    gradient_products(
                        acc_s, acc_dp, p_shared, ds_shared, q_shared, do_shared, k_shared, acc_dq, acc_dk, acc_dv
                    )

                    if config.reduce_add:
                        for r, d in T.Parallel(rows, D):
                            if r < real:
                                i_t = slot_shared[r] // K
                                T.atomic_add(dq_partial[i_b, i_t, i_h, head_shared[r], d], acc_dq[r, d])
                    else:
                        # The q tile is done with: through it the rows are stored 16 bytes at a time.
                        for r, d in T.Parallel(rows, D):
                            q_shared[r, d] = acc_dq[r, d]
                        for r, d in T.Parallel(rows, D):
                            if r < real:
                                row = slot_shared[r] - start * K
                                dq_partial[i_b, i_h, row, head_shared[r], d] = q_shared[r, d]

                add_gradient(acc_dk, dk, i_s, i_b, i_c, i_h)
                add_gradient(acc_dv, dv, i_s, i_b, i_c, i_h)

    return selected_bwd_chunk
