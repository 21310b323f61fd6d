"""out[t] = sum_s partial[t, s]: the ranges of slots that `hsa_decode_split` handled apart.

One CTA owns one query head of one token: a decode step has few tokens, and so few CTAs that the loads of all ranges
must be in flight at once. The sum is float32 and is cast once.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig, power_of_two, row_bytes
from hsa_tl.kernels_tilelang.hsa_decode_split import split_counts
from hsa_tl.kernels_tilelang.macros import LOG2E


@dataclass(frozen=True)
class DecodeCombineConfig(AuxiliaryConfig):
    num_splits: int = 2
    threads: int = 256
    DIRECTION = "combine"

    def pair_bytes(self, p):
        moved = (p.G * p.D * 4 * self.num_splits + row_bytes(p)) / p.K
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        return 4 * self.threads + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (self.num_splits + 1) * power_of_two(p.D)

    @classmethod
    def options(cls, p):
        return [cls(n) for n in split_counts(p)]


def hsa_decode_combine(*, G, D, dtype, min_blocks, config: DecodeCombineConfig, weighs=True):
    """weighs False: selected_decode_combine merges the ranges by their log-sum-exps."""
    splits, columns = config.num_splits, power_of_two(D)
    B, tokens, H = T.dynamic("B, tokens, H")

    @T.prim_func
    def hsa_decode_combine(
        partial: T.Tensor((B, tokens, H, splits, G, D), "float32"),
        partial_lse: None if weighs else T.Tensor((B, tokens, H, splits, G), "float32"),
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: None if weighs else T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tokens * G, H, B, threads=config.threads) as (i_x, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            part = T.alloc_fragment([splits, columns], "float32")
            acc_o = T.alloc_fragment([columns], "float32")
            if not weighs:
                largest, total = (T.alloc_var("float32") for _ in range(2))

            i_t, i_g = i_x // G, i_x % G
            if weighs:
                for i_s, d in T.Parallel(splits, columns):
                    part[i_s, d] = T.if_then_else(d < D, partial[i_b, i_t, i_h, i_s, i_g, T.min(d, D - 1)], 0.0)
            else:
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
                if not weighs and d == 0:
                    lse[i_b, i_t, i_h, i_g] = largest + T.log2(total) / LOG2E

    return hsa_decode_combine
