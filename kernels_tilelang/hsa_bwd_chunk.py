"""dq, dk, dv and dweights in one pass over the pairs of a chunk: chunk-stationary backward.

With P = softmax(q . K^T * scale) and dP = dout V^T of a pair: delta = rowsum(P * dP), dS = w * P * (dP - delta);
dv += (w P)^T dout, dk += scale * dS^T q, dq = scale * dS K, dweights = delta, summed over the heads a weight serves.
One CTA owns a split of a chunk and key/value head. Keys and values stay in shared memory, dk and dv in registers; the
(token, slot) pairs that chose it stream by, block_M // G at a time: block_M gathered rows of q and dout. A pair's dq
goes to a row of its own, which a later program sums for each token (reduce_add: float32 atomics instead). dk and dv
are added to what is there, so that windows of tokens accumulate in a fixed order.
"""

from dataclasses import dataclass, replace
from itertools import product

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import GradientConfig, first_legal, row_bytes
from hsa_tl.kernels_tilelang.macros import (
    LOG2E,
    add_gradient,
    exp_rows,
    gather_rows,
    gradient_products,
    split_begins,
    tile_products,
    weigh_rows,
)


@dataclass(frozen=True)
class BwdChunkConfig(GradientConfig):
    block_M: int = 64
    threads: int = 128
    reduce_add: int = 0
    DIRECTION = "backward"
    weighs = True  # each pair, and has dweights
    VARIANTS = tuple((m, t, add) for t, m, add in product((128, 256), (128, 64, 192), (0, 1)))

    def pair_bytes(self, p):
        dq = {"reduce": 4 * p.G * p.D, "hbm": 0} if self.reduce_add else {"hbm": 2 * row_bytes(p)}
        return {"l2": 2 * row_bytes(p)} | dq | {"hbm": dq["hbm"] + 4 * row_bytes(p) / p.K}

    def smem_bytes(self, p):
        return super().smem_bytes(p) + 4 * 3 * self.block_M  # slots, heads, delta

    def accumulators(self, p):
        # The scores and dP are dead where dq is. The four threads of a row keep what its atomics' addresses share.
        return 2 * p.S * p.D + self.block_M * (max(2 * p.S, p.D) + 16 * self.reduce_add)

    def refusal(self, p):
        if p.D not in (64, 128):
            return f"D must be 64 or 128, got {p.D}"
        if p.S * p.D > 64 * 128:
            return f"S must be at most {64 * 128 // p.D} at D = {p.D}, got {p.S}"
        return super().refusal(p)

    @classmethod
    def options(cls, p):
        plain = [cls(m, t) for t, m in product((128, 256), (128, 64))]
        if p.S < 64:
            plain.remove(cls(128, 128))  # spills
        if cls.weighs and p.S * p.D == 64 * 128:
            plain.remove(cls(64, 128))  # spills too
        adding = [replace(c, reduce_add=1) for c in plain[-2:]]
        # Less than a warpgroup is for shapes that nothing better fits.
        return first_legal(p, plain + adding, [cls(m, 64) for m in (64, 32, 16)])


def hsa_bwd_chunk(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: BwdChunkConfig):
    """weighs False: selected_bwd_chunk has lse and delta in place of weights, of each row, and no dweights."""
    rows, weighs = config.block_M, config.weighs
    tile = rows // G  # pairs; rows past tile * G are padding
    divides = weighs and rows % G == 0
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, partial_rows, splits = T.dynamic("pairs, segments, partial_rows, splits")
    dq_shape = (B, tokens, H, G, D) if config.reduce_add else (B, H, partial_rows, G, D)

    @T.prim_func
    def hsa_bwd_chunk(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32") if weighs else None,
        lse: None if weighs else T.Tensor((B, tokens, H, G), "float32"),
        delta: None if weighs else T.Tensor((B, tokens, H, G), "float32"),
        pair: T.Tensor((pairs,), "int32"),
        begin: T.Tensor((segments,), "int64"),
        end: T.Tensor((segments,), "int64"),
        start: T.int32,
        chunk_len: T.Tensor((N,), "int32"),
        dout: T.Tensor((B, tokens, H, G, D), dtype),
        scale: T.float32,
        dq_partial: T.Tensor(dq_shape, "float32" if config.reduce_add else dtype),
        dk: T.Tensor((splits, B, N, S, H, D), "float32"),
        dv: T.Tensor((splits, B, N, S, H, D), "float32"),
        dweights: T.Tensor((B, tokens, H, heads_w, K), "float32") if weighs else None,
    ):
        with T.Kernel(N * splits, H, B, threads=config.threads) as (i_x, i_h, i_b):
            i_c, i_s = i_x // splits, i_x % splits
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared, do_shared = (T.alloc_shared([rows, D], dtype) for _ in range(2))
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            p_shared, ds_shared = (T.alloc_shared([rows, S], dtype) for _ in range(2))
            slot_shared = T.alloc_shared([rows], "int32")
            # A table where ptxas would keep the remainder of every access in a register of its own.
            head_shared = T.alloc_shared([1 if divides else rows], "int32")
            delta_shared = T.alloc_shared([rows], "float32")
            q_rows, do_rows = (T.alloc_fragment([rows, D], dtype) for _ in range(2))
            acc_s, acc_dp = (T.alloc_fragment([rows, S], "float32") for _ in range(2))
            acc_dq = T.alloc_fragment([rows, D], "float32")
            acc_dk, acc_dv = (T.alloc_fragment([S, D], "float32") for _ in range(2))
            row_max, row_sum, row_weight, acc_delta = (T.alloc_fragment([rows], "float32") for _ in range(4))
            row_lse2, row_delta = (T.alloc_fragment([rows], "float32") for _ in range(2))
            dw_sum = T.alloc_fragment([tile], "float32")
            first, last = (T.alloc_var("int64") for _ in range(2))
            real = T.alloc_var("int32")
            if not weighs:
                length = T.alloc_var("int32")
            head = lambda r: r % G if divides else head_shared[r]  # noqa: E731  (the row's query head)

            segment = (i_b * H + i_h) * N + i_c
            first = split_begins(begin, end, segment, i_s, splits)
            last = split_begins(begin, end, segment, i_s + 1, splits)
            if not weighs:
                length = chunk_len[i_c] if masked else S
            if last > first:
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                if not divides:
                    for r in T.Parallel(rows):
                        head_shared[r] = r % G
                T.clear(acc_dk)
                T.clear(acc_dv)

                for i_m in T.serial(T.ceildiv(last - first, tile)):
                    real = T.Cast("int32", T.min(last - first - i_m * tile, tile)) * G  # rows; padding repeats a pair
                    for r in T.Parallel(rows):
                        slot_shared[r] = pair[T.min(first + i_m * tile + r // G, last - 1)]
                    gather_rows(
                        lambda r: (i_b, slot_shared[r] // K, i_h, head(r)),
                        q, dout, q_rows, do_rows, q_shared, do_shared,
                    )  # fmt: skip
                    if weighs:
                        for r in T.Parallel(rows):
                            slot = slot_shared[r]
                            row_weight[r] = weights[i_b, slot // K, i_h, T.min(head(r), heads_w - 1), slot % K]
                    else:
                        for r in T.Parallel(rows):
                            row_lse2[r] = lse[i_b, slot_shared[r] // K, i_h, head(r)] * LOG2E
                        for r in T.Parallel(rows):
                            row_delta[r] = delta[i_b, slot_shared[r] // K, i_h, head(r)]

                    tile_products(q_shared, k_shared, do_shared, v_shared, acc_s, acc_dp)
                    if weighs:
                        keys = chunk_len[i_c] if masked else None
                        exp_rows(acc_s, row_max, row_sum, rows, S, scale * LOG2E, keys)
                        weigh_rows(acc_s, acc_dp, row_sum, row_weight, acc_delta, rows, S, real, scale)
                    else:
                        for r, s in T.Parallel(rows, S):
                            acc_s[r, s] = T.if_then_else(
                                (r < real) & (s < length), T.exp2(acc_s[r, s] * (scale * LOG2E) - row_lse2[r]), 0.0
                            )
                        for r, s in T.Parallel(rows, S):
                            acc_dp[r, s] = acc_s[r, s] * (acc_dp[r, s] - row_delta[r]) * scale
                    gradient_products(
                        acc_s, acc_dp, p_shared, ds_shared, q_shared, do_shared, k_shared, acc_dq, acc_dk, acc_dv
                    )

                    if weighs and heads_w == 1:
                        T.copy(acc_delta, delta_shared)
                        T.clear(dw_sum)
                        for i_g in T.serial(G):
                            for m in T.Parallel(tile):
                                dw_sum[m] = dw_sum[m] + delta_shared[m * G + i_g]
                        for m in T.Parallel(tile):
                            if m * G < real:
                                dweights[i_b, slot_shared[m * G] // K, i_h, 0, slot_shared[m * G] % K] = dw_sum[m]
                    elif weighs:
                        for r in T.Parallel(rows):
                            if r < real:
                                slot = slot_shared[r]
                                dweights[i_b, slot // K, i_h, head(r), slot % K] = acc_delta[r]
                    if config.reduce_add:
                        for r, d in T.Parallel(rows, D):
                            if r < real:
                                T.atomic_add(dq_partial[i_b, slot_shared[r] // K, i_h, head(r), d], acc_dq[r, d])
                    else:
                        # The q tile is done with: through it the rows are stored 16 bytes at a time.
                        for r, d in T.Parallel(rows, D):
                            q_shared[r, d] = acc_dq[r, d]
                        for r, d in T.Parallel(rows, D):
                            if r < real:
                                dq_partial[i_b, i_h, slot_shared[r] - start * K, head(r), d] = q_shared[r, d]

                add_gradient(acc_dk, dk, i_s, i_b, i_c, i_h)
                add_gradient(acc_dv, dv, i_s, i_b, i_c, i_h)

    return hsa_bwd_chunk
