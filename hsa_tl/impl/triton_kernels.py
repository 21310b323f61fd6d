"""Triton kernels of attention to chosen chunks, with a softmax for each chunk or, where weights is None, one for all.

    o[t, c] = softmax(q[t] . k[c]^T * scale) v[c]          out[t] = sum over slots of weights[t, slot] * o[t, c(slot)]

forward_kernel  one program owns a token and a KV head: its G query rows stay, the K selected chunks stream past.
                With a page_table, in decode, they come from its pages, and one of `splits` ranges of slots is its own.
dq_kernel       the same walk once more; recomputes the probabilities and gives dq and dweights.
dkdv_kernel     one program owns a chunk: its keys and values stay, the tokens that selected it are gathered through
                the inverted index, and dk and dv are summed in registers. No atomics: every sum has a fixed order.

One softmax for all chunks has a running maximum; forward also gives lse, from which backward takes the probabilities.
Its dq_kernel leaves delta = rowsum(do * out) - dlse for dkdv_kernel. A chunk then stands once in a row of indices.
"""

from __future__ import annotations

import math

from hsa_tl.impl.triton_launch import piece, tl

# The kernels are plain functions here; form() makes the compiled or the interpreted form. Reductions name their
# combine function because tl.max and tl.sum, jitted when triton was imported, cannot be called by the interpreter.

_LOG2E = tl and tl.constexpr(math.log2(math.e))


@piece
def add_tile(acc_s, v_tile, row_max, row_sum, acc_o):
    """A softmax that runs on, with one more tile of scores for exp2: its maximum, sum and output times that sum."""
    new_max = tl.maximum(row_max, tl.reduce(acc_s, 1, tl.standard._elementwise_max))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key so far
    p = tl.exp2(acc_s - base[:, None])
    alpha = tl.exp2(row_max - base)
    row_sum = row_sum * alpha + tl.reduce(p, 1, tl.standard._sum_combine)
    acc_o = acc_o * alpha[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    return new_max, row_sum, acc_o


@piece
def finish(row_max, row_sum, acc_o):
    """out and lse of such a softmax: 0 and -inf of a row without keys."""
    some = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc_o / some[:, None], (row_max + tl.log2(some)) / _LOG2E


@piece
def softmax_of(acc_s):
    """The softmax of each row times its sum, and that."""
    p = tl.exp2(acc_s - tl.reduce(acc_s, 1, tl.standard._elementwise_max)[:, None])
    return p, tl.reduce(p, 1, tl.standard._sum_combine)


@piece
def find_chunk(indices, page_table, slot, N, K):
    """A slot's chunk, or its page in decode: out of range if there is none."""
    chunk = tl.load(indices + slot, mask=slot < K, other=-1)
    if page_table is not None:
        chunk = tl.load(page_table + chunk, mask=(chunk >= 0) & (chunk < N), other=-1)
    return chunk


@piece
def slots_to_walk(indices, slots, N, K):
    """Causal rows have their empty slots last: a walk stops behind the last chunk."""
    chosen = tl.load(indices + slots, mask=slots < K, other=-1)
    ends = tl.where((chosen >= 0) & (chosen < N), slots + 1, 0)
    return tl.reduce(ends, 0, tl.standard._elementwise_max)


@piece
def load_weight(weights, slot, heads, valid, G, K, PER_HEAD):
    """[ROWS], or one for all rows; None where weights is."""
    if PER_HEAD:
        return tl.load(weights + heads * K + slot, mask=heads < tl.where(valid, G, 0), other=0.0)
    elif weights is not None:
        return tl.load(weights + slot, mask=valid, other=0.0)


@piece
def load_chunk(k, v, chunk, kv_at, cols, valid, chunk_elements, D):
    """Keys and values [S, D]. An empty slot reads zeros: a branch here would stop the loads from being pipelined."""
    tile = chunk.to(tl.int64) * chunk_elements
    mask = (cols < tl.where(valid, D, 0))[None, :]
    return tl.load(k + tile + kv_at, mask=mask, other=0.0), tl.load(v + tile + kv_at, mask=mask, other=0.0)


@piece
def scores_of(q_tile, k_tile, chunk, chunk_len, keys, valid, scale_log2, S):
    """[ROWS, S], for exp2; -inf behind the end of a short chunk."""
    acc_s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale_log2
    if chunk_len is not None:
        length = tl.maximum(tl.load(chunk_len + chunk, mask=valid, other=S), 1)
        acc_s = tl.where((keys < length)[None, :], acc_s, float("-inf"))
    return acc_s


def forward_kernel(
    q, k, v, weights, indices, page_table, chunk_len, out, lse, T, N, P, splits, scale_log2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    if page_table is not None:
        i_split = i_t % splits
        i_t = i_t // splits
    row = (i_b.to(tl.int64) * T + i_t) * H + i_h
    heads = tl.arange(0, ROWS)
    keys = tl.arange(0, S)
    cols = tl.arange(0, BLOCK_D)

    q_at = heads[:, None] * D + cols[None, :]
    kv_at = keys[:, None] * (H * D) + cols[None, :]
    indices += row * K
    q_mask = (heads < G)[:, None] & (cols < D)[None, :]
    q_tile = tl.load(q + row * (G * D) + q_at, mask=q_mask, other=0.0)  # [ROWS, D]
    acc_o = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    if weights is not None:
        weights += row * (G * K if PER_HEAD else K)
    else:
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.full([ROWS], 0.0, tl.float32)

    if page_table is not None:
        page_table += i_b.to(tl.int64) * N
        k += i_h * D
        v += i_h * D
        first = i_split * SLOTS
        stop = first + SLOTS
        chunks = P
        at = row * splits + i_split
    else:
        k += (i_b.to(tl.int64) * (N * H) * S + i_h) * D
        v += (i_b.to(tl.int64) * (N * H) * S + i_h) * D
        first = 0
        stop = slots_to_walk(indices, tl.arange(0, SLOTS), N, K)
        chunks = N
        at = row
    # The next chunk is looked up one slot ahead, or Triton would spend the pipeline stages of k and v on it.
    ahead = find_chunk(indices, page_table, first, N, K)
    for slot in range(first, stop):
        valid = (ahead >= 0) & (ahead < chunks)
        chunk = tl.where(valid, ahead, 0)
        ahead = find_chunk(indices, page_table, slot + 1, N, K)
        w = load_weight(weights, slot, heads, valid, G, K, PER_HEAD)
        k_tile, v_tile = load_chunk(k, v, chunk, kv_at, cols, valid, S * H * D, D)

        acc_s = scores_of(q_tile, k_tile, chunk, chunk_len, keys, valid, scale_log2, S)
        if weights is None:
            acc_s = tl.where(valid, acc_s, float("-inf"))
            row_max, row_sum, acc_o = add_tile(acc_s, v_tile, row_max, row_sum, acc_o)
        else:
            p, row_sum = softmax_of(acc_s)
            acc_o += tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee") * (w / row_sum)[:, None]

    if weights is None:
        acc_o, row_lse = finish(row_max, row_sum, acc_o)
        tl.store(lse + at * G + heads, row_lse, mask=heads < G)
    tl.store(out + at * (G * D) + q_at, acc_o.to(out.dtype.element_ty), mask=q_mask)


def dq_kernel(
    do, q, k, v, weights, indices, chunk_len, out, lse, dlse, delta, dq, dweights, T, N, scale, scale_log2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b.to(tl.int64) * T + tl.program_id(0)) * H + i_h
    heads = tl.arange(0, ROWS)
    keys = tl.arange(0, S)
    cols = tl.arange(0, BLOCK_D)

    q_at = heads[:, None] * D + cols[None, :]
    kv_at = keys[:, None] * (H * D) + cols[None, :]
    base = row * (G * D)
    indices += row * K
    k += (i_b.to(tl.int64) * (N * H) * S + i_h) * D
    v += (i_b.to(tl.int64) * (N * H) * S + i_h) * D
    q_mask = (heads < G)[:, None] & (cols < D)[None, :]
    q_tile = tl.load(q + base + q_at, mask=q_mask, other=0.0)  # [ROWS, D]
    do_tile = tl.load(do + base + q_at, mask=q_mask, other=0.0)
    acc_dq = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)

    if weights is not None:
        weights += row * (G * K if PER_HEAD else K)
        dweights += row * (G * K if PER_HEAD else K)
    else:
        lse2 = tl.load(lse + row * G + heads, mask=heads < G, other=0.0) * _LOG2E
        out_tile = tl.load(out + base + q_at, mask=q_mask, other=0.0)
        row_delta = tl.reduce(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1, tl.standard._sum_combine)
        row_delta -= tl.load(dlse + row * G + heads, mask=heads < G, other=0.0)
        tl.store(delta + row * G + heads, row_delta, mask=heads < G)
    ahead = find_chunk(indices, None, 0, N, K)
    for slot in range(0, slots_to_walk(indices, tl.arange(0, SLOTS), N, K)):
        valid = (ahead >= 0) & (ahead < N)
        chunk = tl.where(valid, ahead, 0)
        ahead = find_chunk(indices, None, slot + 1, N, K)
        w = load_weight(weights, slot, heads, valid, G, K, PER_HEAD)
        k_tile, v_tile = load_chunk(k, v, chunk, kv_at, cols, valid, S * H * D, D)

        acc_s = scores_of(q_tile, k_tile, chunk, chunk_len, keys, valid, scale_log2, S)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        if weights is None:
            acc_s = tl.where(valid, acc_s, float("-inf"))
            ds = tl.exp2(acc_s - lse2[:, None]) * (dp - row_delta[:, None])
        else:
            p, row_sum = softmax_of(acc_s)
            row_delta = tl.reduce(p * dp, 1, tl.standard._sum_combine) / row_sum
            if PER_HEAD:
                tl.store(dweights + heads * K + slot, row_delta, mask=heads < G)
            else:
                tl.store(dweights + slot, tl.reduce(row_delta, 0, tl.standard._sum_combine))
            ds = p * (w / row_sum)[:, None] * (dp - row_delta[:, None])
        acc_dq += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")

    tl.store(dq + base + q_at, (acc_dq * scale).to(dq.dtype.element_ty), mask=q_mask)


def dkdv_kernel(
    do, q, k, v, weights, chunk_len, lse, delta, pair, offsets, dk, dv, T, N, splits, scale, scale_log2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    i_c = tl.program_id(0) // splits
    i_split = tl.program_id(0) % splits
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    rows = tl.arange(0, ROWS)
    keys = tl.arange(0, S)
    cols = tl.arange(0, BLOCK_D)
    TOKENS: tl.constexpr = ROWS // G
    token = rows // G
    head = rows % G

    # Transposed here, not in the loop: the loop would write both tiles to shared memory again for every block of rows.
    tile = ((i_b * N + i_c).to(tl.int64) * (S * H) + i_h) * D
    kv_at = keys[:, None] * (H * D) + cols[None, :]
    kv_mask = (keys < S)[:, None] & (cols < D)[None, :]
    k_tile = tl.trans(tl.load(k + tile + kv_at, mask=kv_mask, other=0.0))  # [D, S]
    v_tile = tl.trans(tl.load(v + tile + kv_at, mask=kv_mask, other=0.0))
    acc_dk = tl.full([BLOCK_D, S], 0.0, tl.float32)
    acc_dv = tl.full([BLOCK_D, S], 0.0, tl.float32)
    if chunk_len is not None:
        key_mask = (keys < tl.maximum(tl.load(chunk_len + i_c), 1))[None, :]

    segment = (i_b * H + i_h).to(tl.int64) * N + i_c
    start = tl.load(offsets + segment) + i_split * TOKENS
    count = (tl.load(offsets + segment + 1) - start).to(tl.int32)
    if TOKENS * G < ROWS:
        token = tl.where(token < TOKENS, token, 2**30)  # rows without a token: masked
    for first in range(0, count, splits * TOKENS):
        mask = token < count - first
        at = tl.load(pair + (start + first) + token, mask=mask, other=0)
        row = (i_b.to(tl.int64) * T + at // K) * H + i_h
        q_at = (row * G + head)[:, None] * D + cols[None, :]
        q_mask = mask[:, None] & (cols < D)[None, :]
        q_tile = tl.load(q + q_at, mask=q_mask, other=0.0)  # [ROWS, D]
        do_tile = tl.load(do + q_at, mask=q_mask, other=0.0)
        if PER_HEAD:
            w = tl.load(weights + (row * G + head) * K + at % K, mask=mask, other=0.0)
        elif weights is not None:
            w = tl.load(weights + row * K + at % K, mask=mask, other=0.0)
        else:
            lse2 = tl.load(lse + row * G + head, mask=mask, other=0.0) * _LOG2E
            row_delta = tl.load(delta + row * G + head, mask=mask, other=0.0)

        acc_s = tl.dot(q_tile, k_tile, input_precision="ieee") * scale_log2  # [ROWS, S]
        if WANT_DK:
            dp = tl.dot(do_tile, v_tile, input_precision="ieee")
        if chunk_len is not None:
            acc_s = tl.where(key_mask, acc_s, float("-inf"))
        if weights is None:
            pw = tl.exp2(acc_s - lse2[:, None])
        else:
            p, row_sum = softmax_of(acc_s)
            pw = p * (w / row_sum)[:, None]
        # [D, S] and not [S, D]: p and ds then go to the tensor cores from shared memory, not from registers.
        if WANT_DK:
            if weights is not None:
                row_delta = tl.reduce(p * dp, 1, tl.standard._sum_combine) / row_sum
            ds = pw * (dp - row_delta[:, None])
            acc_dk += tl.dot(tl.trans(q_tile), ds.to(q_tile.dtype), input_precision="ieee")  # [D, S]
        if WANT_DV:
            acc_dv += tl.dot(tl.trans(do_tile), pw.to(do_tile.dtype), input_precision="ieee")

    tile += (i_split * tl.num_programs(2)).to(tl.int64) * N * (S * H * D)
    if WANT_DK:
        tl.store(dk + tile + kv_at, tl.trans(acc_dk * scale).to(dk.dtype.element_ty), mask=kv_mask)
    if WANT_DV:
        tl.store(dv + tile + kv_at, tl.trans(acc_dv).to(dv.dtype.element_ty), mask=kv_mask)
