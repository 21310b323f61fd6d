"""o = weights[t, k] * softmax(q[t] . K[c]^T * scale) V[c] for each pair (t, k) that chose c: chunk-stationary forward.

One CTA owns a split of the pairs of a chunk and key/value head. Keys and values stay in shared memory; the pairs of its
split stream by, block_M // G at a time: block_M gathered rows of q. A pair's output is complete in one tile.
reduce_add = 0 stores it in `partial` at row (t - start) * K + k, for another program to sum over a token's K rows;
reduce_add = 1 adds it to token t of a zeroed float32 `partial`.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, ChunkConfig, row_bytes
from hsa_tl.kernels_tilelang.macros import LOG2E, add_pairs, split_begins, store_pairs, weighted_output


@dataclass(frozen=True)
class FwdChunkConfig(ChunkConfig):
    block_M: int = 64
    threads: int = 128
    reduce_add: int = 0
    DIRECTION = "forward"
    OPTIONS = ((64, 128), (128, 128), (128, 256), (64, 128, 1), (128, 256, 1))
    VARIANTS = tuple((*x, add) for x in ((64, 128), (128, 128), (128, 256), (192, 128)) for add in (0, 1))

    def pair_bytes(self, p):
        read = row_bytes(p)
        if self.reduce_add:  # q, and the output in float32, stay in L2 while a chunk's neighbours use them
            return {"l2": read, "reduce": p.G * p.D * 4, "hbm": (read + p.G * p.D * 4) / p.K}
        return {"l2": read, "hbm": 2 * read + 2 * read / p.K}  # a partial is written and read back

    def smem_bytes(self, p):
        tiles = 2 * p.S * p.D + self.block_M * p.D
        return tiles * p.itemsize + 4 * -(-self.block_M // p.G) + SMEM_ALIGNMENT + self.reductions()

    def accumulators(self, p):
        # P, in 16 bits, stands beside the output or the scores; the other half of S is for the gather's addresses.
        return self.block_M * max(p.D + p.S, p.S + p.S // 2)


def hsa_fwd_chunk(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: FwdChunkConfig):
    rows = config.block_M
    tile = rows // G  # pairs; rows past tile * G are padding
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, window_rows = T.dynamic("pairs, segments, window_rows")
    shape, out_dtype = ((B, tokens, H, G, D), "float32") if config.reduce_add else ((B, H, window_rows, G, D), dtype)

    @T.prim_func
    def hsa_fwd_chunk(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
        pair: T.Tensor((pairs,), "int32"),
        begin: T.Tensor((segments,), "int64"),
        end: T.Tensor((segments,), "int64"),
        splits: T.int32,
        start: T.int32,
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        partial: T.Tensor(shape, out_dtype),
    ):
        with T.Kernel(N * splits, H, B, threads=config.threads) as (i_x, i_h, i_b):
            i_c = i_x // splits
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            slot_shared = T.alloc_shared([1, T.ceildiv(rows, G)], "int32")
            q_rows = T.alloc_fragment([rows, D], dtype)
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_p = T.alloc_fragment([rows, S], dtype)
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max, row_sum, row_weight = (T.alloc_fragment([rows], "float32") for _ in range(3))
            first = T.alloc_var("int64")
            count = T.alloc_var("int32")

            segment = (i_b * H + i_h) * N + i_c
            first = split_begins(begin, end, segment, i_x % splits, splits)
            count = T.cast(split_begins(begin, end, segment, i_x % splits + 1, splits) - first, "int32")
            if count > 0:
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)

                for i_m in T.serial(T.ceildiv(count, tile)):
                    for m in T.Parallel(T.ceildiv(rows, G)):
                        slot_shared[0, m] = pair[first + T.min(i_m * tile + m, count - 1)]
                    for r, d in T.Parallel(rows, D):  # to registers first, as in gather_rows
                        q_rows[r, d] = q[i_b, slot_shared[0, r // G] // K, i_h, r % G, d]
                    T.copy(q_rows, q_shared)
                    for r in T.Parallel(rows):
                        slot = slot_shared[0, r // G]
                        row_weight[r] = weights[i_b, slot // K, i_h, T.min(r % G, heads_w - 1), slot % K]

                    weighted_output(
                        q_shared, k_shared, v_shared, acc_s, acc_p, acc_o, row_max, row_sum, row_weight, rows, S,
                        scale * LOG2E, chunk_len[i_c] if masked else None,
                    )  # fmt: skip
                    left = T.min(tile, count - i_m * tile)
                    if config.reduce_add:
                        add_pairs(acc_o, slot_shared, 0, left, K, partial, i_b, i_h)
                    else:  # q_shared is free by now
                        store_pairs(acc_o, q_shared, slot_shared, 0, left, start * K, partial, i_b, i_h)

    return hsa_fwd_chunk
