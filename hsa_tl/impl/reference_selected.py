"""One softmax over the chosen chunks in PyTorch: what impl="auto" runs on a CPU.

Chunk stationary, on the blocks of `reference`. A block of forward gives its rows' P V and the sums of P = exp(scores),
each up to 2^shift; rows of the same token are merged as they come, and divided by their sum at the end. Backward takes
P from the saved lse, in one pass: with dP = do V^T and delta = rowsum(do out) it adds

    dq += scale dS K      dk += scale dS^T q      dv += P^T do      where dS = P (dP - delta + dlse)

Decode gathers pages as `reference_decode` does, and has the softmax of a row's slots together.
"""

import math

import torch

from hsa_tl import workers
from hsa_tl.impl import reference, reference_decode

FORWARD_NEEDS_PAIRS = True

_LOG2E = math.log2(math.e)


def unavailable(problem):
    """Why this implementation cannot run the problem: it always can."""
    return None


@workers.one_thread
def forward(q, k, v, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] and lse [B, T, HQ]; shapes as in `reference.forward`, a chunk once in a row of indices."""
    reference.check_config(config)
    if not pairs.offsets[-1]:
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        return q.new_zeros(q.shape), lse
    plan = reference._Plan(q, k, v, None, indices, pairs, chunk_len, scale)
    G, D = plan.G, plan.D
    out, row_sum = plan.zeros(*q.shape), plan.zeros(*q.shape[:3], 1)
    # What rows are shifted by so far; without use where no block shifts any.
    bounded = all(plan.unshifted)
    shifts = torch.full_like(row_sum, 0 if bounded else -math.inf)
    q_heads, out_heads, sum_heads, shift_heads = (plan.heads(x) for x in (q, out, row_sum, shifts))
    row_buffers = workers.Spare(lambda: plan.buffer(D))

    def multiply(block, p_buffer):
        head, segment, L, start, stop = block
        t, n = plan.t[start:stop], stop - start
        padded = math.ceil(n * G / reference._ROWS_MULTIPLE) * reference._ROWS_MULTIPLE
        buffer = row_buffers.take()
        rows, p = buffer[: padded * D].view(padded, D), p_buffer[: padded * L].view(padded, L)

        reference._gather(q_heads[head], t, rows[: n * G].view(n, G, D))
        scores = plan.scores(rows, segment, out=p)[: n * G]
        shift = plan.shift(scores, head, segment, t)
        if shift is not None:
            scores.sub_(shift)
        sums = scores.exp2_().sum(-1).view(n, G, 1)
        torch.mm(p, plan.v[segment][:L], out=rows)
        return head, t, rows[: n * G].view(n, G, D), sums, shift, buffer

    def add(result):
        head, t, rows, sums, shift, buffer = result
        totals = (out_heads[head], rows), (sum_heads[head], sums)
        if bounded:
            for total, x in totals:
                reference._add_rows(total, t, x)
        else:
            t = t.long()
            before = shift_heads[head].index_select(0, t)
            shift = torch.zeros_like(before) if shift is None else shift.view_as(before)
            after = torch.maximum(before, shift)
            shift_heads[head].index_copy_(0, t, after)
            for total, x in totals:  # a token chose a chunk once, so no two rows of a block are of the same
                x.mul_((shift - after).exp2_()).addcmul_(total.index_select(0, t), (before - after).exp2_())
                total.index_copy_(0, t, x)
        row_buffers.give(buffer)

    workers.each(plan.blocks, multiply, add, scratch=lambda: plan.buffer(plan.S))
    out /= row_sum.masked_fill(row_sum == 0, 1)
    lse = row_sum.log2_().add_(shifts).div_(_LOG2E)
    return out.to(q.dtype), lse[..., 0]


@workers.one_thread
def backward(do, dlse, q, k, v, indices, out, lse, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv), shaped and typed as q, k, v; always deterministic."""
    if not pairs.offsets[-1]:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    plan = reference._Plan(q, k, v, None, indices, pairs, chunk_len, scale)
    G, S, D = plan.G, plan.S, plan.D
    gradients = reference._Gradients(plan, scale)
    delta = torch.einsum("bthd,bthd->bth", do.to(plan.dtype), out.to(plan.dtype)).sub_(dlse)
    do_heads, q_heads, delta_heads, lse_heads = (
        plan.heads(x) for x in (do, q, delta[..., None], lse[..., None] * _LOG2E)
    )
    row_buffers = workers.Spare(lambda: plan.buffer(D))

    def multiply(block, scratch):
        head, segment, L, start, stop = block
        t, n = plan.t[start:stop], stop - start
        buffer = row_buffers.take()
        do_rows, q_rows = (x[: n * G * D].view(n * G, D) for x in (buffer, scratch[0]))
        p, ds = (x[: n * G * L].view(n * G, L) for x in scratch[1:])

        reference._gather(q_heads[head], t, q_rows.view(n, G, D))
        reference._gather(do_heads[head], t, do_rows.view(n, G, D))
        plan.scores(q_rows, segment, out=p).sub_(lse_heads[head].index_select(0, t).view(-1, 1)).exp2_()
        torch.mm(do_rows, plan.v_t[segment][:, :L], out=ds)
        ds.sub_(delta_heads[head].index_select(0, t).view(-1, 1)).mul_(p)

        products = reference._product(ds, q_rows), reference._product(p, do_rows)
        torch.addmm(do_rows, ds, plan.k[segment][:L], beta=0, alpha=scale, out=do_rows)
        return block, t, do_rows.view(n, G, D), products, buffer

    def add(result):
        *sums, buffer = result
        gradients.add(*sums)
        row_buffers.give(buffer)

    workers.each(plan.blocks, multiply, add, scratch=lambda: [plan.buffer(x) for x in (D, S, S)])
    return gradients.results(q.dtype)


@workers.one_thread
def decode(q, k_pages, v_pages, indices, page_table, scale):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    row, valid, step = reference_decode.slots(q, k_pages, indices, page_table)
    rows = q.reshape(len(row), q.shape[2] // indices.shape[2], q.shape[3])  # [rows, G, D]
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    lse = torch.empty(rows.shape[:2], dtype=dtype, device=q.device)

    def attend(start, _):
        part = slice(start, start + step)
        k, v = (reference_decode.gather(x, row[part]).to(dtype) for x in (k_pages, v_pages))  # [n, K, S, D]
        p = (rows[part, None].to(dtype) @ k.mT).mul_(scale)  # [n, K, G, S]
        p.masked_fill_(~valid[part, :, None, None], -math.inf)
        lse[part] = p.logsumexp((1, 3))
        p.sub_(lse[part, None, :, None]).exp_()  # NaN of a row without keys
        out[part] = (p @ v).sum(1).masked_fill(~valid[part].any(-1)[:, None, None], 0)

    workers.each(range(0, len(row), step), attend)
    return out.view(q.shape), lse.view(q.shape[:3])
