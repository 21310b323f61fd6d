"""dk[c] = scale * sum over pairs of dS^T q and dv[c] = sum over pairs of (w P)^T do: chunk-stationary backward.

With P = softmax(q . K^T * scale) and dP = do V^T of a pair: delta = rowsum(P * dP), dS = w * P * (dP - delta).
One CTA owns a chunk and a key/value head. Its keys and values stay in shared memory, dk and dv in registers; the
(token, slot) pairs that chose it stream by, block_M // G at a time: block_M gathered rows of q and do. No atomics and
no (T, N) mask: the pair index says who chose the chunk, in stable order, so the result is deterministic.
"""

from dataclasses import dataclass
from itertools import product

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import GradientConfig, row_bytes
from hsa_tl.kernels_tilelang.macros import LOG2E, gather_rows, softmax_and_delta, tile_products


@dataclass(frozen=True)
class BwdDkdvChunkConfig(GradientConfig):
    block_M: int = 64
    threads: int = 128
    DIRECTION = "dkdv"
    OPTIONS = tuple(product((64, 128, 32, 16), (128, 256)))
    RESERVE = tuple(product((64, 128, 32, 16), (64,)))  # less than a warpgroup
    VARIANTS = tuple(product((64, 128, 192, 256), (128, 256)))

    def pair_bytes(self, p):
        return {"l2": 2 * row_bytes(p), "hbm": 2 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        return super().smem_bytes(p) + 4 * -(-self.block_M // p.G)  # slots

    def splits(self, p):
        return 1  # it stores dk and dv for good

    def accumulators(self, p):
        return 2 * p.S * p.D + 2 * self.block_M * p.S


def hsa_bwd_dkdv_chunk(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: BwdDkdvChunkConfig):
    rows = config.block_M
    tile = rows // G  # pairs; rows past tile * G are padding
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments = T.dynamic("pairs, segments")

    @T.prim_func
    def hsa_bwd_dkdv_chunk(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
        pair: T.Tensor((pairs,), "int32"),
        offsets: T.Tensor((segments,), "int64"),
        chunk_len: T.Tensor((N,), "int32"),
        dout: T.Tensor((B, tokens, H, G, D), dtype),
        scale: T.float32,
        dk: T.Tensor((B, N, S, H, D), dtype),
        dv: T.Tensor((B, N, S, H, D), dtype),
    ):
        with T.Kernel(N, H, B, threads=config.threads) as (i_c, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared, do_shared = (T.alloc_shared([rows, D], dtype) for _ in range(2))
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            p_shared, ds_shared = (T.alloc_shared([rows, S], dtype) for _ in range(2))
            slot_shared = T.alloc_shared([T.ceildiv(rows, G)], "int32")
            q_rows, do_rows = (T.alloc_fragment([rows, D], dtype) for _ in range(2))
            acc_s, acc_dp = (T.alloc_fragment([rows, S], "float32") for _ in range(2))
            acc_dk, acc_dv = (T.alloc_fragment([S, D], "float32") for _ in range(2))
            row_max, row_sum, row_weight, delta = (T.alloc_fragment([rows], "float32") for _ in range(4))
            begin, end = (T.alloc_var("int64") for _ in range(2))

            begin = offsets[(i_b * H + i_h) * N + i_c]
            end = offsets[(i_b * H + i_h) * N + i_c + 1]
            T.copy(k[i_b, i_c, :, i_h, :], k_shared)
            T.copy(v[i_b, i_c, :, i_h, :], v_shared)
            T.clear(acc_dk)
            T.clear(acc_dv)

            for i_m in T.serial(T.ceildiv(end - begin, tile)):
                for m in T.Parallel(T.ceildiv(rows, G)):  # past the last pair it repeats, with weight 0
                    slot_shared[m] = pair[T.min(begin + i_m * tile + m, end - 1)]
                gather_rows(
                    lambda r: (i_b, slot_shared[r // G] // K, i_h, r % G),
                    q, dout, q_rows, do_rows, q_shared, do_shared,
                )  # fmt: skip
                real = T.Cast("int32", T.min(end - begin - i_m * tile, tile)) * G  # rows
                for r in T.Parallel(rows):
                    slot = slot_shared[r // G]
                    weight = weights[i_b, slot // K, i_h, T.min(r % G, heads_w - 1), slot % K]
                    row_weight[r] = T.if_then_else(r < real, weight, 0.0)

                tile_products(q_shared, k_shared, do_shared, v_shared, acc_s, acc_dp)
                length = chunk_len[i_c] if masked else None
                softmax_and_delta(acc_s, acc_dp, row_max, row_sum, delta, rows, S, scale * LOG2E, length)
                for r, s in T.Parallel(rows, S):
                    ds_shared[r, s] = row_weight[r] * (acc_dp[r, s] - acc_s[r, s] * delta[r])
                for r, s in T.Parallel(rows, S):
                    p_shared[r, s] = row_weight[r] * acc_s[r, s]
                T.gemm(p_shared, do_shared, acc_dv, transpose_A=True, policy=T.GemmWarpPolicy.FullCol)  # [S, D]
                T.gemm(ds_shared, q_shared, acc_dk, transpose_A=True, policy=T.GemmWarpPolicy.FullCol)  # [S, D]

            for s, d in T.Parallel(S, D):
                dk[i_b, i_c, s, i_h, d] = acc_dk[s, d] * scale
            for s, d in T.Parallel(S, D):
                dv[i_b, i_c, s, i_h, d] = acc_dv[s, d]

    return hsa_bwd_dkdv_chunk
