"""selected_fwd_token of one or a few new tokens over a paged pool, the slots in num_splits ranges, one CTA each.

A range's part of out is normalised by itself and has its log-sum-exp beside it, -inf where the range is empty;
selected_decode_combine merges them. Every address is clamped: nothing is read out of bounds.
"""

import tilelang.language as T

from hsa_tl.kernels_tilelang.hsa_decode_split import DecodeSplitConfig, decode_of_range


def selected_decode_split(*, G, D, S, K, dtype, min_blocks, config: DecodeSplitConfig):
    splits = config.num_splits
    B, tokens, N, H, P = T.dynamic("B, tokens, N, H, P")

    @T.prim_func
    def selected_decode_split(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k_pages: T.Tensor((P, S, H, D), dtype),
        v_pages: T.Tensor((P, S, H, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        page_table: T.Tensor((B, N), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, splits, G, D), dtype if splits == 1 else "float32"),
        lse: T.Tensor((B, tokens, H, splits, G), "float32"),
    ):
        decode_of_range(
            q, k_pages, v_pages, None, indices, page_table, scale, out, lse, G, D, S, K, 1, min_blocks, config
        )

    return selected_decode_split
