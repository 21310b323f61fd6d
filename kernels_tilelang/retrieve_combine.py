"""scores, indices[t] = the K best of all ranges that `retrieve_split` handled apart, ascending by chunk.

One CTA owns a token and retrieval head. It holds `rows` sorted rows of P >= K keys; the ranges' rows meet them one
batch of `rows` after the other, and then the rows each other.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import KEY_BYTES, SMEM_ALIGNMENT, SelectConfig
from hsa_tl.kernels_tilelang.macros_sort import BARRIER, RADIX, at, descend, halve_rows
from hsa_tl.kernels_tilelang.macros_topk import EMPTY, by_chunk, slot_chunk, slot_score


@dataclass(frozen=True)
class RetrieveCombineConfig(SelectConfig):
    """A CTA owns a token and a retrieval head; its threads hold RADIX keys each."""

    threads: int = 256
    DIRECTION = "combine"
    ON_CPU = (32,)

    def rows_of(self, K: int) -> int:
        """Ranges' rows that the CTA holds at a time."""
        return max(1, self.threads * RADIX // self.places(K))

    def pair_bytes(self, p):
        moved = KEY_BYTES * self.places(p.K) / p.K
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        return KEY_BYTES * self.places(p.K) * (self.rows_of(p.K) + 1) + SMEM_ALIGNMENT

    def refusal(self, p):
        if reason := super().refusal(p):
            return reason
        threads = self.threads
        return f"threads must be a power of two, got {threads}" if threads & (threads - 1) else None


def retrieve_combine(*, K, min_blocks, config: RetrieveCombineConfig):
    rows, threads = config.rows_of(K), config.threads
    P = config.places(K)
    levels = P.bit_length() - 1  # log2
    B, tokens, R, splits = T.dynamic("B, tokens, R, splits")

    @T.prim_func
    def retrieve_combine(
        best: T.Tensor((B, tokens, R, splits, P), "int64"),
        scores: T.Tensor((B, tokens, R, K), "float32"),
        indices: T.Tensor((B, tokens, R, K), "int32"),
    ):
        with T.Kernel(tokens, R, B, threads=threads) as (i_t, i_r, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            keys_shared = T.alloc_shared([rows, P], "int64")  # ascending
            out_shared = T.alloc_shared([1, P], "int64")
            held = T.alloc_local([8], "int64")
            spot = T.alloc_local([8], "int32")

            for g, j in T.Parallel(rows, P):
                keys_shared[g, j] = EMPTY
            T.sync_threads(BARRIER, threads)
            for i in T.serial(T.ceildiv(splits, rows)):
                for g, j in T.Parallel(rows, P):
                    i_s = i * rows + g
                    # A row backwards, so that the greater of both are the best of both, in one bitonic run.
                    fresh = best[i_b, i_t, i_r, T.min(i_s, splits - 1), P - 1 - j]
                    spot[0] = at(g, j)
                    keys_shared[g, spot[0]] = T.max(
                        keys_shared[g, spot[0]], T.if_then_else(i_s < splits, fresh, T.int64(EMPTY))
                    )
                T.sync_threads(BARRIER, threads)
                descend(keys_shared, held, spot, levels - 1, False, False, threads)
            halve_rows(keys_shared, held, spot, levels, threads)
            by_chunk(keys_shared, out_shared, held, spot, levels, P - K, threads)
            for n in T.Parallel(K):
                spot[0] = at(0, n)
                held[0] = out_shared[0, spot[0]]
                scores[i_b, i_t, i_r, n] = slot_score(held[0])
                indices[i_b, i_t, i_r, n] = slot_chunk(held[0])

    return retrieve_combine
