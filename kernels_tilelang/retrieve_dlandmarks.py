"""dlandmarks[i] = scale * sum of dscores[t, k] * q_slc[t] over the pairs (t, k) that chose chunk i.

One CTA owns a chunk of a retrieval head. The pairs of its segment stream by, block_M at a time; row m sums every
block_M-th of them in float32 and at the end the rows are summed. No atomics, and the order is fixed. A chunk that no
token chose gets 0; an empty slot stands in no segment, so whatever gradient it has reaches no chunk.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig, power_of_two


@dataclass(frozen=True)
class RetrieveDlandmarksConfig(AuxiliaryConfig):
    block_M: int = 32
    threads: int = 128
    DIRECTION = "index"
    OPTIONS = ((32,), (16,))
    ON_CPU = (8,)
    of_retrieval = True

    def pair_bytes(self, p):
        return {"l2": p.D * p.itemsize + 8, "hbm": 4 + 32}  # pair; a sector of dscores

    def smem_bytes(self, p):
        columns = power_of_two(p.D)
        return 8 * self.block_M + 4 * self.threads + 4 * columns * self.threads // 32 + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (self.block_M + 1) * power_of_two(p.D)


def retrieve_dlandmarks(*, D, K, dtype, min_blocks, config: RetrieveDlandmarksConfig):
    block_M = config.block_M
    columns = power_of_two(D)  # every block_M and thread count has a layout for that
    B, tokens, N, R = T.dynamic("B, tokens, N, R")
    pairs, bounds = T.dynamic("pairs, bounds")

    @T.prim_func
    def retrieve_dlandmarks(
        dscores: T.Tensor((B, tokens, R, K), "float32"),
        q_slc: T.Tensor((B, tokens, R, D), dtype),
        pair: T.Tensor((pairs,), "int32"),
        offsets: T.Tensor((bounds,), "int64"),
        scale: T.float32,
        dlandmarks: T.Tensor((B, N, R, D), dtype),
    ):
        with T.Kernel(N, R, B, threads=config.threads) as (i_c, i_r, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            slot_shared = T.alloc_shared([block_M], "int32")
            weight_shared = T.alloc_shared([block_M], "float32")
            acc = T.alloc_fragment([block_M, columns], "float32")
            total = T.alloc_fragment([columns], "float32")
            first = T.alloc_var("int64")
            count = T.alloc_var("int32")

            first = offsets[(i_b * R + i_r) * N + i_c]
            count = T.cast(offsets[(i_b * R + i_r) * N + i_c + 1] - first, "int32")
            T.clear(acc)
            for i_m in T.serial(T.ceildiv(count, block_M)):
                for m in T.Parallel(block_M):
                    slot = pair[first + T.min(i_m * block_M + m, count - 1)]
                    slot_shared[m] = slot
                    weight_shared[m] = dscores[i_b, slot // K, i_r, slot % K] * scale
                for m, d in T.Parallel(block_M, columns):
                    part = weight_shared[m] * T.cast(q_slc[i_b, slot_shared[m] // K, i_r, T.min(d, D - 1)], "float32")
                    acc[m, d] = acc[m, d] + T.if_then_else(i_m * block_M + m < count, part, 0.0)
            T.reduce_sum(acc, total, dim=0)
            for d in T.Parallel(columns):
                if d < D:
                    dlandmarks[i_b, i_c, i_r, d] = total[d]

    return retrieve_dlandmarks
