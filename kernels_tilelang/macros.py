"""Pieces that two or more programs use."""

import tilelang.language as T

LOG2E = 1.4426950408889634
PAIR = 2  # rows that a thread has in each 16 of a product: where warps share rows, both meet at one barrier


def split_begins(begin, end, segment, i_s, splits):
    """Where split i_s of the segment's pairs begins, of so many equal ones of pair[begin : end]."""
    return begin[segment] + (end[segment] - begin[segment]) * i_s // splits


@T.macro
def exp_rows(acc_s, row_max, row_sum, rows, S, scale_log2, length):
    """acc_s = exp2((acc_s - row_max) * scale_log2) and row_sum, its sum over the chunk; length None: S real keys."""
    if length is not None and length < S:
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], -T.infinity("float32"))
    T.reduce_max(acc_s, row_max, dim=1, clear=True, batch=PAIR)
    for r in T.Parallel(rows):
        row_max[r] = row_max[r] * scale_log2
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = T.exp2(acc_s[r, s] * scale_log2 - row_max[r])  # one FFMA an element
    if length is not None and length < S:  # again: -inf * 0 is no number
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], 0.0)
    T.reduce_sum(acc_s, row_sum, dim=1, batch=PAIR)


@T.macro
def weighted_output(q, k, v, acc_s, acc_p, acc_o, row_max, row_sum, row_weight, rows, S, scale_log2, length):
    """acc_o [rows, D] = row_weight * softmax(q k^T) v over one chunk; the weight over the row sum goes into P."""
    T.clear(acc_s)
    T.gemm(q, k, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)  # [rows, S]
    exp_rows(acc_s, row_max, row_sum, rows, S, scale_log2, length)
    for r in T.Parallel(rows):
        row_sum[r] = row_weight[r] / row_sum[r]
    for r, s in T.Parallel(rows, S):
        acc_p[r, s] = acc_s[r, s] * row_sum[r]
    T.clear(acc_o)
    T.gemm(acc_p, v, acc_o, policy=T.GemmWarpPolicy.FullRow)  # [rows, D]


@T.macro
def store_pairs(acc_o, o_shared, slot_shared, stage, left, first_row, partial, i_b, i_h):
    """partial[i_b, i_h, slot - first_row] = the G rows of each of the tile's first `left` pairs."""
    rows, D = acc_o.shape
    G = partial.shape[3]
    T.copy(acc_o, o_shared)  # a fragment's neighbours are 4 bytes; from here they are 16
    for r, d in T.Parallel(rows, D):
        if r // G < left:
            partial[i_b, i_h, slot_shared[stage, r // G] - first_row, r % G, d] = o_shared[r, d]


@T.macro
def add_pairs(acc_o, slot_shared, stage, left, K, partial, i_b, i_h):
    """partial[i_b, slot // K, i_h] += the G rows of each of the tile's first `left` pairs."""
    rows, D = acc_o.shape
    G = partial.shape[3]
    for r, d in T.Parallel(rows, D):
        if r // G < left:
            T.atomic_add(partial[i_b, slot_shared[stage, r // G] // K, i_h, r % G, d], acc_o[r, d])


@T.macro
def gather_rows(row_of, q, dout, q_rows, do_rows, q_shared, do_shared):
    """q_shared, do_shared [rows, D] = the rows of q and dout at row_of(r), their first four indices.

    By way of registers, so that all loads are under way together: one whose address comes from shared memory waits for
    every store there before it.
    """
    for r, d in T.Parallel(*q_rows.shape):
        q_rows[r, d] = q[(*row_of(r), d)]
    for r, d in T.Parallel(*do_rows.shape):
        do_rows[r, d] = dout[(*row_of(r), d)]
    T.copy(q_rows, q_shared)
    T.copy(do_rows, do_shared)


@T.macro
def tile_products(q, k, dout, v, acc_s, acc_dp):
    """acc_s = q k^T and acc_dp = dout v^T, both [rows, S]."""
    T.clear(acc_s)
    T.gemm(q, k, acc_s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
    T.clear(acc_dp)
    T.gemm(dout, v, acc_dp, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)


@T.macro
def gradient_products(acc_s, acc_dp, p_shared, ds_shared, q, dout, k, acc_dq, acc_dk, acc_dv):
    """Of P in acc_s and dS in acc_dp: acc_dv += P^T dout and acc_dk += dS^T q, both [S, D]; acc_dq = dS k [rows, D]."""
    T.copy(acc_s, p_shared)
    T.copy(acc_dp, ds_shared)
    T.gemm(p_shared, dout, acc_dv, transpose_A=True, policy=T.GemmWarpPolicy.FullCol)
    T.gemm(ds_shared, q, acc_dk, transpose_A=True, policy=T.GemmWarpPolicy.FullCol)
    T.clear(acc_dq)
    T.gemm(ds_shared, k, acc_dq, policy=T.GemmWarpPolicy.FullRow)


@T.macro
def add_gradient(acc, x, i_s, i_b, i_c, i_h):
    """The chunk's rows of x [splits, B, N, S, H, D] += acc. First all loads: one behind a store would wait for it."""
    for s, d in T.Parallel(*acc.shape):
        acc[s, d] = acc[s, d] + x[i_s, i_b, i_c, s, i_h, d]
    for s, d in T.Parallel(*acc.shape):
        x[i_s, i_b, i_c, s, i_h, d] = acc[s, d]


@T.macro
def softmax_and_delta(acc_s, acc_dp, row_max, row_sum, delta, rows, S, scale_log2, length):
    """acc_s = P, the softmax of the scores in it; acc_dp = P * dP of the dP in it; delta = rowsum(P * dP)."""
    exp_rows(acc_s, row_max, row_sum, rows, S, scale_log2, length)
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = acc_s[r, s] / row_sum[r]
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = acc_dp[r, s] * acc_s[r, s]
    T.reduce_sum(acc_dp, delta, dim=1, batch=PAIR)


@T.macro
def weigh_rows(acc_s, acc_dp, row_sum, row_weight, delta, rows, S, real, scale):
    """acc_s = w P and acc_dp = scale * dS of exp_rows' result and the dP in it, 0 from row `real` on.

    delta = rowsum(P * dP). P is never normalised by itself: 1 / row_sum goes into the weight and into delta.
    """
    for r, s in T.Parallel(rows, S):
        acc_dp[r, s] = acc_dp[r, s] * acc_s[r, s]
    T.reduce_sum(acc_dp, delta, dim=1, batch=PAIR)
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


def segment_of(index, head, num_chunks, heads):
    """Where the pairs of a slot stand: segment head * num_chunks + chunk, or behind all chunks an empty slot's."""
    return T.if_then_else((index >= 0) & (index < num_chunks), head * num_chunks + index, heads * num_chunks + head)


@T.macro
def load_slots(indices, weights, order, chunk_shared, weights_shared, first, tokens, tile, K, heads_w, i_h, i_b):
    """The tile's chunks [tile, K] and weights [tile * heads_w, K], each token's slots in ascending order of chunk."""
    for t, i_k in T.Parallel(tile, K):
        i_t = T.min(first + t, tokens - 1)
        chunk_shared[t, i_k] = indices[i_b, i_t, i_h, order[i_b, i_t, i_h, i_k]]
    if weights is not None:
        for t, i_k in T.Parallel(tile * heads_w, K):
            i_t = T.min(first + t // heads_w, tokens - 1)
            weights_shared[t, i_k] = weights[i_b, i_t, i_h, t % heads_w, order[i_b, i_t, i_h, i_k]]


@T.macro
def union_weights(row_sum, cursor, chunk, chunk_shared, weights_shared, first, rows, G, tile, heads_w):
    """row_sum = weight / row_sum for a row whose token chose the chunk, and on to its next slot; 0 for the others."""
    K = chunk_shared.shape[1]
    for r in T.Parallel(rows):
        t = T.min((first + r) // G, tile - 1)
        i_k = T.min(cursor[r], K - 1)
        chosen = (cursor[r] < K) & (chunk_shared[t, i_k] == chunk)
        weight = weights_shared[t * heads_w + T.min((first + r) % G, heads_w - 1), i_k]
        row_sum[r] = T.if_then_else(chosen, weight / row_sum[r], 0.0)
        cursor[r] = cursor[r] + T.if_then_else(chosen, 1, 0)


@T.macro
def running_rows(acc_s, acc_o, row_max, row_last, row_sum, row_part, chosen, rows, S, scale_log2, length):
    """One softmax over chunk after chunk: acc_s = exp2(scores - row_max), row_max in base 2 the largest so far.

    row_sum and acc_o follow a row_max that rises. A row that did not choose the chunk (chosen 0) adds nothing.
    """
    if length is not None:
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], -T.infinity("float32"))
    T.copy(row_max, row_last)
    T.reduce_max(acc_s, row_max, dim=1, clear=True, batch=PAIR)
    for r in T.Parallel(rows):
        row_max[r] = T.if_then_else(chosen[r] > 0, T.max(row_last[r], row_max[r] * scale_log2), row_last[r])
    for r, s in T.Parallel(rows, S):
        acc_s[r, s] = T.if_then_else(chosen[r] > 0, T.exp2(acc_s[r, s] * scale_log2 - row_max[r]), 0.0)
    if length is not None:  # again: -inf * 0 is no number
        for r, s in T.Parallel(rows, S):
            acc_s[r, s] = T.if_then_else(s < length, acc_s[r, s], 0.0)
    T.reduce_sum(acc_s, row_part, dim=1, batch=PAIR)
    for r in T.Parallel(rows):  # the first chunk: -inf - -inf is no number, and there is nothing to scale
        row_last[r] = T.if_then_else(row_last[r] == row_max[r], 1.0, T.exp2(row_last[r] - row_max[r]))
    for r in T.Parallel(rows):
        row_sum[r] = row_sum[r] * row_last[r] + row_part[r]
    for r, d in T.Parallel(rows, acc_o.shape[1]):
        acc_o[r, d] = acc_o[r, d] * row_last[r]


@T.macro
def finish_rows(acc_o, row_max, row_sum, rows):
    """acc_o over row_sum, 0 without keys, and in row_max the natural log-sum-exp, -inf without keys."""
    for r, d in T.Parallel(rows, acc_o.shape[1]):
        acc_o[r, d] = T.if_then_else(row_sum[r] == 0, 0.0, acc_o[r, d] / row_sum[r])
    for r in T.Parallel(rows):
        row_max[r] = (row_max[r] + T.log2(row_sum[r])) / LOG2E


@T.macro
def union_chosen(chosen, cursor, chunk, chunk_shared, rows, G, tile):
    """chosen = 1 for a row whose token chose the chunk, and on to its next slot; 0 for the others."""
    K = chunk_shared.shape[1]
    for r in T.Parallel(rows):
        t = T.min(r // G, tile - 1)
        hit = (cursor[r] < K) & (chunk_shared[t, T.min(cursor[r], K - 1)] == chunk)
        chosen[r] = T.if_then_else(hit, 1, 0)
        cursor[r] = cursor[r] + chosen[r]
