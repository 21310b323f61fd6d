"""hsa_bwd_chunk hand-specialised for sm_90a.

One CTA owns a split of a chunk and a key/value head: a producer warpgroup gathers rows of q and dout by TMA, num_stages
tiles of block_M rows ahead of two warpgroups that compute: 64 rows each of the scores, dP and dq, and half the columns
each of dk and dv (at D = 64 all of one of them). dq leaves by TMA through the tiles of w P and dS (reduce_add: by
atomics). Barriers. kv_full and full[st]: 128 arrivals of the producer, each behind its lane's slot and weight, and the
tile's bytes; empty[st]: 256 arrivals of the consumers once their last product has read the tile. Slots are read after
that, so they have 2 * num_stages places: who arrives for a tile has finished the one num_stages before it. WRITTEN:
both have written and fenced w P and dS, which the sums over rows read whole. READ: both have read them and delta, so dq
and the next tile may overwrite them. STAGED + warpgroup, twice a tile: its dq is written and fenced, for its elected
thread to store; that thread's earlier stores have read it.
"""

from dataclasses import dataclass

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, registers_left
from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig
from hsa_tl.kernels_tilelang.macros import LOG2E, add_gradient, exp_rows, split_begins, weigh_rows

WRITTEN, READ, STAGED = 8, 9, 10  # named barriers; TileLang takes its own from 1 up
BOX = 64  # columns of a TMA box: 128 bytes, one swizzle atom
ROWS, COLUMNS = T.GemmWarpPolicy.FullRow, T.GemmWarpPolicy.FullCol  # how the warpgroups share a product


@dataclass(frozen=True)
class BwdChunkSm90aConfig(BwdChunkConfig):
    """As BwdChunkConfig; a producer warpgroup copies num_stages tiles ahead of `threads` that compute."""

    block_M: int = 128
    threads: int = 256
    num_stages: int = 2
    sm_90a_only = True
    producer = True
    moves_registers = True
    producer_registers = 56  # a tile's tokens
    VARIANTS = tuple((128, 256, add, n) for n in (1, 2, 3) for add in (0, 1))

    def smem_bytes(self, p):
        tiles = 2 * (self.num_stages * self.block_M * p.D + p.S * p.D + self.block_M * p.S)
        slots = 2 * self.num_stages * self.block_M // p.G * (1 + (p.G if p.per_head else 1))  # and weights
        return tiles * p.itemsize + 4 * (slots + self.block_M) + SMEM_ALIGNMENT

    def largest(self, p):
        return max(p.S, self.block_M) * p.D

    def refusal(self, p):
        if p.D not in (64, 128) or p.S != 64 or p.G not in (8, 16, 32, 64):
            return f"it needs D of 64 or 128, S = 64 and G of 8, 16, 32 or 64, got {p.D}, {p.S} and {p.G}"
        if (self.block_M, self.threads) != (128, 256):
            return f"it needs block_M = 128 and threads = 256, got {self.block_M} and {self.threads}"
        return None

    @classmethod
    def options(cls, p):
        return [cls(num_stages=n) for n in (2, 3, 1)] + [cls(num_stages=2, reduce_add=1)]

    def loop_share(self, p):
        return 5 / 7 if p.D == 64 else 1.0  # dv in one consumer's branch, dk in the other's


def hsa_bwd_chunk_sm90a(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: BwdChunkSm90aConfig):
    rows, stages, consumers = config.block_M, config.num_stages, config.threads
    tile, weights_tile = rows // G, rows // G * heads_w  # pairs, and their weights
    halves = D > BOX  # of dk and dv for each consumer; else dv is the first one's and dk the second's
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, partial_rows, splits = T.dynamic("pairs, segments, partial_rows, splits")
    dq_shape = (B, tokens, H, G, D) if config.reduce_add else (B, H, partial_rows, G, D)

    @T.prim_func
    def hsa_bwd_chunk_sm90a(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
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
        dweights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
    ):
        with T.Kernel(N * splits, H, B, threads=config.total_threads()) as (i_x, i_h, i_b):
            i_c, i_s = i_x // splits, i_x % splits
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared, do_shared = (T.alloc_shared([stages, rows, D], dtype) for _ in range(2))
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            # w P and dS, then dq in slices of S columns
            tiles_shared = T.alloc_shared([2, rows, S], dtype)
            slot_shared = T.alloc_shared([2 * stages, tile], "int32")
            weight_shared = T.alloc_shared([2 * stages, weights_tile], "float32")
            delta_shared = T.alloc_shared([rows], "float32")
            acc_s, acc_dp = (T.alloc_fragment([rows, S], "float32") for _ in range(2))
            acc_dq = T.alloc_fragment([rows, D], "float32")
            acc_dk, acc_dv = (T.alloc_fragment([S, D], "float32") for _ in range(2))
            row_max, row_sum, row_weight, delta = (T.alloc_fragment([rows], "float32") for _ in range(4))
            token = T.alloc_local([tile], "int32")
            kv_full = T.alloc_barrier(arrive_count=128)
            full = T.alloc_barrier(arrive_count=[128] * stages)
            empty = T.alloc_barrier(arrive_count=[consumers] * stages)
            first = T.alloc_var("int64")
            count, slot = (T.alloc_var("int32") for _ in range(2))
            weight = T.alloc_var("float32")
            real, length = (T.alloc_var("int32") for _ in range(2))
            dw_sum = T.alloc_var("float32")

            tx = T.get_thread_binding()
            segment = (i_b * H + i_h) * N + i_c
            first = split_begins(begin, end, segment, i_s, splits)
            count = T.Cast("int32", split_begins(begin, end, segment, i_s + 1, splits) - first)
            if count > 0:
                if tx >= consumers:
                    T.set_max_nreg(config.producer_registers, 0)
                    for c in T.unroll(D // BOX):
                        box = slice(c * BOX, (c + 1) * BOX)
                        T.tma_copy(k[i_b, i_c, :, i_h, box], k_shared[:, box], barrier=kv_full)
                        T.tma_copy(v[i_b, i_c, :, i_h, box], v_shared[:, box], barrier=kv_full)
                    T.barrier_arrive(kv_full)
                    for i_m in T.serial(T.ceildiv(count, tile)):
                        st = i_m % stages
                        # Ahead of the wait, so that it hides these loads.
                        for m in T.unroll(tile):
                            token[m] = pair[first + T.min(i_m * tile + m, count - 1)] // K
                        lane = T.min(tx - consumers, weights_tile - 1)
                        slot = pair[first + T.min(i_m * tile + lane // heads_w, count - 1)]
                        weight = weights[i_b, slot // K, i_h, lane % heads_w, slot % K]
                        T.barrier_wait(empty[st], (i_m // stages & 1) ^ 1)
                        if tx - consumers < weights_tile:
                            weight_shared[i_m % (2 * stages), tx - consumers] = weight
                            slot_shared[i_m % (2 * stages), (tx - consumers) // heads_w] = slot
                        for m in T.unroll(tile):
                            for c in T.unroll(D // BOX):
                                i_t, heads, box = token[m], slice(m * G, (m + 1) * G), slice(c * BOX, (c + 1) * BOX)
                                T.tma_copy(q[i_b, i_t, i_h, :, box], q_shared[st, heads, box], barrier=full[st])
                                T.tma_copy(dout[i_b, i_t, i_h, :, box], do_shared[st, heads, box], barrier=full[st])
                        T.barrier_arrive(full[st])
                else:
                    T.set_max_nreg(registers_left(config, min_blocks), 1)
                    if halves or tx >= 128:
                        T.clear(acc_dk)
                    if halves or tx < 128:
                        T.clear(acc_dv)
                    if masked:
                        length = chunk_len[i_c]
                    T.barrier_wait(kv_full, 0)
                    for i_m in T.serial(T.ceildiv(count, tile)):
                        st = i_m % stages
                        place = i_m % (2 * stages)
                        real = T.min(count - i_m * tile, tile) * G  # rows; those past it repeat the last pair
                        T.barrier_wait(full[st], i_m // stages & 1)
                        T.clear(acc_s)
                        T.wgmma_gemm(q_shared[st, :, :], k_shared, acc_s, transpose_B=True, policy=ROWS)  # [rows, S]
                        T.clear(acc_dp)
                        T.wgmma_gemm(do_shared[st, :, :], v_shared, acc_dp, transpose_B=True, policy=ROWS)  # [rows, S]
                        for r in T.Parallel(rows):
                            row_weight[r] = weight_shared[place, r // G * heads_w + T.min(r % G, heads_w - 1)]
                        T.wait_wgmma(1)
                        T.warpgroup_fence_operand(acc_s, num_regs=rows * S // consumers)
                        exp_rows(acc_s, row_max, row_sum, rows, S, scale * LOG2E, length if masked else None)
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(acc_dp, num_regs=rows * S // consumers)
                        weigh_rows(acc_s, acc_dp, row_sum, row_weight, delta, rows, S, real, scale)

                        if not config.reduce_add:
                            T.tma_store_wait(0)
                            T.sync_threads(STAGED + tx // 128, 128)
                        T.copy(acc_s, tiles_shared[0, :, :])
                        T.copy(acc_dp, tiles_shared[1, :, :])
                        for r in T.Parallel(rows):
                            delta_shared[r] = delta[r]
                        T.fence_proxy_async()
                        T.sync_threads(WRITTEN, consumers)
                        if halves:
                            T.wgmma_gemm(
                                tiles_shared[0, :, :], do_shared[st, :, :], acc_dv, transpose_A=True, policy=COLUMNS
                            )  # [S, D]
                            T.wgmma_gemm(
                                tiles_shared[1, :, :], q_shared[st, :, :], acc_dk, transpose_A=True, policy=COLUMNS
                            )  # [S, D]
                        elif tx < 128:
                            T.wgmma_gemm(tiles_shared[0, :, :], do_shared[st, :, :], acc_dv, transpose_A=True)  # [S, D]
                        else:
                            T.wgmma_gemm(tiles_shared[1, :, :], q_shared[st, :, :], acc_dk, transpose_A=True)  # [S, D]
                        T.clear(acc_dq)
                        T.wgmma_gemm(tiles_shared[1, :, :], k_shared, acc_dq, policy=ROWS)  # [rows, D]
                        if heads_w == 1:
                            if tx * G < real:
                                dw_sum = 0.0
                                for i_g in T.unroll(G):
                                    dw_sum = dw_sum + delta_shared[tx * G + i_g]
                                slot = slot_shared[place, tx]
                                dweights[i_b, slot // K, i_h, 0, slot % K] = dw_sum
                        elif tx < real:
                            slot = slot_shared[place, tx // G]
                            dweights[i_b, slot // K, i_h, tx % G, slot % K] = delta_shared[tx]
                        T.wait_wgmma(0)
                        T.warpgroup_fence_operand(acc_dq, num_regs=rows * D // consumers)
                        T.barrier_arrive(empty[st])

                        T.sync_threads(READ, consumers)
                        if config.reduce_add:
                            for r, d in T.Parallel(rows, D):
                                if r < real:
                                    i_t = slot_shared[place, r // G] // K
                                    T.atomic_add(dq_partial[i_b, i_t, i_h, r % G, d], acc_dq[r, d])
                        else:
                            for r, d in T.Parallel(rows, D):
                                tiles_shared[d // S, r, d % S] = acc_dq[r, d]
                            T.fence_proxy_async()
                            T.sync_threads(STAGED + tx // 128, 128)
                            for m in T.unroll(tile):
                                if (tx // 128 == m * G // 64) & (m * G < real):
                                    for c in T.unroll(D // S):
                                        row = slot_shared[place, m] - start * K
                                        T.tma_copy(
                                            tiles_shared[c, m * G : (m + 1) * G, :],
                                            dq_partial[i_b, i_h, row, :, c * S : (c + 1) * S],
                                            leader_scope_threads=128,
                                        )
                    T.warpgroup_fence_operand(acc_dk, num_regs=S * D // (256 if halves else 128))
                    T.warpgroup_fence_operand(acc_dv, num_regs=S * D // (256 if halves else 128))
                    if not config.reduce_add:
                        T.tma_store_wait(0)  # shared memory must outlive the last stores
                    if halves or tx >= 128:
                        add_gradient(acc_dk, dk, i_s, i_b, i_c, i_h)
                    if halves or tx < 128:
                        add_gradient(acc_dv, dv, i_s, i_b, i_c, i_h)

    return hsa_bwd_chunk_sm90a
