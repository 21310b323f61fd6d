"""Vectorised PyTorch implementation: what impl="auto" runs on CPU.

Chunk stationary: each step owns the query rows of the (token, slot) pairs that selected one chunk. With the pair's
weight w, P = softmax(q K^T * scale), dP = do V^T and delta = rowsum(P dP), it adds

    out += w P V      dweights += delta      dq += scale dS K      dk += scale dS^T q      dv += (w P)^T do

where dS = w P (dP - delta). Rows of one token are G query heads; nothing but the inputs is kept between the passes.
On a CPU several workers compute such steps at once; what the steps add, they add in a fixed order.
"""

import itertools
import json
import math

import torch

from hsa_tl import workers
from hsa_tl.products import product

FORWARD_NEEDS_PAIRS = True

_LOG2E = math.log2(math.e)
# Elements of one [rows, max(S, D)] operand: a few of them should stay in a CPU's cache; accelerators want few launches.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ACCELERATOR = 2**23
# Scores (as powers of two) within this bound need no row maximum: exp2 neither overflows nor flushes to zero.
_MAX_UNSHIFTED = 40.0
# Backward multiplies by the weight early and divides it out of dweights; one smaller than this is multiplied in last.
_MIN_WEIGHT = 1e-12
# Blocks have few different numbers of rows: oneDNN compiles a program for each.
_ROWS_MULTIPLE = 512


def unavailable(problem):
    """Why this implementation cannot run the problem: it always can."""
    return None


class _Plan:
    """Operands laid out by (b, h, chunk), and the pairs cut into blocks of one chunk each."""

    def __init__(self, q, k, v, weights, indices, pairs, chunk_len, scale):
        self.B, self.T, HQ, self.D = q.shape
        self.N, self.S, self.H = k.shape[1:4]
        self.K, self.G, self.GW = indices.shape[3], HQ // self.H, weights.shape[2] // self.H
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device

        # One matrix [S, D] a segment; a segment is (b * H + h) * N + chunk.
        k, v = (x.permute(0, 3, 1, 2, 4).to(self.dtype) for x in (k, v))  # [B, H, N, S, D]
        scaled = k * (scale * _LOG2E)
        self.k, self.k_scaled, self.v = (x.flatten(0, 2).unbind() for x in (k, scaled, v))
        # |score| <= |q| |scaled k|
        q_norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=self.dtype)
        self.q_norm = self.heads(q_norm)  # [T, G, 1]
        k_norm = torch.linalg.vector_norm(scaled, dim=-1).amax(-1)  # [B, H, N]
        self.q_limit = (_MAX_UNSHIFTED / k_norm).flatten().tolist()
        highest = q_norm.view(self.B, self.T, self.H, self.G).amax((1, 3)).flatten().tolist()
        self.unshifted = [highest[i // self.N] <= limit for i, limit in enumerate(self.q_limit)]

        offsets = pairs.offsets.tolist()
        pair = pairs.pair[: offsets[-1]]
        self.t = pair // self.K
        per_head = torch.tensor(offsets[:: self.N], device=self.device).diff()
        first = torch.arange(self.B * self.H, device=self.device) * (self.T * self.K)
        self.slot = torch.repeat_interleave(first, per_head) + pair  # the pair's place in [B, H, T, K]
        split = weights.view(self.B, self.T, self.H, self.GW, self.K).permute(0, 2, 1, 4, 3)
        self.weights = split.reshape(-1, self.GW).index_select(0, self.slot)  # [pairs, GW]

        # Cut so that, to the last bit, no token's result depends on the tokens after it.
        elements = _BLOCK_ELEMENTS.get(self.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
        longest = max(b - a for a, b in itertools.pairwise(offsets))
        n = self.pairs_per_block = min(longest, max(1, elements // (max(self.S, self.D) * self.G)))
        lengths = [self.S] * self.N if chunk_len is None else chunk_len.tolist()
        blocks = []  # (b * H + h, segment, real keys, first pair, end)
        for segment, (start, stop) in enumerate(itertools.pairwise(offsets)):
            head, length = segment // self.N, lengths[segment % self.N]
            if start < stop and length:
                blocks += [(head, segment, length, i, min(i + n, stop)) for i in range(start, stop, n)]
        # By first token rather than by chunk: consecutive blocks then gather and add to tokens still in cache.
        tokens = self.t[torch.tensor([block[3] for block in blocks], dtype=torch.int64, device=self.device)].tolist()
        self.blocks = [b for _, _, b in sorted(zip([b[0] for b in blocks], tokens, blocks, strict=True))]

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def heads(self, x):
        """x [B, T, HQ, D] -> B * H views [T, G, D]."""
        return [x[b, :, h * self.G : (h + 1) * self.G] for b in range(self.B) for h in range(self.H)]

    def gather(self, source, t):
        """Rows [n * G, D] of the tokens t, and zeros."""
        n = len(t)
        step = min(_ROWS_MULTIPLE, max(16, 1 << (n * self.G - 1).bit_length()))
        rows = torch.empty(math.ceil(n * self.G / step) * step, self.D, dtype=self.dtype, device=self.device)
        rows[n * self.G :].zero_()
        by_head = rows[: n * self.G].view(n, self.G, self.D)
        if source.dtype == self.dtype:
            torch.index_select(source, 0, t, out=by_head)
        else:
            by_head.copy_(source.index_select(0, t))
        return rows, by_head

    def exp_(self, scores, dim, block, t):
        """exp2(scores) in place, up to a factor a row, whose keys lie along dim; the sums over them."""
        head, segment, *_ = block
        if scores.shape[dim] == 1:  # P is exactly 1, hence dS exactly 0
            scores.sub_(scores)
        elif not self.unshifted[segment]:
            shift = scores.amax(dim)
            unshifted = self.q_norm[head].index_select(0, t).flatten() <= self.q_limit[segment]
            shift[: len(unshifted)].masked_fill_(unshifted, 0)
            scores.sub_(shift.unsqueeze(dim))
        return scores.exp2_(), scores.sum(dim)


def _add_rows(total, t, rows):
    """total[t] += rows, in a fixed order on every device."""
    if total.device.type == "cpu":
        total.index_add_(0, t, rows)
    else:  # index_add_ is atomic there; this sorts
        total.index_put_((t.long(),), rows, accumulate=True)


@workers.one_thread
def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] of q [B, T, HQ, D], k and v [B, N, S, H, D], weights [B, T, HW, K], indices [B, T, H, K]."""
    if config and (named := json.loads(config).keys() - {"overlap"}):
        raise ValueError(f"config must name nothing for impl='reference', which has no programs, got {sorted(named)}")
    if not pairs.offsets[-1]:
        return q.new_zeros(q.shape)
    plan = _Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    G, D = plan.G, plan.D
    out = plan.zeros(*q.shape)
    q_heads, out_heads = plan.heads(q), plan.heads(out)

    def multiply(block, _):
        head, segment, L, start, stop = block
        t, n = plan.t[start:stop], stop - start
        q_rows, _ = plan.gather(q_heads[head], t)
        p, row_sum = plan.exp_(product(q_rows, plan.k_scaled[segment][:L]), 1, block, t)  # [rows, L]
        out_by_head = product(p, plan.v[segment][:L].T)[: n * G].view(n, G, D)
        return head, t, out_by_head.mul_((plan.weights[start:stop] / row_sum[: n * G].view(n, G))[..., None])

    def add(result):
        head, t, out_by_head = result
        _add_rows(out_heads[head], t, out_by_head)

    workers.each(plan.blocks, multiply, add)
    return out.to(q.dtype)


@workers.one_thread
def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv, dweights), shaped and typed as q, k, v, weights; always deterministic."""
    if not pairs.offsets[-1]:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, weights))
    plan = _Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    B, T, N, S, K, H, G, GW, D = plan.B, plan.T, plan.N, plan.S, plan.K, plan.H, plan.G, plan.GW, plan.D
    dq, dk, dv = plan.zeros(*q.shape), plan.zeros(B * H * N, S, D), plan.zeros(B * H * N, S, D)
    dw_pairs = torch.zeros_like(plan.weights)
    do_heads, q_heads, dq_heads = plan.heads(do), plan.heads(q), plan.heads(dq)
    # w = early * late: a weight that is about zero cannot be divided out again.
    small = plan.weights.abs() < _MIN_WEIGHT
    late = torch.where(small, plan.weights, 1) if small.any() else None
    early = plan.weights if late is None else torch.where(small, 1, plan.weights)

    def multiply(block, _):
        head, segment, L, start, stop = block
        t, n, w = plan.t[start:stop], stop - start, early[start:stop]
        q_rows, _ = plan.gather(q_heads[head], t)
        do_rows, do_by_head = plan.gather(do_heads[head], t)
        k, v, real = plan.k[segment][:L], plan.v[segment][:L], n * G
        # p stays unnormalised: scaling the rows of do by w / row_sum normalises and weighs dP, dS and dv at once.
        p, row_sum = plan.exp_(product(plan.k_scaled[segment][:L], q_rows), 0, block, t)  # [L, rows]
        p[:, real:] = 0
        do_by_head.mul_((w / row_sum[:real].view(n, G))[..., None])
        ds = product(v, do_rows).mul_(p)  # P dP
        delta = ds.sum(0)
        dw = delta[:real].view(n, G) / w
        dw_pairs[start:stop] = dw if GW == G else dw.sum(-1, keepdim=True)
        ds.addcmul_(p, delta.div_(row_sum), value=-1)
        if late is not None:
            do_by_head.mul_(late[start:stop, :, None])
            ds[:, :real].unflatten(1, (n, G)).mul_(late[start:stop])
        dq_by_head = product(ds.T, k.T)[:real].view(n, G, D)
        return block, t, dq_by_head, product(ds, q_rows.T), product(p, do_rows.T)

    def add(result):
        (head, segment, L, *_), t, dq_by_head, dk_block, dv_block = result
        _add_rows(dq_heads[head], t, dq_by_head)
        dk[segment, :L] += dk_block
        dv[segment, :L] += dv_block

    workers.each(plan.blocks, multiply, add)
    dq.mul_(scale)
    dk, dv = (x.view(B, H, N, S, D).permute(0, 2, 3, 1, 4).to(k.dtype).contiguous() for x in (dk.mul_(scale), dv))
    dweights = weights.new_zeros(B * H * T * K, GW).index_copy_(0, plan.slot, dw_pairs)
    dweights = dweights.view(B, H, T, K, GW).permute(0, 2, 1, 4, 3).reshape(weights.shape).contiguous()
    return dq.to(q.dtype), dk, dv, dweights
