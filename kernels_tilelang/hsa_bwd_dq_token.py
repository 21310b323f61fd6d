"""dq[t] = scale * sum_k dS_k K[c_k] and dweights[t, k] = sum over heads of delta_k: token-stationary backward.

With P = softmax(q . K^T * scale) and dP = do V^T of a slot: delta = rowsum(P * dP), dS = w * P * (dP - delta).
One CTA owns a token and a key/value head: its G query heads are the rows, padded to a multiple of 16. The K selected
chunks stream through shared memory; dq and every delta stay on chip. The row statistics are recomputed.
"""

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import TokenConfig, padded_rows
from hsa_tl.kernels_tilelang.macros import LOG2E, chunk_or_spare, softmax_and_delta


class BwdDqTokenConfig(TokenConfig):
    DIRECTION = "dq"
    TILES = 2
    SCORES = 2
    MOVED = 3


def hsa_bwd_dq_token(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: BwdDqTokenConfig):
    rows = padded_rows(G)
    B, tokens, N, H = T.dynamic("B, tokens, N, H")

    @T.prim_func
    def hsa_bwd_dq_token(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        spare: T.Tensor((B, tokens, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        dout: T.Tensor((B, tokens, H, G, D), dtype),
        scale: T.float32,
        dq: T.Tensor((B, tokens, H, G, D), dtype),
        dweights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
    ):
        with T.Kernel(tokens, H, B, threads=config.threads) as (i_t, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.disable_warp_group_reg_alloc()
            q_shared, do_shared = (T.alloc_shared([rows, D], dtype) for _ in range(2))
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            ds_shared = T.alloc_shared([rows, S], dtype)
            dq_shared = T.alloc_shared([rows, D], dtype)
            weights_shared = T.alloc_shared([heads_w, K], "float32")
            delta_shared = T.alloc_shared([rows, K], "float32")
            acc_s, acc_dp = (T.alloc_fragment([rows, S], "float32") for _ in range(2))
            acc_dq = T.alloc_fragment([rows, D], "float32")
            row_max, row_sum, delta = (T.alloc_fragment([rows], "float32") for _ in range(3))
            dw_sum = T.alloc_fragment([K], "float32")

            for r, d in T.Parallel(rows, D):
                q_shared[r, d] = T.if_then_else(r < G, q[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            for r, d in T.Parallel(rows, D):
                do_shared[r, d] = T.if_then_else(r < G, dout[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            for r, i_k in T.Parallel(heads_w, K):
                c = indices[i_b, i_t, i_h, i_k]
                weights_shared[r, i_k] = T.if_then_else((c >= 0) & (c < N), weights[i_b, i_t, i_h, r, i_k], 0.0)
            # All threads fill the tiles above; automatic warp specialisation puts no barrier behind them.
            T.sync_threads()
            T.clear(acc_dq)

            for i_k in T.Pipelined(K, num_stages=config.num_stages):
                i_c = chunk_or_spare(indices[i_b, i_t, i_h, i_k], N, spare[i_b, i_t, i_h])
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                T.clear(acc_s)
                T.gemm(q_shared, k_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                T.clear(acc_dp)
                T.gemm(do_shared, v_shared, acc_dp, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                length = chunk_len[i_c] if masked else None
                softmax_and_delta(acc_s, acc_dp, row_max, row_sum, delta, rows, S, scale * LOG2E, length)
                for r, s in T.Parallel(rows, S):
                    ds_shared[r, s] = weights_shared[T.min(r, heads_w - 1), i_k] * (
                        acc_dp[r, s] - acc_s[r, s] * delta[r]
                    )
                for r in T.Parallel(rows):
                    delta_shared[r, i_k] = delta[r]
                T.gemm(ds_shared, k_shared, acc_dq, policy=T.GemmWarpPolicy.FullCol)  # [rows, D]

            for r, d in T.Parallel(rows, D):
                dq_shared[r, d] = acc_dq[r, d] * scale
            for r, d in T.Parallel(G, D):
                dq[i_b, i_t, i_h, r, d] = T.if_then_else(spare[i_b, i_t, i_h] >= 0, dq_shared[r, d], 0)
            if heads_w == 1:
                T.clear(dw_sum)
                for r in T.serial(G):
                    for i_k in T.Parallel(K):
                        dw_sum[i_k] = dw_sum[i_k] + delta_shared[r, i_k]
                for i_k in T.Parallel(K):
                    c = indices[i_b, i_t, i_h, i_k]
                    dweights[i_b, i_t, i_h, 0, i_k] = T.if_then_else((c >= 0) & (c < N), dw_sum[i_k], 0.0)
            else:
                for r, i_k in T.Parallel(G, K):
                    c = indices[i_b, i_t, i_h, i_k]
                    dweights[i_b, i_t, i_h, r, i_k] = T.if_then_else((c >= 0) & (c < N), delta_shared[r, i_k], 0.0)

    return hsa_bwd_dq_token
