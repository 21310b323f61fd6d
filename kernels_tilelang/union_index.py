"""What hsa_fwd_union walks: for each tile of neighbouring tokens the ascending union of their chunks.

order[t] lists a token's slots by (chunk, slot), empty ones last. union_chunks lists the chunks of the tile's distinct
(chunk, occurrence), ascending, where a slot's occurrence counts the equal earlier slots of its row: a chunk stands
there as often as one token chose it, so duplicates add up. union_len is how many there are.
One CTA owns a tile of `tile` tokens of a key/value head. A slot's place in its row is the number of slots before it, by
comparison; the tile's keys are sorted in shared memory by a bitonic network, neighbours that differ are kept, and a
prefix sum says where.
"""

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_auxiliary import UnionIndexConfig

EMPTY = 2**31 - 1  # sorts behind every key


def union_index(*, G, K, min_blocks, config: UnionIndexConfig):
    tile = config.block_M // G  # tokens
    keys = tile * K
    padded = config.padded_keys(G, K)
    levels = padded.bit_length() - 1  # log2
    B, tokens, H, tiles = T.dynamic("B, tokens, H, tiles")

    @T.prim_func
    def union_index(
        indices: T.Tensor((B, tokens, H, K), "int32"),
        num_chunks: T.int32,
        order: T.Tensor((B, tokens, H, K), "int32"),
        union_chunks: T.Tensor((B, tiles, H, keys), "int32"),
        union_len: T.Tensor((B, tiles, H), "int32"),
    ):
        with T.Kernel(tiles, H, B, threads=config.threads) as (i_tile, i_h, i_b):
            chunk_shared = T.alloc_shared([tile, K], "int32")
            key_shared = T.alloc_shared([padded], "int32")
            sum_shared = T.alloc_shared([padded], "int32")
            place = T.alloc_fragment([tile, K], "int32")
            occurrence = T.alloc_fragment([tile, K], "int32")
            held = T.alloc_fragment([padded], "int32")

            for t, i_k in T.Parallel(tile, K):
                i_t = i_tile * tile + t
                c = indices[i_b, T.min(i_t, tokens - 1), i_h, i_k]
                chunk_shared[t, i_k] = T.if_then_else((i_t < tokens) & (c >= 0) & (c < num_chunks), c, EMPTY)
            for i in T.Parallel(padded):
                key_shared[i] = EMPTY

            T.clear(place)
            T.clear(occurrence)
            for j in T.serial(K):
                for t, i_k in T.Parallel(tile, K):
                    before = (chunk_shared[t, j] == chunk_shared[t, i_k]) & (j < i_k)
                    occurrence[t, i_k] = occurrence[t, i_k] + T.if_then_else(before, 1, 0)
                    less = chunk_shared[t, j] < chunk_shared[t, i_k]
                    place[t, i_k] = place[t, i_k] + T.if_then_else(less | before, 1, 0)
            for t, i_k in T.Parallel(tile, K):
                if i_tile * tile + t < tokens:
                    order[i_b, i_tile * tile + t, i_h, place[t, i_k]] = i_k
            for t, i_k in T.Parallel(tile, K):
                if chunk_shared[t, i_k] < EMPTY:
                    key_shared[t * K + i_k] = chunk_shared[t, i_k] * K + occurrence[t, i_k]

            # Bitonic: runs of 2 << i alternate in direction; step j compares keys 1 << (i - j) apart.
            for i in T.serial(levels):
                for j in T.serial(i + 1):
                    for m in T.Parallel(padded):
                        mine, other = key_shared[m], key_shared[m ^ (1 << (i - j))]
                        lower = ((m >> (i - j)) & 1) == ((m >> (i + 1)) & 1)
                        held[m] = T.if_then_else(lower, T.min(mine, other), T.max(mine, other))
                    for m in T.Parallel(padded):
                        key_shared[m] = held[m]

            for m in T.Parallel(padded):
                distinct = (key_shared[m] < EMPTY) & ((m == 0) | (key_shared[m] != key_shared[T.max(m - 1, 0)]))
                sum_shared[m] = T.if_then_else(distinct, 1, 0)
            for i in T.serial(levels):
                for m in T.Parallel(padded):
                    held[m] = T.if_then_else(m >= (1 << i), sum_shared[T.max(m - (1 << i), 0)], 0)
                for m in T.Parallel(padded):
                    sum_shared[m] = sum_shared[m] + held[m]
            for m in T.Parallel(padded):
                if (key_shared[m] < EMPTY) & ((m == 0) | (key_shared[m] != key_shared[T.max(m - 1, 0)])):
                    union_chunks[i_b, i_tile, i_h, sum_shared[m] - 1] = key_shared[m] // K
            union_len[i_b, i_tile, i_h] = sum_shared[padded - 1]

    return union_index
