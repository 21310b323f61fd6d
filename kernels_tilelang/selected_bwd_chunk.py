"""dq, dk, dv of softmax(q[t] . K^T * scale) V over all chunks that token t chose: one pass, chunk-stationary.

P = exp(scores - lse) and dS = P * (dP - delta), dP = dout V^T, delta = rowsum(dout * out) - dlse: with lse saved, a
pair needs nothing of the others. As hsa_bwd_chunk otherwise: dk and dv in registers, a row of dq for each pair.
"""

from hsa_tl.kernels_tilelang.hsa_bwd_chunk import BwdChunkConfig, hsa_bwd_chunk


class SelectedBwdChunkConfig(BwdChunkConfig):
    DIRECTION = "selected_backward"
    weighs = False


def selected_bwd_chunk(*, G, D, S, K, masked, dtype, min_blocks, config: SelectedBwdChunkConfig):
    return hsa_bwd_chunk(
        G=G, D=D, S=S, K=K, heads_w=1, masked=masked, dtype=dtype, min_blocks=min_blocks, config=config
    )
