"""dq, dk, dv of softmax(q[t] . K^T * scale) V over all chunks that token t chose: one pass, chunk-stationary.

P = exp(scores - lse) and dS = P * (dP - delta), dP = dout V^T, delta = rowsum(dout * out) - dlse: with lse saved, a
pair needs nothing of the others. As hsa_bwd_chunk otherwise: dk and dv in registers, a row of dq for each pair.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig, backward_of_pairs


@dataclass(frozen=True)
class SelectedBwdChunkConfig(BwdChunkConfig):
    """As BwdChunkConfig."""

    DIRECTION: ClassVar[str] = "selected_backward"
    weighs: ClassVar[bool] = False


def selected_bwd_chunk(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedBwdChunkConfig):
    B, tokens, N, H = T.dynamic("B, tokens, N, H")
    pairs, segments, partial_rows, splits = T.dynamic("pairs, segments, partial_rows, splits")
    dq_shape = (B, tokens, H, G, D) if config.reduce_add else (B, H, partial_rows, G, D)

    @T.prim_func
    def selected_bwd_chunk(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
        delta: T.Tensor((B, tokens, H, G), "float32"),
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
    ):
        backward_of_pairs(
            q, k, v, None, lse, delta, pair, begin, end, start, chunk_len, dout, scale, dq_partial, dk, dv, None,
            splits, G, D, S, K, 1, masked, dtype, min_blocks, config,
        )  # fmt: skip

    return selected_bwd_chunk
