"""counts[segment, block] = slots of the block's tokens in that segment: first pass of the pairs' stable counting sort.

Segment (b * H + h) * N + c holds the pairs of a chunk; the last B * H segments hold the empty slots of each (b, h).
One CTA owns a block of consecutive tokens of one batch and key/value head and adds 1 for each slot, in any order:
integers, so the counts are exact and the same in every run. Empty slots, which may be all of the block's, it counts in
shared memory: global memory serves additions to one place one after the other. counts must be zero before.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig
from hsa_tl.kernels_tilelang.macros import segment_of


@dataclass(frozen=True)
class PairsCountConfig(AuxiliaryConfig):
    """A CTA owns a block of tokens and takes block_M of them at a time."""

    block_M: int = 8
    threads: int = 256
    DIRECTION = "index"

    def pair_bytes(self, p):
        return {"hbm": 4, "reduce": 4}

    def smem_bytes(self, p):
        return 4 + SMEM_ALIGNMENT

    @classmethod
    def options(cls, p):
        return [cls(max(1, 256 // p.K))]


def pairs_count(*, K, min_blocks, config: PairsCountConfig):
    tile = config.block_M  # tokens
    B, tokens, H = T.dynamic("B, tokens, H")
    segments, blocks = T.dynamic("segments, blocks")

    @T.prim_func
    def pairs_count(
        indices: T.Tensor((B, tokens, H, K), "int32"),
        num_chunks: T.int32,
        block_tokens: T.int32,
        counts: T.Tensor((segments, blocks), "int32"),
    ):
        with T.Kernel(blocks, H, B, threads=config.threads) as (i_m, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            empty_shared = T.alloc_shared([1], "int32")
            head = i_b * H + i_h

            empty_shared[0] = 0
            T.sync_threads()
            for i_s in T.serial(T.ceildiv(block_tokens, tile)):
                for m, i_k in T.Parallel(tile, K):
                    i_t = i_m * block_tokens + i_s * tile + m
                    if (i_s * tile + m < block_tokens) & (i_t < tokens):
                        i_c = segment_of(indices[i_b, i_t, i_h, i_k], head, num_chunks, B * H)
                        if i_c < B * H * num_chunks:
                            T.atomic_add(counts[i_c, i_m], 1)
                        else:
                            T.atomic_add(empty_shared[0], 1)
            T.sync_threads()
            counts[B * H * num_chunks + head, i_m] = empty_shared[0]

    return pairs_count
