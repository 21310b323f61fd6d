"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: token-stationary forward.

As hsa_fwd_token, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises.
Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
"""

from dataclasses import dataclass
from typing import ClassVar

import tilelang.language as T

from hsa_tl.kernels_tilelang.hsa_fwd_token import FwdTokenConfig, forward_of_token


@dataclass(frozen=True)
class SelectedFwdTokenConfig(FwdTokenConfig):
    """As FwdTokenConfig."""

    DIRECTION: ClassVar[str] = "selected_forward"


def selected_fwd_token(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdTokenConfig):
    B, tokens, N, H = T.dynamic("B, tokens, N, H")

    @T.prim_func
    def selected_fwd_token(
        q: T.Tensor((B, tokens, H, G, D), dtype),
        k: T.Tensor((B, N, S, H, D), dtype),
        v: T.Tensor((B, N, S, H, D), dtype),
        indices: T.Tensor((B, tokens, H, K), "int32"),
        spare: T.Tensor((B, tokens, H), "int32"),
        chunk_len: T.Tensor((N,), "int32"),
        scale: T.float32,
        out: T.Tensor((B, tokens, H, G, D), dtype),
        lse: T.Tensor((B, tokens, H, G), "float32"),
    ):
        forward_of_token(
            q, k, v, None, indices, spare, chunk_len, scale, out, lse, G, D, S, K, 1, masked, dtype, min_blocks, config
        )

    return selected_fwd_token
