"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: union-tile forward.

As hsa_fwd_union, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises. A row
that did not choose the chunk adds nothing. Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
Keys and values must be finite, as there.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.hsa_fwd_union import FwdUnionConfig, forward_of_union


@dataclass(frozen=True)
class SelectedFwdUnionConfig(FwdUnionConfig):
    """As FwdUnionConfig."""

    DIRECTION: ClassVar[str] = "selected_forward"


def selected_fwd_union(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdUnionConfig):
    tile = config.block_M // G  # tokens
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
        forward_of_union(
            q, k, v, None, indices, order, union_chunks, union_len, chunk_len, scale, out, lse, G, D, S, K, 1, masked,
            dtype, min_blocks, config,
        )  # fmt: skip

    return selected_fwd_union
