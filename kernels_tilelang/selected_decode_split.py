"""selected_fwd_token of one or a few new tokens over a paged pool, the slots in num_splits ranges, one CTA each.

A range's part of out is normalised by itself and has its log-sum-exp beside it, -inf where the range is empty;
selected_decode_combine merges them. Every address is clamped: nothing is read out of bounds.
"""

from hsa_tl.kernels_tilelang.hsa_decode_split import DecodeSplitConfig, hsa_decode_split


def selected_decode_split(*, G, D, S, K, dtype, min_blocks, config: DecodeSplitConfig):
    return hsa_decode_split(
        G=G, D=D, S=S, K=K, heads_w=1, dtype=dtype, min_blocks=min_blocks, config=config, weighs=False
    )
