"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: union-tile forward.

As hsa_fwd_union, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises. A row
that did not choose the chunk adds nothing. Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
Keys and values must be finite, as there.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import PRODUCER_REGISTERS, registers_left
from hsa_tl.kernels_tilelang.hsa_fwd_union import FwdUnionConfig
from hsa_tl.kernels_tilelang.macros import LOG2E, finish_rows, running_rows, union_chosen


@dataclass(frozen=True)
class SelectedFwdUnionConfig(FwdUnionConfig):
    """As FwdUnionConfig."""

    DIRECTION: ClassVar[str] = "selected_forward"
    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "masked", "dtype")


def selected_fwd_union(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdUnionConfig):
    rows = config.block_M
    tile = rows // G  # tokens; rows past tile * G are padding
    B, tokens, N, H, tiles = T.dynamic("B, tokens, N, H, tiles")

    @T.prim_func
    def selected_fwd_union(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        order: T.Tensor((B, tokens, H, K), "int32"),
        union_chunks: T.Tensor((B, tiles, H, tile * K), "int32"),
        union_groups: T.Tensor((B, tiles, H, tile * K), "int32"),  # not read
        union_len: T.Tensor((B, tiles, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
    ):
        with T.Kernel(tiles, H, B, threads=config.threads) as (i_tile, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.annotate_producer_reg_dealloc(PRODUCER_REGISTERS)
            T.annotate_consumer_reg_alloc(registers_left(config, min_blocks))
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared = T.alloc_shared([S, D], dtype)
            v_shared = T.alloc_shared([S, D], dtype)
            union_shared = T.alloc_shared([tile * K], "int32")
            chunk_shared = T.alloc_shared([tile, K], "int32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            p = T.alloc_fragment([rows, S], dtype)
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max = T.alloc_fragment([rows], "float32")
            row_last = T.alloc_fragment([rows], "float32")
            row_sum = T.alloc_fragment([rows], "float32")
            row_part = T.alloc_fragment([rows], "float32")
            chosen = T.alloc_fragment([rows], "int32")
            cursor = T.alloc_fragment([rows], "int32")

            for r, d in T.Parallel(rows, D):
                i_t = i_tile * tile + r // G
                inside = (r < tile * G) & (i_t < tokens)
                q_shared[r, d] = T.if_then_else(inside, q[i_b, T.min(i_t, tokens - 1), i_h, r % G, d], 0)
            for i_u in T.Parallel(tile * K):
                union_shared[i_u] = union_chunks[i_b, i_tile, i_h, i_u]
            for t, i_k in T.Parallel(tile, K):
                i_t = T.min(i_tile * tile + t, tokens - 1)
                chunk_shared[t, i_k] = indices[i_b, i_t, i_h, order[i_b, i_t, i_h, i_k]]
            # All threads fill the tiles above; automatic warp specialisation puts no barrier behind them.
            T.sync_threads()
            if config.q_registers:
                q_local = T.alloc_fragment([rows, D], dtype)
                T.copy(q_shared, q_local)
            T.clear(acc_o)
            T.clear(row_sum)
            T.fill(row_max, -T.infinity("float32"))
            T.clear(cursor)

            for i_u in T.Pipelined(union_len[i_b, i_tile, i_h], num_stages=config.num_stages):
                i_c = union_chunks[i_b, i_tile, i_h, i_u]
                T.copy(k[i_b, i_c, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(
                    q_local if config.q_registers else q_shared, k_shared, acc_s, transpose_B=True,
                    policy=T.GemmWarpPolicy.FullRow,
                )  # [rows, S]  # fmt: skip
                union_chosen(chosen, cursor, union_shared[i_u], chunk_shared, rows, G, tile)
                running_rows(
                    acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E,
                    chunk_len[i_c] if masked else None,
                )  # fmt: skip
                T.copy(acc_s, p)
                T.copy(v[i_b, i_c, :, i_h, :], v_shared)
                T.gemm(p, v_shared, acc_o, policy=T.GemmWarpPolicy.FullRow)  # [rows, D]

            finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, q_shared)
            for r, d in T.Parallel(tile * G, D):
                if i_tile * tile + r // G < tokens:
                    out[i_b, i_tile * tile + r // G, i_h, r % G, d] = q_shared[r, d]
            for r in T.Parallel(tile * G):  # a guard r < tile * G would take TileLang's prover half a minute
                if i_tile * tile + r // G < tokens:
                    lse[i_b, i_tile * tile + r // G, i_h, r % G] = row_max[r]

    return selected_fwd_union
