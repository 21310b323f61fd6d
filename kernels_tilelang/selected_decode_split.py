"""selected_fwd_token of one or a few new tokens over a paged pool, the slots in num_splits ranges, one CTA each.

A range's part of out is normalised by itself and has its log-sum-exp beside it, -inf where the range is empty;
selected_decode_combine merges them. Every address is clamped: nothing is read out of bounds.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.config_base import padded_rows
from hsa_tl.kernels_tilelang.hsa_decode_split import DecodeSplitConfig, load_pages
from hsa_tl.kernels_tilelang.macros import LOG2E, finish_rows, running_rows


@dataclass(frozen=True)
class SelectedDecodeSplitConfig(DecodeSplitConfig):
    """As DecodeSplitConfig."""

    KEY: ClassVar[tuple[str, ...]] = ("G", "D", "S", "K", "dtype")


def selected_decode_split(*, G, D, S, K, dtype, min_blocks, config: SelectedDecodeSplitConfig):
    rows = padded_rows(G)
    splits = config.num_splits
    slots = -(-K // splits)  # of a CTA
    B, tokens, N, H, P = T.dynamic("B, tokens, N, H, P")
    out_dtype = dtype if splits == 1 else "float32"

    @T.prim_func
    def selected_decode_split(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k_pages: T.Tensor((P, S, H, D), dtype),
        v_pages: T.Tensor((P, S, H, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        page_table: T.Tensor((B, N), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, splits, G, D), out_dtype),
        lse: T.Tensor((B, tokens, H, splits, G), "float32"),
    ):
        with T.Kernel(tokens * splits, H, B, threads=config.threads) as (i_x, i_h, i_b):
            T.annotate_min_blocks_per_sm(min_blocks)
            T.disable_warp_group_reg_alloc()
            q_shared = T.alloc_shared([rows, D], dtype)
            k_shared = T.alloc_shared([S, D], dtype)
            v_shared = T.alloc_shared([S, D], dtype)
            p_shared = T.alloc_shared([rows, S], dtype)
            o_shared = T.alloc_shared([rows, D], out_dtype)
            page_shared = T.alloc_shared([slots], "int32")
            acc_s = T.alloc_fragment([rows, S], "float32")
            acc_o = T.alloc_fragment([rows, D], "float32")
            row_max = T.alloc_fragment([rows], "float32")
            row_last = T.alloc_fragment([rows], "float32")
            row_sum = T.alloc_fragment([rows], "float32")
            row_part = T.alloc_fragment([rows], "float32")
            chosen = T.alloc_fragment([rows], "int32")
            spare = T.alloc_var("int32")

            i_t = i_x // splits
            first = i_x % splits * slots
            load_pages(page_shared, indices, page_table, i_b, i_t, i_h, first, K, N, P)
            spare = -1
            for i_k in T.serial(slots):
                spare = T.max(spare, page_shared[i_k])
            for r, d in T.Parallel(rows, D):
                q_shared[r, d] = T.if_then_else(r < G, q[i_b, i_t, i_h, T.min(r, G - 1), d], 0)
            # All threads fill the tile above; automatic warp specialisation puts no barrier behind it.
            T.sync_threads()
            T.clear(acc_o)
            T.clear(row_sum)
            T.fill(row_max, -T.infinity("float32"))

            for i_k in T.Pipelined(slots, num_stages=config.num_stages):
                i_p = T.if_then_else(page_shared[i_k] >= 0, page_shared[i_k], T.max(spare, 0))
                T.copy(k_pages[i_p, :, i_h, :], k_shared)
                T.clear(acc_s)
                T.gemm(q_shared, k_shared, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)  # [rows, S]
                for r in T.Parallel(rows):
                    chosen[r] = T.if_then_else(page_shared[i_k] >= 0, 1, 0)
                running_rows(acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale * LOG2E, None)
                T.copy(acc_s, p_shared)
                T.copy(v_pages[i_p, :, i_h, :], v_shared)
                T.gemm(p_shared, v_shared, acc_o, policy=T.GemmWarpPolicy.FullCol)  # [rows, D]

            finish_rows(acc_o, row_max, row_sum, rows)
            T.copy(acc_o, o_shared)
            for r, d in T.Parallel(G, D):
                out[i_b, i_t, i_h, i_x % splits, r, d] = T.if_then_else(spare >= 0, o_shared[r, d], 0)
            for r in T.Parallel(rows):
                if r < G:
                    lse[i_b, i_t, i_h, i_x % splits, r] = row_max[r]

    return selected_decode_split
