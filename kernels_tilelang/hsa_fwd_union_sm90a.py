"""hsa_fwd_union hand-specialised for sm_90a: a warpgroup skips what its own tokens did not choose.

A consumer warpgroup owns 64 rows, 64 // G tokens; union_groups says which warpgroups a chunk concerns. So a chunk is
read once for all block_M rows and multiplied for those alone that need it. The arithmetic is in macros that both share.
  full[s]: the producer's 128 threads arrive, one elected after announcing the bytes of k and v that TMA brings; every
    consumer waits, also one that skips the chunk, so that all walk the same phases.
  empty[s]: all consumer threads arrive after their last read of the stage; the producer waits, on the first round for
    the phase before the first, which counts as complete.
"""

from itertools import product

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import PRODUCER_REGISTERS, WARPGROUP, registers_left, union_chunks
from hsa_tl.kernels_tilelang.hsa_fwd_union import FwdUnionConfig
from hsa_tl.kernels_tilelang.macros import LOG2E, exp_rows, load_slots, union_weights

ROWS = 64  # of a warpgroup


class FwdUnionSm90aConfig(FwdUnionConfig):
    sm_90a_only = True
    OPTIONS = tuple(product((192, 128), (2, 3)))
    RESERVE = ()

    def again(self, p, overlap):
        return union_chunks(p, self.pairs(p), overlap), union_chunks(p, ROWS // p.G, overlap)

    def smem_bytes(self, p):
        return super().smem_bytes(p) + 4 * self.pairs(p) * p.K  # which warpgroups a chunk concerns

    def refusal(self, p):
        if ROWS % p.G or self.block_M == ROWS:
            return f"it needs whole tokens in a warpgroup's {ROWS} rows, two warpgroups, got G = {p.G}, {self}"
        return super().refusal(p)


def hsa_fwd_union_sm90a(*, G, D, S, K, heads_w, masked, dtype, min_blocks, config: FwdUnionSm90aConfig):
    stages, consumers, groups = config.num_stages, config.threads, config.block_M // ROWS
    tile = config.block_M // G  # tokens
    B, tokens, N, H, tiles = T.dynamic("B, tokens, N, H, tiles")

    @T.macro
    def consume(
        g, q_shared, k_shared, v_shared, union_shared, groups_shared, chunk_shared, weights_shared, full, empty,
        chunk_len, scale, length, first, i_h, i_b, out,
    ):  # fmt: skip
        T.set_max_nreg(registers_left(config, min_blocks), 1)
        acc_s = T.alloc_fragment([ROWS, S], "float32")
        p = T.alloc_fragment([ROWS, S], dtype)
        acc_o = T.alloc_fragment([ROWS, D], "float32")
        row_max, row_sum = (T.alloc_fragment([ROWS], "float32") for _ in range(2))
        cursor = T.alloc_fragment([ROWS], "int32")
        needed, keys = (T.alloc_var("int32") for _ in range(2))
        if config.q_registers:
            q_local = T.alloc_fragment([ROWS, D], dtype)
            T.copy(q_shared[g, :, :], q_local)
        T.clear(acc_o)
        T.clear(cursor)
        for i_u in T.serial(length):
            stage = i_u % stages
            T.barrier_wait(full[stage], (i_u // stages) & 1)
            needed = (groups_shared[i_u] >> g) & 1
            if masked:
                keys = chunk_len[union_shared[i_u]]  # under way before the product
            if needed == 1:
                T.clear(acc_s)
                T.gemm(
                    q_local if config.q_registers else q_shared[g, :, :], k_shared[stage, :, :], acc_s,
                    transpose_B=True, policy=T.GemmWarpPolicy.FullRow,
                )  # fmt: skip
                exp_rows(acc_s, row_max, row_sum, ROWS, S, scale * LOG2E, keys if masked else None)
                union_weights(
                    row_sum, cursor, union_shared[i_u], chunk_shared, weights_shared, g * ROWS, ROWS, G, tile, heads_w
                )
                for r, s in T.Parallel(ROWS, S):
                    p[r, s] = acc_s[r, s] * row_sum[r]
                T.gemm(p, v_shared[stage, :, :], acc_o)
            T.barrier_arrive(empty[stage])
        for r, d in T.Parallel(ROWS, D):
            if first + (g * ROWS + r) // G < tokens:
                out[i_b, first + (g * ROWS + r) // G, i_h, r % G, d] = acc_o[r, d]

    @T.prim_func
    def hsa_fwd_union_sm90a(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        weights: T.Tensor((B, tokens, H, heads_w, K), "float32"),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        order: T.Tensor((B, tokens, H, K), "int32"),
        union_chunks: T.Tensor((B, tiles, H, tile * K), "int32"),
        union_groups: T.Tensor((B, tiles, H, tile * K), "int32"),
        union_len: T.Tensor((B, tiles, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
    ):
        with T.Kernel(tiles, H, B, threads=consumers + WARPGROUP) as (i_tile, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            q_shared = T.alloc_shared([groups, ROWS, D], dtype)
            k_shared, v_shared = (T.alloc_shared([stages, S, D], dtype) for _ in range(2))
            union_shared, groups_shared = (T.alloc_shared([tile * K], "int32") for _ in range(2))
            chunk_shared = T.alloc_shared([tile, K], "int32")
            weights_shared = T.alloc_shared([tile * heads_w, K], "float32")
            full = T.alloc_barrier(arrive_count=[WARPGROUP] * stages)
            empty = T.alloc_barrier(arrive_count=[consumers] * stages)
            chunk = T.alloc_var("int32")
            thread = T.get_thread_binding()
            length = union_len[i_b, i_tile, i_h]
            first = i_tile * tile

            for g, r, d in T.Parallel(groups, ROWS, D):
                i_t = T.min(first + (g * ROWS + r) // G, tokens - 1)
                q_shared[g, r, d] = q[i_b, i_t, i_h, r % G, d]
            for i_u in T.Parallel(tile * K):
                union_shared[i_u] = union_chunks[i_b, i_tile, i_h, i_u]
            for i_u in T.Parallel(tile * K):
                groups_shared[i_u] = union_groups[i_b, i_tile, i_h, i_u]
            load_slots(indices, weights, order, chunk_shared, weights_shared, first, tokens, tile, K, heads_w, i_h, i_b)
            T.fence_proxy_async()
            T.sync_threads()
            arguments = (
                q_shared, k_shared, v_shared, union_shared, groups_shared, chunk_shared, weights_shared, full, empty,
                chunk_len, scale, length, first, i_h, i_b, out,
            )  # fmt: skip
            if thread >= consumers:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                for i_u in T.serial(length):
                    stage = i_u % stages
                    chunk = union_chunks[i_b, i_tile, i_h, i_u]
                    T.barrier_wait(empty[stage], ((i_u // stages) & 1) ^ 1)
                    T.tma_copy(k[i_b, chunk, :, i_h, :], k_shared[stage, :, :], barrier=full[stage])
                    T.tma_copy(v[i_b, chunk, :, i_h, :], v_shared[stage, :, :], barrier=full[stage])
                    T.barrier_arrive(full[stage])
            elif thread < WARPGROUP:
                consume(0, *arguments)
            elif thread < 2 * WARPGROUP:
                consume(1, *arguments)
            else:
                consume(groups - 1, *arguments)

    return hsa_fwd_union_sm90a
