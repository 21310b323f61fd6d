"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: token-stationary forward.

As hsa_fwd_token, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises.
Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
"""

from hsa_tl.kernels_tilelang.hsa_fwd_token import FwdTokenConfig, hsa_fwd_token


class SelectedFwdTokenConfig(FwdTokenConfig):
    DIRECTION = "selected_forward"


def selected_fwd_token(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdTokenConfig):
    return hsa_fwd_token(
        G=G, D=D, S=S, K=K, heads_w=1, masked=masked, dtype=dtype, min_blocks=min_blocks, config=config, weighs=False
    )
