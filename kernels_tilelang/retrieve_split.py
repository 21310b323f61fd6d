"""The K best of s[t, i] = q_slc[t] . landmarks[i] * scale in each range of block_N landmarks: decode, a few tokens.

One CTA owns a range of landmarks, a retrieval head and up to TOKENS tokens of a sequence. The range streams through
shared memory, TILE landmarks at a time, as the rows of the matrix product whose columns are the tokens. Then, token by
token, its keys are sorted in groups of P >= K, and halves of the groups meet until one is left.
`retrieve_combine` takes the best of all ranges. A range that the sequence does not reach is not read.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import KEY_BYTES, SMEM_ALIGNMENT, SelectConfig
from hsa_tl.kernels_tilelang.macros_sort import BARRIER, at, halve_rows, sort_rows
from hsa_tl.kernels_tilelang.macros_topk import EMPTY, key_of, ordered, visible_chunks

TILE = 64  # landmarks that it multiplies at once
TOKENS = 8  # of that product: the fewest columns that wgmma takes
RANGES = (1024, 256, 128)  # landmarks of a CTA
FILL = 120  # CTAs that keep the most of 132 SMs busy


@dataclass(frozen=True)
class RetrieveSplitConfig(SelectConfig):
    block_N: int = 1024
    threads: int = 128
    num_stages: int = 3
    DIRECTION = "scan"  # of landmarks: bytes are what it costs
    producer = True
    working_registers = 80  # the sort's keys; with 72 ptxas spilled

    def ctas(self, p):
        return p.B * p.R * -(-p.T // TOKENS) * -(-p.N // self.block_N)

    def pair_bytes(self, p):
        moved = p.D * p.itemsize  # for one token; others of the tile read nothing more
        return {"l2": moved, "hbm": moved}

    def smem_bytes(self, p):
        tiles = (TOKENS + self.num_stages * min(TILE, self.block_N)) * p.D * p.itemsize
        return tiles + self.block_N * (4 * TOKENS + KEY_BYTES) + SMEM_ALIGNMENT

    def accumulators(self, p):
        return TILE * TOKENS

    def refusal(self, p):
        if reason := super().refusal(p):
            return reason
        if self.block_N & (self.block_N - 1) or self.block_N < max(TILE, self.places(p.K)):
            return f"block_N must be a power of two of at least {max(TILE, self.places(p.K))}, got {self.block_N}"
        return None

    @classmethod
    def options(cls, p):
        def effort(config):
            """The longest ranges that keep the GPU busy, or the shortest."""
            n = config.ctas(p)
            return n < FILL, n if n >= FILL else -n

        return sorted((cls(block_N) for block_N in RANGES), key=effort)

    @classmethod
    def on_cpu(cls, p):
        return cls(block_N=max(32, cls.places(p.K)), num_stages=1)


def retrieve_split(*, D, K, dtype, min_blocks, config: RetrieveSplitConfig):
    block_N, threads = config.block_N, config.threads
    tile = min(TILE, block_N)
    P = config.places(K)
    groups, levels = block_N // P, P.bit_length() - 1  # log2
    B, tokens, N, R, splits = T.dynamic("B, tokens, N, R, splits")

    @T.prim_func
    def retrieve_split(
        q_slc: T.Tensor((B, tokens, R, D), dtype),
        landmarks: T.Tensor((B, N, R, D), dtype),
        lengths: T.Tensor((B,), "int32"),
        chunks: T.Tensor((B,), "int32"),
        scale: T.float32,
        chunk_size: T.int32,
        window: T.int32,
        best: T.Tensor((B, tokens, R, splits, P), "int64"),  # ascending
    ):
        with T.Kernel(splits, T.ceildiv(tokens, TOKENS) * R, B, threads=threads) as (i_x, i_y, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([TOKENS, D], dtype)
            landmarks_shared = T.alloc_shared([tile, D], dtype)
            score_shared = T.alloc_shared([TOKENS, block_N], "int32")
            keys_shared = T.alloc_shared([groups, P], "int64")
            held = T.alloc_local([8], "int64")
            spot = T.alloc_local([8], "int32")
            acc_s = T.alloc_fragment([tile, TOKENS], "float32")
            first_t, first, seen = (T.alloc_var("int32") for _ in range(3))

            first_t = i_y // R * TOKENS
            first = i_x * block_N
            for m, d in T.Parallel(TOKENS, D):
                q_shared[m, d] = q_slc[i_b, T.min(first_t + m, tokens - 1), i_y % R, d]
            T.sync_threads()
            last = lengths[i_b] + T.min(first_t + TOKENS, tokens) - 1
            seen = visible_chunks(last, chunk_size, window, T.min(chunks[i_b], N))
            seen = T.max(T.min(seen - first, block_N), 0)

            for i_n in T.Pipelined(T.ceildiv(seen, tile), num_stages=config.num_stages):
                T.copy(landmarks[i_b, first + i_n * tile : first + (i_n + 1) * tile, i_y % R, :], landmarks_shared)
                T.clear(acc_s)
                T.gemm(landmarks_shared, q_shared, acc_s, transpose_B=True)  # [tile, TOKENS]
                for n, m in T.Parallel(tile, TOKENS):
                    score_shared[m, i_n * tile + n] = ordered(acc_s[n, m] * scale, dtype)
            T.sync_threads(BARRIER, threads)

            for m in T.serial(T.min(TOKENS, tokens - first_t)):
                position = lengths[i_b] + first_t + m
                visible = visible_chunks(position, chunk_size, window, T.min(chunks[i_b], N)) - first
                for g, j in T.Parallel(groups, P):
                    c = g * P + j
                    spot[0] = at(g, j)
                    keys_shared[g, spot[0]] = T.if_then_else(
                        c < visible, key_of(score_shared[m, c], first + c), T.int64(EMPTY)
                    )
                T.sync_threads(BARRIER, threads)
                sort_rows(keys_shared, held, spot, levels, False, threads)
                halve_rows(keys_shared, held, spot, levels, threads)
                for j in T.Parallel(P):
                    spot[0] = at(0, j)
                    best[i_b, first_t + m, i_y % R, i_x, j] = keys_shared[0, spot[0]]
                T.sync_threads(BARRIER, threads)

    return retrieve_split
