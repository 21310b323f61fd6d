"""out[t] = softmax(q[t] . K^T * scale) V over the keys of all chunks that token t chose: union-tile forward.

As hsa_fwd_union, with one softmax over all chunks: a running maximum, and the output is rescaled when it rises. A row
that did not choose the chunk adds nothing. Each chunk stands once in a row of indices. lse is the natural log-sum-exp.
Keys and values must be finite, as there.
"""

from hsa_tl.kernels_tilelang.hsa_fwd_union import FwdUnionConfig, hsa_fwd_union


class SelectedFwdUnionConfig(FwdUnionConfig):
    DIRECTION = "selected_forward"


def selected_fwd_union(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedFwdUnionConfig):
    return hsa_fwd_union(
        G=G, D=D, S=S, K=K, heads_w=1, masked=masked, dtype=dtype, min_blocks=min_blocks, config=config, weighs=False
    )
