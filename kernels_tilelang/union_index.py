"""What hsa_fwd_union walks: for each tile of neighbouring tokens the ascending union of their chunks.

order[t] lists a token's slots by (chunk, slot), empty ones last. union_chunks lists the chunks of the tile's distinct
(chunk, occurrence), ascending, where a slot's occurrence counts the equal earlier slots of its row: a chunk stands
there as often as one token chose it, so duplicates add up. union_len is how many there are. Bit g of union_groups tells
whether a token of the tile's g-th 64 rows is among those who chose it.
One CTA owns a tile of `tile` tokens of a key/value head. A slot's place in its row is the number of slots before it, by
comparison; the tile's keys are sorted in shared memory by a bitonic network, neighbours that differ are kept, and a
prefix sum says where.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig, power_of_two

EMPTY = 2**31 - 1  # sorts behind every key
GROUP_ROWS = 64  # of a warpgroup


@dataclass(frozen=True)
class UnionIndexConfig(AuxiliaryConfig):
    """A CTA owns the tokens of one tile of hsa_fwd_union with the same block_M."""

    block_M: int = 128
    threads: int = 128
    DIRECTION = "index"
    OPTIONS = ((192,), (128,), (64,))

    def padded_keys(self, G: int, K: int) -> int:
        """Slots of the tile, up to a power of two and one for each thread: else several threads would add for one."""
        return max(power_of_two(self.threads), power_of_two(self.block_M // G * K))

    def pair_bytes(self, p):
        return {"hbm": 16.0}  # the index read; order, union_chunks and union_groups written

    def smem_bytes(self, p):
        return 4 * 4 * self.padded_keys(p.G, p.K) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return 3 * self.padded_keys(p.G, p.K)

    def refusal(self, p):
        return None if self.block_M >= p.G else f"block_M must be at least G = {p.G}, got {self.block_M}"

    @classmethod
    def on_cpu(cls, p):
        return cls(block_M=max(64, p.G))


def leads(key_shared, m, groups):
    """Whether the m-th sorted key // groups differs from the one before."""
    return (m == 0) | (key_shared[m] // groups != key_shared[T.max(m - 1, 0)] // groups)


def union_index(*, G, K, min_blocks, config: UnionIndexConfig):
    tile = config.block_M // G  # tokens
    keys = tile * K
    padded = config.padded_keys(G, K)
    groups = -(-config.block_M // GROUP_ROWS)
    levels = padded.bit_length() - 1  # log2
    B, tokens, H, tiles = T.dynamic("B, tokens, H, tiles")

    @T.prim_func
    def union_index(
        indices: T.Tensor((B, tokens, H, K), "int32"),
        num_chunks: T.int32,
        order: T.Tensor((B, tokens, H, K), "int32"),
        union_chunks: T.Tensor((B, tiles, H, keys), "int32"),
        union_groups: T.Tensor((B, tiles, H, keys), "int32"),
        union_len: T.Tensor((B, tiles, H), "int32"),
    ):
        with T.Kernel(tiles, H, B, threads=config.threads) as (i_tile, i_h, i_b):
            chunk_shared, key_shared, sum_shared, groups_shared = (T.alloc_shared([padded], "int32") for _ in range(4))
            place, occurrence, held = (T.alloc_fragment([padded], "int32") for _ in range(3))

            for m in T.Parallel(padded):  # slot m % K of the tile's token m // K
                i_t = i_tile * tile + m // K
                c = indices[i_b, T.min(i_t, tokens - 1), i_h, m % K]
                inside = (m < keys) & (i_t < tokens) & (c >= 0) & (c < num_chunks)
                chunk_shared[m] = T.if_then_else(inside, c, EMPTY)

            T.clear(place)
            T.clear(occurrence)
            for j in T.serial(K):
                for m in T.Parallel(padded):
                    other = chunk_shared[T.min(m // K, tile - 1) * K + j]
                    before = (other == chunk_shared[m]) & (j < m % K)
                    occurrence[m] = occurrence[m] + T.if_then_else(before, 1, 0)
                    place[m] = place[m] + T.if_then_else((other < chunk_shared[m]) | before, 1, 0)
            for m in T.Parallel(padded):
                if (m < keys) & (i_tile * tile + m // K < tokens):
                    order[i_b, i_tile * tile + m // K, i_h, place[m]] = m % K
            for m in T.Parallel(padded):
                key = (chunk_shared[m] * K + occurrence[m]) * groups + m // K * G // GROUP_ROWS
                key_shared[m] = T.if_then_else(chunk_shared[m] < EMPTY, key, EMPTY)

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
                distinct = (key_shared[m] < EMPTY) & leads(key_shared, m, groups)
                sum_shared[m] = T.if_then_else(distinct, 1, 0)
                groups_shared[m] = 0
            for i in T.serial(levels):
                for m in T.Parallel(padded):
                    held[m] = T.if_then_else(m >= (1 << i), sum_shared[T.max(m - (1 << i), 0)], 0)
                for m in T.Parallel(padded):
                    sum_shared[m] = sum_shared[m] + held[m]
            for m in T.Parallel(padded):
                if (key_shared[m] < EMPTY) & leads(key_shared, m, groups):
                    union_chunks[i_b, i_tile, i_h, sum_shared[m] - 1] = key_shared[m] // (K * groups)
            for g in T.serial(groups):  # one writer for each chunk at a time
                for m in T.Parallel(padded):
                    if (key_shared[m] < EMPTY) & (key_shared[m] % groups == g) & leads(key_shared, m, 1):
                        groups_shared[sum_shared[m] - 1] = groups_shared[sum_shared[m] - 1] + (1 << g)
            for m in T.Parallel(keys):
                union_groups[i_b, i_tile, i_h, m] = groups_shared[m]
            union_len[i_b, i_tile, i_h] = sum_shared[padded - 1]

    return union_index
