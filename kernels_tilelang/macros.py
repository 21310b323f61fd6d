"""Pieces that two or more programs use."""

import tilelang.language as T

LOG2E = 1.4426950408889634


@T.macro
def exp_rows(acc_s, row_max, row_sum, rows, S, scale_log2, length):
    """acc_s = exp2((acc_s - row_max) * scale_log2) and row_sum, its sum over the chunk; length None: S real keys."""
    if length is not None:
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], -T.infinity("float32"))
    T.reduce_max(acc_s, row_max, dim=1, clear=True)
    for r in T.Parallel(rows):
        row_max[r] = row_max[r] * scale_log2
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = T.exp2(acc_s[r, s] * scale_log2 - row_max[r])  # one FFMA an element
    if length is not None:  # again: -inf * 0 is no number
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], 0.0)
    T.reduce_sum(acc_s, row_sum, dim=1)


@T.macro
def softmax_and_delta(acc_s, acc_dp, row_max, row_sum, delta, rows, S, scale_log2, length):
    """acc_s = P, the softmax of the scores in it; acc_dp = P * dP of the dP in it; delta = rowsum(P * dP)."""
    exp_rows(acc_s, row_max, row_sum, rows, S, scale_log2, length)
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = acc_s[r, s] / row_sum[r]
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = acc_dp[r, s] * acc_s[r, s]
    T.reduce_sum(acc_dp, delta, dim=1)


@T.macro
def weigh_rows(acc_s, acc_dp, row_sum, row_weight, delta, rows, S, real, scale):
    """acc_s = w P and acc_dp = scale * dS of exp_rows' result and the dP in it, 0 from row `real` on.

    delta = rowsum(P * dP). P is never normalised by itself: 1 / row_sum goes into the weight and into delta.
    """
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = acc_dp[r, s] * acc_s[r, s]
    T.reduce_sum(acc_dp, delta, dim=1)
    for r in T.Parallel(rows):
        delta[r] = delta[r] / row_sum[r]
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = acc_dp[r, s] - acc_s[r, s] * delta[r]
    for r in T.Parallel(rows):
        row_weight[r] = row_weight[r] / row_sum[r]
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = T.if_then_else(r < real, row_weight[r] * acc_s[r, s], 0.0)
    for r in T.Parallel(rows):
        row_weight[r] = row_weight[r] * scale
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = T.if_then_else(r < real, row_weight[r] * acc_dp[r, s], 0.0)


def chunk_or_spare(index, num_chunks, spare):
    """The chunk to read for a slot: its own, or for an empty one, whose weight is 0, a chunk that the token chose.

    Any other chunk might hold an inf or nan that the token must not see: 0 * nan is nan. A token that chose none
    (spare -1) reads chunk 0, and its result is replaced by 0.
    """
    return T.if_then_else((index >= 0) & (index < num_chunks), index, T.max(spare, 0))
