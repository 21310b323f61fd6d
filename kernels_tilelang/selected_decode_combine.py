"""Merges the num_splits parts of selected_decode_split by their log-sum-exps: out = sum exp(lse_i - lse) out_i."""

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import power_of_two
from hsa_tl.kernels_tilelang.hsa_decode_combine import DecodeCombineConfig
from hsa_tl.kernels_tilelang.macros import LOG2E


def selected_decode_combine(*, G, D, dtype, min_blocks, config: DecodeCombineConfig):
    splits, columns = config.num_splits, power_of_two(D)
    B, tokens, H = T.dynamic("B, tokens, H")

    @T.prim_func
    def selected_decode_combine(
        partial: T.Tensor((B, tokens, H, splits, G, D), "float32"),
        partial_lse: T.Tensor((B, tokens, H, splits, G), "float32"),
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tokens * G, H, B, threads=config.threads) as (i_x, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            part = T.alloc_fragment([splits, columns], "float32")
            acc_o = T.alloc_fragment([columns], "float32")
            largest, total = (T.alloc_var("float32") for _ in range(2))

            i_t, i_g = i_x // G, i_x % G
            largest = -T.infinity("float32")
            for i_s in T.serial(splits):
                largest = T.max(largest, partial_lse[i_b, i_t, i_h, i_s, i_g])
            total = 0.0
            for i_s in T.serial(splits):  # without a key: exp2(-inf) of each, not of -inf - -inf
                total = total + T.exp2((partial_lse[i_b, i_t, i_h, i_s, i_g] - T.max(largest, -1e38)) * LOG2E)
            for i_s, d in T.Parallel(splits, columns):
                share = T.exp2((partial_lse[i_b, i_t, i_h, i_s, i_g] - T.max(largest, -1e38)) * LOG2E)
                part[i_s, d] = T.if_then_else(  # a nan total stays one
                    (d >= D) | (total == 0), 0.0, share * partial[i_b, i_t, i_h, i_s, i_g, T.min(d, D - 1)] / total
                )
            T.reduce_sum(part, acc_o, dim=0)
            for d in T.Parallel(columns):
                if d < D:
                    out[i_b, i_t, i_h, i_g, d] = acc_o[d]
                if d == 0:
                    lse[i_b, i_t, i_h, i_g] = largest + T.log2(total) / LOG2E

    return selected_decode_combine
