"""One softmax over the chosen chunks in PyTorch: what impl="auto" runs on a CPU.

Chunk stationary, on the blocks of `reference`. A block of forward gives its rows' P V and the sums of P = exp(scores),
each up to 2^shift; rows of the same token are merged as they come, and divided by their sum at the end. Backward takes
P from the saved lse, in one pass: with dP = do V^T and delta = rowsum(do out) it adds

    dq += scale dS K      dk += scale dS^T q      dv += P^T do      where dS = P (dP - delta + dlse)
"""

import math

import torch

from hsa_tl import workers
from hsa_tl.impl import reference, reference_decode
from hsa_tl.pairs import sort_pairs

_LOG2E = math.log2(math.e)


def forward(q, k, v, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] and lse [B, T, HQ]; shapes as in `reference.forward`, a chunk once in a row of indices."""
    reference.check_config(config)
    pairs = pairs or sort_pairs(indices, k.shape[1])
    if not pairs.offsets[-1]:
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        return q.new_zeros(q.shape), lse
    plan = reference.Plan(q, k, v, None, indices, pairs, chunk_len, scale)
    q_heads = plan.heads(q)
    out, row_sum = torch.zeros_like(q_heads), torch.zeros_like(plan.q_norm)
    # What rows are shifted by so far; without use where no block shifts any.
    bounded = all(block.bounded for block in plan.blocks)
    shifts = torch.full_like(row_sum, 0 if bounded else -math.inf)

    def multiply(block):
        p = plan.product(plan.rows(q_heads, block), plan.keys(plan.k_scaled, block))  # [1, rows, keys]
        shift = plan.shift(p, 2, block)
        if shift is not None:
            p.sub_(shift[..., None])
        sums = p.exp2_().sum(2)
        rows = plan.product(p, plan.keys(plan.v, block).mT)
        return block, *(x if x is None else x.view(len(block.token), -1) for x in (rows, sums, shift))

    def add(result):
        block, *parts = result  # of one chunk
        head, n = block.head, block.first
        t, rows, sums, shift = (x if x is None else x[:n] for x in (block.token, *parts))
        totals = (out[head], rows), (row_sum[head], sums)
        if bounded:
            for total, x in totals:
                reference.add_rows(total, t, x)
            return
        before = shifts[head].index_select(0, t)  # [pairs, G]
        shift = torch.zeros_like(before) if shift is None else shift
        after = torch.maximum(before, shift)
        shifts[head].index_copy_(0, t, after)
        share, kept = (shift - after).exp2_(), (before - after).exp2_()
        for total, x in totals:  # a token chose a chunk once, so no two rows of a block are of the same
            x, old = (y.view(*before.shape, -1) for y in (x, total.index_select(0, t)))
            x.mul_(share[..., None]).addcmul_(old, kept[..., None])
            total.index_copy_(0, t, x.flatten(1))

    workers.each(plan.blocks, multiply, add)
    out.unflatten(2, (plan.G, -1)).div_(row_sum.masked_fill(row_sum == 0, 1)[..., None])
    lse = row_sum.log2_().add_(shifts).div_(_LOG2E)
    return plan.tokens(out.to(q.dtype), q.shape), plan.tokens(lse, q.shape[:3])


def backward(do, dlse, q, k, v, indices, out, lse, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv), shaped and typed as q, k, v; always deterministic."""
    if not pairs.offsets[-1]:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    plan = reference.Plan(q, k, v, None, indices, pairs, chunk_len, scale)
    gradients, q_heads, do_heads = reference.Gradients(plan, q, k), plan.heads(q), plan.heads(do)
    delta = torch.einsum("bthd,bthd->bth", do.to(plan.dtype), out.to(plan.dtype)).sub_(dlse)
    delta_heads, lse_heads = plan.heads(delta), plan.heads(lse * _LOG2E)

    def multiply(block):
        k_scaled, v = (plan.keys(x, block) for x in (plan.k_scaled, plan.v))
        q_rows, do_rows, delta, lse2 = (plan.rows(x, block) for x in (q_heads, do_heads, delta_heads, lse_heads))
        plan.blank_(do_rows, block)
        plan.blank_(delta, block)
        p = plan.product(k_scaled, q_rows).sub_(lse2.mT).exp2_()  # [1, keys, rows]
        ds = plan.product(v, do_rows).sub_(delta.mT).mul_(p)
        return gradients.products(block, p, ds, q_rows, do_rows)

    workers.each(plan.blocks, multiply, lambda result: gradients.add(*result))
    return gradients.results(scale, q.dtype)


def decode(q, k_pages, v_pages, indices, page_table, scale):
    """out [B, T, HQ, D] and lse [B, T, HQ]; see hsa_tl.ops for the arguments."""
    return reference_decode.attend(q, k_pages, v_pages, None, indices, page_table, scale)
