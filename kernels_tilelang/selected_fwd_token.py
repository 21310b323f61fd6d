"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: token-stationary forward.

As hsa_fwd_token, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises.
Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import padded_rows
from hsa_tl.kernels_tilelang.hsa_fwd_token import FwdTokenConfig
from hsa_tl.kernels_tilelang.macros import LOG2E, chunk_or_spare, finish_rows, running_rows


@dataclass(frozen=True)
class SelectedFwdTokenConfig(FwdTokenConfig):
    """As FwdTokenConfig."""

    DIRECTION: ClassVar[str] = "selected_forward"
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "masked", "dtype")


def selected_fwd_token(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdTokenConfig):
    rows = padded_rows(G)
    B, tokens, N, H = T.dynamic("B, tokens, N, H")

    @T.prim_func
    def selected_fwd_token(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        spare: T.Tensor((B, tokens, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tokens, H, B, threads=config.threads) as (i_t, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.disable_warp_group_reg_alloc()
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared = T.alloc_shared([S, D], dtype)
            v_shared = T.alloc_shared([S, D], dtype)
            p_shared = T.alloc_shared([rows, S], dtype)
            o_shared = T.alloc_shared([rows, D], dtype)
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max = T.alloc_fragment([rows], "float32")
            row_last = T.alloc_fragment([rows], "float32")
            row_sum = T.alloc_fragment([rows], "float32")
            row_part = T.alloc_fragment([rows], "float32")
            chosen = T.alloc_fragment([rows], "int32")

            for r, d in T.Parallel(rows, D):
                q_shared[r, d] = T.if_then_else(r < G, q[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            # All threads fill the tile above; automatic warp specialisation puts no barrier behind it.
            T.sync_threads()
            T.clear(acc_o)
            T.clear(row_sum)
            T.fill(row_max, -T.infinity("float32"))

            for i_k in T.Pipelined(K, num_stages=config.num_stages):
                c = indices[i_b, i_t, i_h, i_k]
                i_c = chunk_or_spare(c, N, spare[i_b, i_t, i_h])
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(q_shared, k_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                for r in T.Parallel(rows):
                    chosen[r] = T.if_then_else((c >= 0) & (c < N), 1, 0)
                running_rows(
                    acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E,
                    chunk_len[i_c] if masked else None,
                )  # fmt: skip
                T.copy(acc_s, p_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                T.gemm(p_shared, v_shared, acc_o, policy=T.GemmWarpPolicy.FullCol)  # [rows, D]

            finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, o_shared)
            for r, d in T.Parallel(G, D):
                out[i_b, i_t, i_h, r, d] = T.if_then_else(spare[i_b, i_t, i_h] >= 0, o_shared[r, d], 0)
            for r in T.Parallel(rows):
                if r < G:
                    lse[i_b, i_t, i_h, r] = row_max[r]

    return selected_fwd_token
