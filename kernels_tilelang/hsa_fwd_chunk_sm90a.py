"""hsa_fwd_chunk hand-warp-specialised for sm_90a; the arithmetic is in macros that both share.

A producer warpgroup fills a ring of num_stages tiles; two consumer warpgroups take 64 rows each. The protocol:
  chunk_full: the producer's 128 threads arrive once, K and V as its bytes; the consumers wait once.
  full[s]: the producer's 128 threads arrive, each after its plain stores of slot and weight (an arrival releases, a
    wait acquires) and, one elected thread, after announcing the bytes of q that TMA brings; the consumers wait.
  empty[s]: the 256 consumer threads arrive after their last read of the stage; the whole producer waits, on the first
    round for the phase before the first, which counts as complete.
Both roles walk the same tiles, so every phase is met; a CTA without pairs touches no barrier. Rows that the last tile
lacks repeat the segment's last pair, so that a stage's bytes never vary, and are not stored.
"""

from dataclasses import dataclass

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from hsa_tl.kernels_tilelang.config_base import SMEM_ALIGNMENT, WARPGROUP, WORKING_REGISTERS, registers_left
from hsa_tl.kernels_tilelang.hsa_fwd_chunk import FwdChunkConfig
from hsa_tl.kernels_tilelang.macros import LOG2E, add_pairs, split_begins, store_pairs, weighted_output

BOX = 64  # columns of a TMA box: one 128-byte swizzle atom


@dataclass(frozen=True)
class FwdChunkSm90aConfig(FwdChunkConfig):
    """As FwdChunkConfig; a producer warpgroup copies num_stages tiles ahead of `threads` that compute."""

    block_M: int = 128
    threads: int = 256
    num_stages: int = 2
    sm_90a_only = True
    producer = True
    moves_registers = True
    producer_registers = 40  # a tile's pair ids; with 32 ptxas spilled them
    working_registers = WORKING_REGISTERS - 4  # the producer has the gather's addresses
    OPTIONS = ((128, 256, 0, 3), (128, 256, 0, 2), (128, 256, 1, 3))
    VARIANTS = tuple((128, 256, add, n) for n in (3, 2, 4, 1) for add in (0, 1))

    def smem_bytes(self, p):
        tiles = 2 * p.S * p.D + self.num_stages * self.block_M * p.D
        staging = 0 if self.reduce_add else self.block_M * p.D
        return (tiles + staging) * p.itemsize + 8 * self.num_stages * self.block_M + SMEM_ALIGNMENT

    def accumulators(self, p):
        return self.block_M * max(p.D + p.S // 2, p.S + p.S // 2)  # P, in 16 bits, stands beside either

    def refusal(self, p):
        if p.G % 8 or p.D not in (64, 128) or p.itemsize != 2:
            return f"it needs G % 8 == 0, D 64 or 128, 16 bits, got {p.G}, {p.D}, {p.dtype_name}"
        if self.block_M < p.G or (self.block_M, self.threads) != (128, 256):
            return f"it needs block_M 128 >= G, threads 256, got {self.block_M}, {self.threads}"
        return None


def hsa_fwd_chunk_sm90a(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: FwdChunkSm90aConfig):
    rows, stages, consumers = config.block_M, config.num_stages, config.threads
    tile = rows // G  # pairs; rows past tile * G are padding
    slots = -(-rows // G)
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, window_rows = T.dynamic("pairs, segments, window_rows")
    shape, out_dtype = ((B, tokens, H, G, D), "float32") if config.reduce_add else ((B, H, window_rows, G, D), dtype)

    @T.prim_func
    def hsa_fwd_chunk_sm90a(
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
        with T.Kernel(N * splits, H, B, threads=consumers + WARPGROUP) as (i_x, i_h, i_b):
            i_c = i_x // splits
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([stages, rows, D], dtype)
            k_shared, v_shared = (T.alloc_shared([S, D], dtype) for _ in range(2))
            o_shared = T.alloc_shared([rows, D], dtype)
            slot_shared = T.alloc_shared([stages, slots], "int32")
            weight_shared = T.alloc_shared([stages, rows], "float32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_p = T.alloc_fragment([rows, S], dtype)
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max, row_sum, row_weight = (T.alloc_fragment([rows], "float32") for _ in range(3))
            T.annotate_layout({o_shared: make_swizzled_layout(o_shared)})
            chunk_full = T.alloc_barrier(arrive_count=WARPGROUP)
            full = T.alloc_barrier(arrive_count=[WARPGROUP] * stages)
            empty = T.alloc_barrier(arrive_count=[consumers] * stages)
            next_pair = T.alloc_local([tile], "int32")
            row_pair, next_row_pair = (T.alloc_var("int32") for _ in range(2))
            next_weight = T.alloc_var("float32")
            first = T.alloc_var("int64")
            count, length = (T.alloc_var("int32") for _ in range(2))
            thread = T.get_thread_binding()

            segment = (i_b * H + i_h) * N + i_c
            first = split_begins(begin, end, segment, i_x % splits, splits)
            count = T.cast(split_begins(begin, end, segment, i_x % splits + 1, splits) - first, "int32")
            if count > 0:
                if thread >= consumers:
                    T.set_max_nreg(config.producer_registers, 0)
                    row = thread - consumers  # of the tile: this thread brings its slot and weight
                    T.tma_copy(k[i_b, i_c, :, i_h, :], k_shared, barrier=chunk_full)
                    T.tma_copy(v[i_b, i_c, :, i_h, :], v_shared, barrier=chunk_full)
                    T.barrier_arrive(chunk_full)
                    for m in T.unroll(tile):
                        next_pair[m] = pair[first + T.min(m, count - 1)]
                    row_pair = pair[first + T.min(row // G, count - 1)]
                    next_row_pair = pair[first + T.min(tile + row // G, count - 1)]
                    next_weight = weights[i_b, row_pair // K, i_h, T.min(row % G, heads_w - 1), row_pair % K]

                    for i_m in T.serial(T.ceildiv(count, tile)):
                        stage = i_m % stages
                        T.barrier_wait(empty[stage], ((i_m // stages) & 1) ^ 1)
                        for m in T.unroll(tile):
                            for c in T.unroll(D // BOX):
                                T.tma_copy(
                                    q[i_b, next_pair[m] // K, i_h, 0:G, c * BOX : (c + 1) * BOX],
                                    q_shared[stage, m * G : (m + 1) * G, c * BOX : (c + 1) * BOX],
                                    barrier=full[stage],
                                )
                        slot_shared[stage, row // G] = row_pair
                        weight_shared[stage, row] = next_weight
                        T.barrier_arrive(full[stage])
                        # What the next tile needs flies while this stage fills; no load here waits for another.
                        for m in T.unroll(tile):
                            next_pair[m] = pair[first + T.min((i_m + 1) * tile + m, count - 1)]
                        row_pair = next_row_pair
                        next_weight = weights[i_b, row_pair // K, i_h, T.min(row % G, heads_w - 1), row_pair % K]
                        next_row_pair = pair[first + T.min((i_m + 2) * tile + row // G, count - 1)]
                else:
                    T.set_max_nreg(registers_left(config, min_blocks), 1)
                    if masked:
                        length = chunk_len[i_c]
                    T.barrier_wait(chunk_full, 0)
                    for i_m in T.serial(T.ceildiv(count, tile)):
                        stage = i_m % stages
                        T.barrier_wait(full[stage], (i_m // stages) & 1)
                        for r in T.Parallel(rows):
                            row_weight[r] = weight_shared[stage, r]
                        weighted_output(
                            q_shared[stage, :, :], k_shared, v_shared, acc_s, acc_p, acc_o, row_max, row_sum,
                            row_weight, rows, S, scale * LOG2E, length if masked else None,
                        )  # fmt: skip
                        left = T.min(tile, count - i_m * tile)
                        if config.reduce_add:
                            add_pairs(acc_o, slot_shared, stage, left, K, partial, i_b, i_h)
                        else:
                            store_pairs(acc_o, o_shared, slot_shared, stage, left, start * K, partial, i_b, i_h)
                        T.barrier_arrive(empty[stage])

    return hsa_fwd_chunk_sm90a
