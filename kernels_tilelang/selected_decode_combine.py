"""Merges the num_splits parts of selected_decode_split by their log-sum-exps: out = sum exp(lse_i - lse) out_i."""

from hsa_tl.kernels_tilelang.hsa_decode_combine import DecodeCombineConfig, hsa_decode_combine


def selected_decode_combine(*, G, D, dtype, min_blocks, config: DecodeCombineConfig):
    return hsa_decode_combine(G=G, D=D, dtype=dtype, min_blocks=min_blocks, config=config, weighs=False)
