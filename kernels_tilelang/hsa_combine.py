"""out[t] = sum over the valid slots of token t of partial[(t - start) * K + slot], for the tokens of one window.

One CTA owns one token and key/value head, or a few tokens when a row [G, D] is small. Its K rows stream from memory,
num_stages of them in flight in registers; the sum stays in registers as float32 and is cast once. The partial row of an
empty slot was never written: it is not read. A token without a valid slot gets 0.
"""

from dataclasses import dataclass, replace
from math import gcd, lcm

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, AuxiliaryConfig, power_of_two, row_bytes


@dataclass(frozen=True)
class CombineConfig(AuxiliaryConfig):
    threads: int = 256
    num_stages: int = 4
    DIRECTION = "combine"
    ON_CPU = (32, 2)

    def lanes(self, vectors: int) -> int:
        """A row's 16-byte vectors, up to a power of two where whole rows would not give each thread such a number."""
        each = lcm(vectors, self.threads) // self.threads
        return vectors if each == power_of_two(each) else power_of_two(vectors)

    def tile(self, vectors: int) -> int:
        """Tokens of a CTA: the fewest that give every thread as much."""
        return self.threads // gcd(self.threads, self.lanes(vectors))

    def elements(self, p) -> int:
        """Elements of a thread in a row's fragment."""
        vectors = row_bytes(p) // 16
        return self.tile(vectors) * self.lanes(vectors) * 16 // p.itemsize // self.threads

    def pair_bytes(self, p):
        moved = row_bytes(p) * (1 + 1 / p.K)
        return {"hbm": moved, "l2": moved}

    def smem_bytes(self, p):
        return 4 * self.tile(row_bytes(p) // 16) * p.K + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.threads * self.elements(p) * (4 + self.num_stages * p.itemsize) // 4

    @classmethod
    def options(cls, p):
        def effort(config):
            """nvcc splits the 16-byte stores where a CTA has several tokens."""
            vectors = row_bytes(p) // 16
            return config.elements(p), config.lanes(vectors) > vectors, config.tile(vectors) > 1, -config.threads

        best = sorted((cls(32 * warps) for warps in range(2, 9)), key=effort)[:2]
        return [replace(c, num_stages=n) for c in best for n in ((4, 8) if c.elements(p) <= 32 else (2, 1))]


def hsa_combine(*, G, D, K, dtype, min_blocks, config: CombineConfig):
    vector = gcd(G * D, 4 if dtype == "float32" else 8)  # 16 bytes, on a GPU
    vectors = G * D // vector
    lanes = config.lanes(vectors)
    tile = config.tile(vectors)  # tokens
    stages = config.num_stages
    B, tokens, H, rows = T.dynamic("B, tokens, H, rows")

    @T.prim_func
    def hsa_combine(
        partial: T.Tensor((B, H, rows, G, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        start: T.int32,
        num_chunks: T.int32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
    ):
        with T.Kernel(T.ceildiv(rows // K, tile), H, B, threads=config.threads) as (i_m, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            valid_shared = T.alloc_shared([tile, K], "int32")
            part = T.alloc_fragment([stages, tile, lanes, vector], dtype)
            acc_o = T.alloc_fragment([tile, lanes, vector], "float32")
            stop = T.alloc_var("int32")

            stop = T.min(start + rows // K, tokens)
            for m, i_k in T.Parallel(tile, K):
                i_t = start + i_m * tile + m
                c = indices[i_b, T.min(i_t, tokens - 1), i_h, i_k]
                valid_shared[m, i_k] = T.if_then_else((i_t < stop) & (c >= 0) & (c < num_chunks), 1, 0)
            T.clear(acc_o)

            for i_s in T.serial(T.ceildiv(K, stages)):
                for s in T.unroll(stages):
                    for m, x, v in T.Parallel(tile, lanes, vector):
                        i_k = i_s * stages + s
                        part[s, m, x, v] = T.if_then_else(
                            (i_k < K) & (x < vectors) & (valid_shared[m, T.min(i_k, K - 1)] > 0),
                            partial[i_b, i_h, (i_m * tile + m) * K + i_k, (x * vector + v) // D, (x * vector + v) % D],
                            0,
                        )
                for s in T.unroll(stages):
                    for m, x, v in T.Parallel(tile, lanes, vector):
                        acc_o[m, x, v] = acc_o[m, x, v] + part[s, m, x, v]

            for m, x, v in T.Parallel(tile, lanes, vector):
                if (start + i_m * tile + m < stop) & (x < vectors):
                    i_t = start + i_m * tile + m
                    out[i_b, i_t, i_h, (x * vector + v) // D, (x * vector + v) % D] = acc_o[m, x, v]

    return hsa_combine
