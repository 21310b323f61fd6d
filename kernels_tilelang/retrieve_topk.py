"""The K best of s[t, i] = q_slc[t] . landmarks[i] * scale over the chunks i that token t may see, ascending by chunk.

One CTA owns block_M neighbouring tokens of a retrieval head. The landmarks stream through shared memory, block_N at a
time and only up to the last one that the CTA's last token sees; a tile of scores never leaves the registers. Each row
keeps its best P >= K so far, sorted, and a buffer of P candidates: a score above the row's K-th best takes the next
place there. Only when a row's buffer overflows are all rows' buffers sorted and merged, by bitonic networks, and the
K-th bests raised: about log2(N / K) times for landmarks in no order. Any other tile costs one comparison a score.
Places are taken in any order, but keys (score, then the lower chunk) are unique, so all runs give the same result. A
tile's scores that equal the K-th best come behind it, for they are of later chunks.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import KEY_BYTES, SMEM_ALIGNMENT, WARPGROUP, SelectConfig
from hsa_tl.kernels_tilelang.macros_sort import BARRIER, at, keep_best
from hsa_tl.kernels_tilelang.macros_topk import EMPTY, NONE, by_chunk, key_of, ordered, score_of, slot_chunk, slot_score


@dataclass(frozen=True)
class RetrieveTopkConfig(SelectConfig):
    block_M: int = 128
    block_N: int = 128
    threads: int = 256
    num_stages: int = 2
    DIRECTION = "retrieve"
    producer = True
    working_registers = 72  # the sort's keys; with 52 ptxas spilled
    OPTIONS = ((128, 64, 256, 2), (64, 64, 128, 2))
    RESERVE = ((128, 64, 256, 1), (64, 64, 128, 1))
    ON_CPU = (16, 32, 256, 1)

    def rows(self, p):
        return self.block_M

    def pairs(self, p):
        return self.block_M  # a score is a pair

    def ctas(self, p):
        return p.B * p.R * -(-p.T // self.block_M)

    def pair_bytes(self, p):
        return {"l2": p.D * p.itemsize / self.block_M}

    def smem_bytes(self, p):
        tiles = (self.block_M + self.num_stages * self.block_N) * p.D * p.itemsize
        return tiles + self.block_M * (2 * KEY_BYTES * self.places(p.K) + 4) + 8 + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * self.block_N

    def refusal(self, p):
        if self.block_M % 64 or self.block_M // 64 * WARPGROUP != self.threads:
            return f"block_M must be 64 for each of the warpgroups, got {self.block_M} and {self.threads} threads"
        if reason := super().refusal(p):
            return reason
        return f"block_N must be a multiple of 8, got {self.block_N}" if self.block_N % 8 else None

    def tensor_core(self):
        return "hgmma"


@T.macro
def take_candidates(key, place, limit, visible, first, fresh_shared, count_shared, overflow_shared, parity):
    """Moves what is above its row's limit to the row's buffer; what finds no place stays, and raises the flag."""
    block_M, block_N = key.shape
    places = fresh_shared.shape[1]
    for m, n in T.Parallel(block_M, block_N):  # apart from the stores: the atomics are under way together
        place[m, n] = -1
        if (key[m, n] > limit[m]) & (first + n < visible[m]):
            place[m, n] = T.atomic_add(count_shared[m], 1, return_prev=True)
    for m, n in T.Parallel(block_M, block_N):
        if place[m, n] >= 0:
            if place[m, n] < places:
                fresh_shared[m, at(m, place[m, n])] = key_of(key[m, n], first + n)
                key[m, n] = NONE
            else:
                overflow_shared[parity] = 1


def retrieve_topk(*, D, K, dtype, min_blocks, config: RetrieveTopkConfig):
    block_M, block_N, threads = config.block_M, config.block_N, config.threads
    P = config.places(K)
    levels = P.bit_length() - 1  # log2
    worst = P - K  # position of the K-th best
    rounds = -(-block_N // P) + 1  # until a tile's candidates are all taken
    B, tokens, N, R = T.dynamic("B, tokens, N, R")

    @T.prim_func
    def retrieve_topk(
        q_slc: T.Tensor((B, tokens, R, D), dtype),
        landmarks: T.Tensor((B, N, R, D), dtype),
        scale: T.float32,
        chunk_size: T.int32,
        past: T.int32,  # whole chunks before the first token,
        past_rest: T.int32,  # and tokens since
        outside: T.int32,  # chunks that begin before its window does or where it does,
        outside_rest: T.int32,  # and tokens since the last one began
        scores: T.Tensor((B, tokens, R, K), "float32"),
        indices: T.Tensor((B, tokens, R, K), "int32"),
    ):
        with T.Kernel(T.ceildiv(tokens, block_M), R, B, threads=threads) as (i_x, i_r, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([block_M, D], dtype)
            landmarks_shared = T.alloc_shared([block_N, D], dtype)
            best_shared = T.alloc_shared([block_M, P], "int64")  # ascending
            fresh_shared = T.alloc_shared([block_M, P], "int64")
            count_shared = T.alloc_shared([block_M], "int32")
            overflow_shared = T.alloc_shared([2], "int32")  # by the tile's parity: two tiles are under way
            held = T.alloc_local([8], "int64")
            spot = T.alloc_local([8], "int32")
            acc_s = T.alloc_fragment([block_M, block_N], "float32")
            key, place = (T.alloc_fragment([block_M, block_N], "int32") for _ in range(2))
            limit, visible = (T.alloc_fragment([block_M], "int32") for _ in range(2))
            first_t, seen, overflow = (T.alloc_var("int32") for _ in range(3))

            first_t = (T.ceildiv(tokens, block_M) - 1 - i_x) * block_M  # the longest walks first
            for m, d in T.Parallel(block_M, D):
                q_shared[m, d] = q_slc[i_b, T.min(first_t + m, tokens - 1), i_r, d]
            for m, n in T.Parallel(block_M, P):
                best_shared[m, n] = EMPTY
                fresh_shared[m, n] = EMPTY
            for m in T.Parallel(block_M):
                count_shared[m] = 0
            for i in T.Parallel(2):
                overflow_shared[i] = 0
            T.sync_threads()
            for m in T.Parallel(block_M):
                limit[m] = NONE
                t = T.min(first_t + m, tokens - 1)
                after = T.max(outside + (outside_rest + t) // chunk_size, 0)
                visible[m] = T.min(T.min(past + (past_rest + t) // chunk_size, after), N)
            last = T.min(first_t + block_M, tokens) - 1
            seen = T.min(past + (past_rest + last) // chunk_size, outside + (outside_rest + last) // chunk_size)
            seen = T.max(T.min(seen, N), 0)

            for i_n in T.Pipelined(T.ceildiv(seen, block_N), num_stages=config.num_stages):
                T.copy(landmarks[i_b, i_n * block_N : (i_n + 1) * block_N, i_r, :], landmarks_shared)
                T.clear(acc_s)
                T.gemm(q_shared, landmarks_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                for m, n in T.Parallel(block_M, block_N):
                    key[m, n] = ordered(acc_s[m, n] * scale, dtype)
                overflow = 0
                for i_s in T.serial(rounds):
                    if (i_s == 0) | (overflow > 0):
                        if i_s > 0:
                            keep_best(best_shared, fresh_shared, held, spot, levels, threads)
                            for m, n in T.Parallel(block_M, P):
                                fresh_shared[m, n] = EMPTY
                            for m in T.Parallel(block_M):
                                count_shared[m] = 0
                                # What is left of the tile may stand before an equal score that found a place (or -0).
                                kth = score_of(best_shared[m, at(m, worst)])
                                limit[m] = T.max(kth, NONE + 2) - 2
                            overflow_shared[i_n % 2] = 0
                            T.sync_threads(BARRIER, threads)
                        take_candidates(
                            key, place, limit, visible, i_n * block_N, fresh_shared, count_shared, overflow_shared,
                            i_n % 2,
                        )  # fmt: skip
                        T.sync_threads(BARRIER, threads)
                        overflow = overflow_shared[i_n % 2]
                for m in T.Parallel(block_M):
                    limit[m] = score_of(best_shared[m, at(m, worst)])

            keep_best(best_shared, fresh_shared, held, spot, levels, threads)
            by_chunk(best_shared, fresh_shared, held, spot, levels, worst, threads)
            for m, n in T.Parallel(block_M, K):
                if first_t + m < tokens:
                    spot[0] = at(m, n)
                    held[0] = fresh_shared[m, spot[0]]
                    scores[i_b, first_t + m, i_r, n] = slot_score(held[0])
                    indices[i_b, first_t + m, i_r, n] = slot_chunk(held[0])

    return retrieve_topk
