"""out[t] = sum_k weights[t, k] * softmax(q[t] . K[c]^T * scale) V[c], c = indices[t, k]: token-stationary forward.

One CTA owns a token and a key/value head: its G query heads are the rows, padded to a multiple of 16. The K selected
chunks stream through shared memory; the output stays in registers. A chunk's softmax is complete within its tile, so
the output is never rescaled, and the weight over the row sum folds into P before the cast.
An empty slot reads `spare`, a chunk that the token chose elsewhere, with weight 0: a branch around the copy would make
it synchronous.
"""

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import TokenConfig, padded_rows
from hsa_tl.kernels_tilelang.macros import LOG2E, chunk_or_spare, exp_rows, finish_rows, running_rows


class FwdTokenConfig(TokenConfig):
    DIRECTION = "forward"


def hsa_fwd_token(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: FwdTokenConfig, weighs=True):
    """weighs False: selected_fwd_token has no weights but one softmax over all chunks, and lse."""
    rows = padded_rows(G)
    B, tokens, N, H = T.dynamic("B, tokens, N, H")

    @T.prim_func
    def hsa_fwd_token(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32") if weighs else None,
        indices: T.Tensor((B, tokens, H, K), "int32"),
        spare: T.Tensor((B, tokens, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: None if weighs else T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tokens, H, B, threads=config.threads) as (i_t, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.disable_warp_group_reg_alloc()
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            p_shared = T.alloc_shared([rows, S], dtype)
            o_shared = T.alloc_shared([rows, D], dtype)
            weights_shared = T.alloc_shared([heads_w, K], "float32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max, row_last, row_sum, row_part = (T.alloc_fragment([rows], "float32") for _ in range(4))
            chosen = T.alloc_fragment([rows], "int32")

            for r, d in T.Parallel(rows, D):
                q_shared[r, d] = T.if_then_else(r < G, q[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            if weighs:
                for r, i_k in T.Parallel(heads_w, K):
                    c = indices[i_b, i_t, i_h, i_k]
                    weights_shared[r, i_k] = T.if_then_else((c >= 0) & (c < N), weights[i_b, i_t, i_h, r, i_k], 0.0)
            # All threads fill the tiles above; automatic warp specialisation puts no barrier behind them.
            T.sync_threads()
            T.clear(acc_o)
            if not weighs:
                T.clear(row_sum)
                T.fill(row_max, -T.infinity("float32"))

            for i_k in T.Pipelined(K, num_stages=config.num_stages):
                c = indices[i_b, i_t, i_h, i_k]
                i_c = chunk_or_spare(c, N, spare[i_b, i_t, i_h])
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(q_shared, k_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                if weighs:
                    exp_rows(acc_s, row_max, row_sum, rows, S, scale * LOG2E, chunk_len[i_c] if masked else None)
                    for r in T.Parallel(rows):
                        row_sum[r] = weights_shared[T.min(r, heads_w - 1), i_k] / row_sum[r]
                    for r, s in T.Parallel(rows, S):
                        p_shared[r, s] = acc_s[r, s] * row_sum[r]
                else:
                    for r in T.Parallel(rows):
                        chosen[r] = T.if_then_else((c >= 0) & (c < N), 1, 0)
                    running_rows(
                        acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E,
                        chunk_len[i_c] if masked else None,
                    )  # fmt: skip
                    T.copy(acc_s, p_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                T.gemm(p_shared, v_shared, acc_o, policy=T.GemmWarpPolicy.FullCol)  # [rows, D]

            if not weighs:
                finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, o_shared)
            for r, d in T.Parallel(G, D):
                out[i_b, i_t, i_h, r, d] = T.if_then_else(spare[i_b, i_t, i_h] >= 0, o_shared[r, d], 0)
            if not weighs:
                for r in T.Parallel(rows):
                    if r < G:
                        lse[i_b, i_t, i_h, r] = row_max[r]

    return hsa_fwd_token
