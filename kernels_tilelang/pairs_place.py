"""pair[cursor[segment, block]++] = t * K + slot: second pass of the pairs' stable counting sort.

cursor[segment, block] is where the pairs begin that the block's tokens have in a segment (see pairs_count): no other
CTA touches them. One CTA owns a block of consecutive tokens of one batch and key/value head and walks them in order, so
the sort is stable; the K slots of a token go in parallel, each behind the equal slots before it in the row. Those ranks
need no cursor: they are found for block_M tokens at once.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig, power_of_two
from hsa_tl.kernels_tilelang.macros import segment_of


@dataclass(frozen=True)
class PairsPlaceConfig(AuxiliaryConfig):
    block_M: int = 8
    threads: int = 128
    DIRECTION = "index"

    def pair_bytes(self, p):
        return {"hbm": 4 + 4, "l2": 4 + 8 + 8 + 4}  # index, cursor read and written, pair

    def smem_bytes(self, p):
        return 3 * 4 * self.block_M * power_of_two(p.K) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return (2 * self.block_M + 2) * power_of_two(p.K)

    @classmethod
    def options(cls, p):
        # More threads than a token has slots only wait at the barriers.
        return [cls(8, min(256, max(64, power_of_two(p.K))))]


def pairs_place(*, K, min_blocks, config: PairsPlaceConfig):
    tile = config.block_M  # tokens
    slots = power_of_two(K)  # past K: padding
    B, tokens, H = T.dynamic("B, tokens, H")
    segments, blocks, pairs = T.dynamic("segments, blocks, pairs")

    @T.prim_func
    def pairs_place(
        indices: T.Tensor((B, tokens, H, K), "int32"),
        num_chunks: T.int32,
        block_tokens: T.int32,
        cursor: T.Tensor((segments, blocks), "int64"),
        pair: T.Tensor((pairs,), "int32"),
    ):
        with T.Kernel(blocks, H, B, threads=config.threads) as (i_m, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            segment_shared, rank_shared, equal_shared = (T.alloc_shared([tile, slots], "int32") for _ in range(3))
            rank, equal = (T.alloc_fragment([tile, slots], "int32") for _ in range(2))
            position = T.alloc_fragment([slots], "int64")
            first, stop = (T.alloc_var("int32") for _ in range(2))

            stop = T.min((i_m + 1) * block_tokens, tokens)
            for i_s in T.serial(T.ceildiv(block_tokens, tile)):
                first = i_m * block_tokens + i_s * tile
                for m, i_k in T.Parallel(tile, slots):
                    c = indices[i_b, T.min(first + m, tokens - 1), i_h, T.min(i_k, K - 1)]
                    segment_shared[m, i_k] = segment_of(c, i_b * H + i_h, num_chunks, B * H)
                T.clear(rank)
                T.clear(equal)
                for j in T.serial(K):
                    for m, i_k in T.Parallel(tile, slots):
                        same = T.if_then_else(segment_shared[m, j] == segment_shared[m, i_k], 1, 0)
                        rank[m, i_k] = rank[m, i_k] + T.if_then_else(j < i_k, same, 0)
                        equal[m, i_k] = equal[m, i_k] + same
                T.copy(rank, rank_shared)
                T.copy(equal, equal_shared)

                for m in T.serial(T.min(tile, stop - first)):
                    for i_k in T.Parallel(slots):
                        position[i_k] = cursor[segment_shared[m, i_k], i_m] + rank_shared[m, i_k]
                    T.sync_threads()
                    for i_k in T.Parallel(slots):
                        if i_k < K:
                            pair[position[i_k]] = (first + m) * K + i_k
                            if rank_shared[m, i_k] == equal_shared[m, i_k] - 1:
                                cursor[segment_shared[m, i_k], i_m] = position[i_k] + 1
                    T.sync_threads()

    return pairs_place
