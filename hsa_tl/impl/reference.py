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

FORWARD_NEEDS_PAIRS = True

_LOG2E = math.log2(math.e)
# Elements of one [rows, max(S, D)] buffer: five of them should stay in a CPU's cache; accelerators want fewer launches.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ACCELERATOR = 2**23
# Scores (as powers of two) within this bound need no row maximum: exp2 neither overflows nor flushes to zero.
_MAX_UNSHIFTED = 40.0
# Backward multiplies by the weight early and divides it out of dweights; one smaller than this is multiplied in last.
_MIN_WEIGHT = 1e-12
# Rows summed at a time into dk and dv: short sums err less than one long one and are as fast.
_ROWS_PER_SUM = 128
# MKL computes a row the same way, to the last bit, however many such multiples of rows stand around it.
_ROWS_MULTIPLE = 16


def unavailable(problem):
    """Why this implementation cannot run the problem: it always can."""
    return None


class _Plan:
    """Operands laid out by (b, h, chunk), and the pairs cut into blocks of one chunk each."""

    def __init__(self, q, k, v, weights, indices, pairs, chunk_len, scale):
        self.B, self.T, HQ, self.D = q.shape
        self.N, self.S, self.H = k.shape[1:4]
        self.K, self.G = indices.shape[3], HQ // self.H
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.device = q.device

        # One matrix a segment; a segment is (b * H + h) * N + chunk.
        k, v = (x.permute(0, 3, 1, 2, 4).to(self.dtype) for x in (k, v))  # [B, H, N, S, D]
        self.k, self.v = (x.flatten(0, 2).unbind() for x in (k, v))  # [S, D]
        self.k_t, self.v_t = (x.mT.contiguous().flatten(0, 2).unbind() for x in (k, v))  # [D, S]
        self.scale2 = scale * _LOG2E
        # |score| <= |q| |k| scale2
        q_norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=self.dtype)
        self.q_norm = self.heads(q_norm)  # [T, G, 1]
        k_norm = torch.linalg.vector_norm(k, dim=-1).amax(-1) * abs(self.scale2)  # [B, H, N]
        self.q_limit = (_MAX_UNSHIFTED / k_norm).flatten().tolist()
        highest = q_norm.view(self.B, self.T, self.H, self.G).amax((1, 3)).flatten().tolist()
        self.unshifted = [highest[i // self.N] <= limit for i, limit in enumerate(self.q_limit)]

        offsets = pairs.offsets.tolist()
        pair = pairs.pair[: offsets[-1]]
        self.t = pair // self.K
        if weights is not None:
            self.GW = weights.shape[2] // self.H
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

    def buffer(self, width):
        rows = self.pairs_per_block * self.G + _ROWS_MULTIPLE
        return torch.empty(rows * width, dtype=self.dtype, device=self.device)

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def heads(self, x):
        """x [B, T, HQ, D] -> B * H views [T, G, D]."""
        return [x[b, :, h * self.G : (h + 1) * self.G] for b in range(self.B) for h in range(self.H)]

    def scores(self, rows, segment, out):
        """q K^T * scale2 of q rows [n * G or more, D] into out [.., L], for exp2."""
        return torch.addmm(out, rows, self.k_t[segment][:, : out.shape[1]], beta=0, alpha=self.scale2, out=out)

    def shift(self, scores, head, segment, t):
        """What to take off the rows of scores [n * G, L] before exp2 [n * G, 1]; None where it is 0 for all."""
        if self.unshifted[segment]:
            return None
        unshifted = self.q_norm[head].index_select(0, t).view(-1, 1) <= self.q_limit[segment]
        return scores.amax(-1, keepdim=True).masked_fill_(unshifted, 0)

    def exp_scores(self, rows, head, segment, t, out):
        """exp(q K^T * scale) of q rows [n * G or more, D] into out [.., L], up to a factor a row; the row sums."""
        out = self.scores(rows, segment, out)[: len(t) * self.G]
        if out.shape[1] == 1:  # P is exactly 1, hence dS exactly 0
            out.sub_(out)
        elif (shift := self.shift(out, head, segment, t)) is not None:
            out.sub_(shift)
        return out.exp2_().sum(-1, keepdim=True)


class _Gradients:
    """dq, dk and dv, to which the blocks of a plan add."""

    def __init__(self, plan, scale):
        self.plan, self.scale = plan, scale
        self.dq = plan.zeros(plan.B, plan.T, plan.H * plan.G, plan.D)
        self.dk, self.dv = (plan.zeros(plan.B * plan.H * plan.N, plan.S, plan.D) for _ in "kv")
        self.dq_heads = plan.heads(self.dq)

    def add(self, block, t, dq_rows, products):
        """dq_rows [n, G, D] of tokens t; products: what dk, but for the scale, and dv of the block's chunk gain."""
        head, segment, L, *_ = block
        _add_rows(self.dq_heads[head], t, dq_rows)
        for total, product in zip((self.dk, self.dv), products, strict=True):
            total[segment, :L] += product

    def results(self, dtype):
        """dq, dk, dv, shaped as q, k, v."""
        shape = (self.plan.B, self.plan.H, self.plan.N, self.plan.S, self.plan.D)
        dk, dv = (
            x.view(shape).permute(0, 2, 3, 1, 4).to(dtype).contiguous() for x in (self.dk.mul_(self.scale), self.dv)
        )
        return self.dq.to(dtype), dk, dv


def check_config(config):
    """ValueError if a config names a program."""
    if config and (named := json.loads(config).keys() - {"overlap"}):
        raise ValueError(f"config must name nothing for impl='reference', which has no programs, got {sorted(named)}")


def _gather(source, t, out):
    if source.dtype == out.dtype:
        torch.index_select(source, 0, t, out=out)
    else:
        out.copy_(source.index_select(0, t))


def _add_rows(total, t, rows):
    """total[t] += rows, in a fixed order on every device."""
    if total.device.type == "cpu":
        total.index_add_(0, t, rows)
    else:  # index_add_ is atomic there; this sorts
        total.index_put_((t.long(),), rows, accumulate=True)


def _product(a, b):
    """a^T b [L, D], of a [rows, L] and b [rows, D]."""
    groups = len(a) // _ROWS_PER_SUM
    if groups < 2:
        return a.T @ b
    rows = groups * _ROWS_PER_SUM
    total = torch.bmm(a[:rows].view(groups, _ROWS_PER_SUM, -1).mT, b[:rows].view(groups, _ROWS_PER_SUM, -1)).sum(0)
    return total.addmm_(a[rows:].T, b[rows:]) if rows < len(a) else total


@workers.one_thread
def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] of q [B, T, HQ, D], k and v [B, N, S, H, D], weights [B, T, HW, K], indices [B, T, H, K]."""
    check_config(config)
    if not pairs.offsets[-1]:
        return q.new_zeros(q.shape)
    plan = _Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    G, D = plan.G, plan.D
    out = plan.zeros(*q.shape)
    q_heads, out_heads = plan.heads(q), plan.heads(out)
    row_buffers = workers.Spare(lambda: plan.buffer(D))

    def multiply(block, p_buffer):
        head, segment, L, start, stop = block
        t, n = plan.t[start:stop], stop - start
        padded = math.ceil(n * G / _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        buffer = row_buffers.take()
        rows, p = buffer[: padded * D].view(padded, D), p_buffer[: padded * L].view(padded, L)
        rows_by_head = rows[: n * G].view(n, G, D)

        _gather(q_heads[head], t, rows_by_head)
        row_sum = plan.exp_scores(rows, head, segment, t, out=p)
        torch.mm(p, plan.v[segment][:L], out=rows)
        rows_by_head.mul_((plan.weights[start:stop] / row_sum.view(n, G))[..., None])
        return head, t, rows_by_head, buffer

    def add(result):
        head, t, rows_by_head, buffer = result
        _add_rows(out_heads[head], t, rows_by_head)
        row_buffers.give(buffer)

    workers.each(plan.blocks, multiply, add, scratch=lambda: plan.buffer(plan.S))
    return out.to(q.dtype)


@workers.one_thread
def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv, dweights), shaped and typed as q, k, v, weights; always deterministic."""
    if not pairs.offsets[-1]:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, weights))
    plan = _Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    B, T, S, K, H, G, GW, D = plan.B, plan.T, plan.S, plan.K, plan.H, plan.G, plan.GW, plan.D
    gradients = _Gradients(plan, scale)
    dw_pairs = torch.zeros_like(plan.weights)
    do_heads, q_heads = plan.heads(do), plan.heads(q)
    # w = early * late: a weight that is about zero cannot be divided out again.
    small = plan.weights.abs() < _MIN_WEIGHT
    late = torch.where(small, plan.weights, 1) if small.any() else None
    early = plan.weights if late is None else torch.where(small, 1, plan.weights)
    row_buffers = workers.Spare(lambda: plan.buffer(D))

    def multiply(block, scratch):
        head, segment, L, start, stop = block
        t, n, w = plan.t[start:stop], stop - start, early[start:stop]
        buffer = row_buffers.take()
        do_rows, q_rows = (x[: n * G * D].view(n * G, D) for x in (buffer, scratch[0]))
        p, dp, ds = (x[: n * G * L].view(n * G, L) for x in scratch[1:])
        do_by_head = do_rows.view(n, G, D)

        _gather(q_heads[head], t, q_rows.view(n, G, D))
        _gather(do_heads[head], t, do_by_head)
        # p stays unnormalised: scaling the rows of do by w / row_sum normalises and weighs dP, dS and dv at once.
        row_sum = plan.exp_scores(q_rows, head, segment, t, out=p)
        do_by_head.mul_((w / row_sum.view(n, G))[..., None])
        torch.mm(do_rows, plan.v_t[segment][:, :L], out=dp)
        delta = torch.mul(p, dp, out=ds).sum(-1, keepdim=True)
        dw = delta.view(n, G) / w
        dw_pairs[start:stop] = dw if GW == G else dw.sum(-1, keepdim=True)
        ds.addcmul_(p, delta.div_(row_sum), value=-1)
        if late is not None:
            do_by_head.mul_(late[start:stop, :, None])
            ds.view(n, G, L).mul_(late[start:stop, :, None])

        products = _product(ds, q_rows), _product(p, do_rows)
        torch.addmm(do_rows, ds, plan.k[segment][:L], beta=0, alpha=scale, out=do_rows)
        return block, t, do_by_head, products, buffer

    def add(result):
        *sums, buffer = result
        gradients.add(*sums)
        row_buffers.give(buffer)

    workers.each(plan.blocks, multiply, add, scratch=lambda: [plan.buffer(x) for x in (D, S, S, S)])
    dweights = weights.new_zeros(B * H * T * K, GW).index_copy_(0, plan.slot, dw_pairs)
    dweights = dweights.view(B, H, T, K, GW).permute(0, 2, 1, 4, 3).reshape(weights.shape).contiguous()
    return *gradients.results(q.dtype), dweights
