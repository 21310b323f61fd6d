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
from typing import NamedTuple

import torch

from hsa_tl import workers
from hsa_tl.pairs import sort_pairs
from hsa_tl.products import product

_LOG2E = math.log2(math.e)
# Elements of one [rows, max(S, D)] operand: a few of them should stay in a CPU's cache; accelerators want few launches.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ACCELERATOR = 2**23
# Scores (as powers of two) within this bound need no row maximum: exp2 neither overflows nor flushes to zero.
_MAX_UNSHIFTED = 40.0
# Backward multiplies by the weight early and divides it out of dweights; one outside of these is multiplied in last.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-12, 1e12
# Rows of a block: a multiple of these, for which a product gives a row the same bits whatever is beside it.
_ROWS = 16
# oneDNN compiles a program for each number of rows, so that blocks have few: powers of two, or multiples of these.
_ROWS_MULTIPLE = 512
# S * D of the matrices by which oneDNN multiplies; by smaller ones its calls cost more than they save. This does not go
# by rows: a token's bits must not depend on how many others chose its chunk.
_LEAST_MATRIX = 2048


class _Block(NamedTuple):
    """Pairs of C chunks, those of each filled up with some of weight 0 to a common number n."""

    head: int  # b * H + h
    keys: int
    bounded: bool  # no score needs a shift
    segment: torch.Tensor  # [C], head * N + chunk
    token: torch.Tensor  # [C * n]
    weight: torch.Tensor  # [C * n, GW]
    part: slice  # these pairs among those of all blocks
    first: int  # pairs of the first chunk, before what fills them up


class Plan:
    """Operands laid out by (b, h, chunk), and the pairs cut into blocks of one chunk each.

    Without weights those of the pairs are 1, and of what fills a block up still 0.
    """

    def __init__(self, q, k, v, weights, indices, pairs, chunk_len, scale):
        B, T, HQ, D = q.shape
        N, S, H = k.shape[1:4]
        self.K, self.H, self.G = indices.shape[3], H, HQ // H
        self.GW = 1 if weights is None else weights.shape[2] // H
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        device = q.device

        # One matrix [S, D] a segment.
        k, v = (x.permute(0, 3, 1, 2, 4).to(self.dtype).contiguous() for x in (k, v))  # [B, H, N, S, D]
        scaled = k * (scale * _LOG2E)
        self.k, self.k_scaled, self.v = (x.flatten(0, 2) for x in (k, scaled, v))
        # |score| <= |q| |scaled k|
        self.q_norm = self.heads(torch.linalg.vector_norm(q, dim=-1, dtype=self.dtype))  # [B * H, T, G]
        k_norm = torch.linalg.vector_norm(scaled, dim=-1).amax(-1)  # [B, H, N]
        self.q_limit = (_MAX_UNSHIFTED / k_norm).flatten()
        bounded = (self.q_norm.amax((1, 2)).repeat_interleave(N) <= self.q_limit).tolist()

        # Cut so that, to the last bit, no token's result depends on the tokens after it.
        elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ACCELERATOR)
        large = S * D >= _LEAST_MATRIX
        self.product = (lambda a, b: product(a[0], b[0])[None]) if large else lambda a, b: torch.bmm(a, b.mT)
        n = max(1, elements // (max(S, D) * self.G))
        unit = _ROWS // math.gcd(_ROWS, self.G)  # pairs
        step = unit * max(1, _ROWS_MULTIPLE // (unit * self.G)) if large else unit
        lengths = [S] * N if chunk_len is None else chunk_len.tolist()
        offsets = pairs.offsets.tolist()
        token = pairs.pair[: offsets[-1]].long() // self.K
        cuts = []  # (head, segment, keys, first pair, end)
        for segment, (start, stop) in enumerate(itertools.pairwise(offsets)):
            head, keys = segment // N, lengths[segment % N]
            if start < stop and keys:
                cuts += [(head, segment, keys, i, min(i + n, stop)) for i in range(start, stop, n)]
        # By first token rather than by chunk: consecutive blocks then gather and add to tokens still in cache.
        first = token[torch.tensor([x[3] for x in cuts], dtype=torch.int64, device=device)].tolist()
        cuts = [x for _, _, x in sorted(zip([x[0] for x in cuts], first, cuts, strict=True))]
        counts = [stop - start for *_, start, stop in cuts]
        sizes = [-(-x // step) * step if x > step else unit << ((x - 1) // unit).bit_length() for x in counts]
        # Small ones that follow each other share a block, filled up by half at most: the order of sums stays.
        begins, several = [], weights is not None and not large
        for i, (head, _, keys, *_) in enumerate(cuts):
            part = slice(begins[-1] if begins else i, i + 1)
            filled = max(sizes[part]) * len(sizes[part])
            alike = (head, keys) == (cuts[part.start][0], cuts[part.start][2])
            if not (begins and several and alike and filled <= min(n, 1.5 * sum(sizes[part]))):
                begins.append(i)
        groups = [slice(*x) for x in itertools.pairwise([*begins, len(cuts)])]
        sizes = [max(sizes[x]) for x in groups for _ in cuts[x]]

        # The pairs of all blocks: each block's last one again fills it up.
        ends = list(itertools.accumulate(sizes, initial=0))
        cut = torch.tensor(cuts, dtype=torch.int64).view(-1, 5)[:, [0, 3, 4]]
        cut = torch.cat([cut, torch.tensor(ends[:-1])[:, None]], 1).to(device)
        head, start, stop, begin = cut.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=device), 0).T
        at = start + torch.arange(ends[-1], device=device) - begin
        self.real = at < stop
        at = torch.minimum(at, stop - 1)
        token, self.slot = token[at], head * (T * self.K) + pairs.pair[at]  # the pair's place in [B, H, T, K]
        weight, self.extreme = self.real[:, None].to(self.dtype), None  # [pairs, GW]
        if weights is not None:
            split = weights.view(B, T, H, self.GW, self.K).permute(0, 2, 1, 4, 3).reshape(-1, self.GW)
            weight = split.index_select(0, self.slot).masked_fill_(~self.real[:, None], 0)
            size = weight.abs()
            extreme = ~((size >= _MIN_WEIGHT) & (size <= _MAX_WEIGHT)) & self.real[:, None]  # also nan
            self.extreme = extreme if extreme.any() else None
        segments, self.blocks = torch.tensor([x[1] for x in cuts], device=device), []
        for x in groups:
            (head, _, keys, *_), part = cuts[x.start], slice(ends[x.start], ends[x.stop])
            low = all(bounded[segment] for _, segment, *_ in cuts[x])
            self.blocks.append(_Block(head, keys, low, segments[x], token[part], weight[part], part, counts[x.start]))

    def heads(self, x):
        """x [B, T, HQ, ...] -> [B * H, T, G * ...], contiguous: rows of a wider tensor take longer to add to."""
        x = x.to(self.dtype).reshape(*x.shape[:2], self.H, -1)
        return x.transpose(1, 2).flatten(0, 1).contiguous()

    def tokens(self, x, shape):
        """x of `heads` in this shape again."""
        return x.view(-1, self.H, *x.shape[1:]).transpose(1, 2).reshape(shape)

    def rows(self, x, block):
        """x of `heads` for the block's pairs: [C, n * G, D]."""
        rows = len(block.token) // len(block.segment) * self.G
        return x[block.head].index_select(0, block.token).view(len(block.segment), rows, -1)

    def blank_(self, rows, block):
        """rows, 0 in place for what fills the block up: an inf there times a weight of 0 would be nan."""
        filler = (~self.real[block.part]).nonzero()[:, 0]
        return rows.view(len(block.token), -1).index_fill_(0, filler, 0)

    def keys(self, x, block):
        """x [B * H * N, S, D] of the block's chunks: [C, keys, D]."""
        return x.index_select(0, block.segment)[:, : block.keys]

    def shift(self, scores, dim, block):
        """What to take off each row of scores, whose keys lie along dim, before exp2; None where it is 0 for all."""
        if block.bounded:
            return None
        unshifted = self.rows(self.q_norm, block)[..., 0] <= self.q_limit[block.segment, None]
        return scores.amax(dim).masked_fill_(unshifted, 0)

    def exp_(self, scores, dim, block):
        """exp2(scores) in place, up to a factor a row, whose keys lie along dim; the sums over them."""
        if block.keys == 1:  # P is exactly 1, hence dS exactly 0
            scores.sub_(scores)
        elif (shift := self.shift(scores, dim, block)) is not None:
            scores.sub_(shift.unsqueeze(dim))
        return scores.exp2_(), scores.sum(dim)


class Gradients:
    """Those of q, k and v: what the blocks add up to, but for scale."""

    def __init__(self, plan, q, k):
        (B, N, S, H, D), self.plan = k.shape, plan
        self.shape, self.dq = q.shape, q.new_zeros(B * H, q.shape[1], plan.G * D, dtype=plan.dtype)
        self.dk, self.dv = (q.new_zeros(B, H, N, S, D, dtype=plan.dtype) for _ in range(2))

    def products(self, block, p, ds, q_rows, do_rows):
        """What a block adds, of p and ds [C, keys, rows]."""
        product = self.plan.product
        dq_rows = product(ds.mT, self.plan.keys(self.plan.k, block).mT)
        return block, dq_rows.view(len(block.token), -1), product(ds, q_rows.mT), product(p, do_rows.mT)

    def add(self, block, dq_rows, dk_block, dv_block):
        add_rows(self.dq[block.head], block.token, dq_rows)
        for total, x in ((self.dk, dk_block), (self.dv, dv_block)):
            add_rows(total.flatten(0, 2)[:, : block.keys], block.segment, x)

    def results(self, scale, dtype):
        """dq [B, T, HQ, D], dk and dv [B, N, S, H, D]."""
        dk, dv = (x.permute(0, 2, 3, 1, 4).to(dtype).contiguous() for x in (self.dk.mul_(scale), self.dv))
        return self.plan.tokens(self.dq.mul_(scale).to(dtype), self.shape), dk, dv


def check_config(config):
    """ValueError if config= names programs."""
    if config and (named := json.loads(config).keys() - {"overlap"}):
        raise ValueError(f"config must name nothing for impl='reference', which has no programs, got {sorted(named)}")


def add_rows(total, t, rows):
    """total[t] += rows, in a fixed order on every device."""
    if total.device.type == "cpu":
        total.index_add_(0, t, rows)
    else:  # index_add_ is atomic there; this sorts
        total.index_put_((t.long(),), rows, accumulate=True)


def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """out [B, T, HQ, D] of q [B, T, HQ, D], k and v [B, N, S, H, D], weights [B, T, HW, K], indices [B, T, H, K]."""
    check_config(config)
    pairs = pairs or sort_pairs(indices, k.shape[1])
    if not pairs.offsets[-1]:
        return q.new_zeros(q.shape)
    plan = Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    q_heads = plan.heads(q)
    out = torch.zeros_like(q_heads)

    def multiply(block):
        n = len(block.token)
        scores = plan.product(plan.rows(q_heads, block), plan.keys(plan.k_scaled, block))  # [C, rows, keys]
        p, row_sum = plan.exp_(scores, 2, block)
        out_rows = plan.product(p, plan.keys(plan.v, block).mT)
        out_rows.view(n, plan.G, -1).mul_((block.weight / row_sum.view(n, -1))[..., None])
        return block, plan.blank_(out_rows, block)

    def add(result):
        block, out_rows = result
        add_rows(out[block.head], block.token, out_rows)

    workers.each(plan.blocks, multiply, add)
    return plan.tokens(out.to(q.dtype), q.shape)


def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config="", deterministic=False):
    """(dq, dk, dv, dweights), shaped and typed as q, k, v, weights; always deterministic."""
    if not pairs.offsets[-1]:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v, weights))
    plan = Plan(q, k, v, weights, indices, pairs, chunk_len, scale)
    (B, T, *_), H, G = q.shape, plan.H, plan.G
    gradients, q_heads, do_heads = Gradients(plan, q, k), plan.heads(q), plan.heads(do)
    dw_pairs = q.new_empty(len(plan.slot), plan.GW, dtype=weights.dtype)

    def multiply(block):
        n = len(block.token)
        k_scaled, v = (plan.keys(x, block) for x in (plan.k_scaled, plan.v))
        q_rows, do_rows = (plan.rows(x, block) for x in (q_heads, do_heads))
        plan.blank_(do_rows, block)
        # p stays unnormalised: scaling the rows of do by w / row_sum normalises and weighs dP, dS and dv at once.
        p, row_sum = plan.exp_(plan.product(k_scaled, q_rows), 1, block)  # [C, keys, rows]
        # w = early * late: a weight that is about zero, or about infinite, cannot be divided out again.
        early, late = block.weight, None
        if plan.extreme is not None and (extreme := plan.extreme[block.part]).any():
            early, late = torch.where(extreme, 1, early), torch.where(extreme, early, 1)
        do_by_head = do_rows.view(n, G, -1).mul_((early / row_sum.view(n, G))[..., None])
        ds = plan.product(v, do_rows).mul_(p)  # P dP
        delta = ds.sum(1)
        dw = delta.view(n, G) / early
        dw_pairs[block.part] = dw if plan.GW == G else dw.sum(-1, keepdim=True)
        ds.addcmul_(p, delta.div_(row_sum)[:, None], value=-1)
        if late is not None:
            do_by_head.mul_(late[..., None])
            ds.view(*ds.shape[:2], -1, G).mul_(late.view(len(ds), 1, -1, plan.GW))
        return gradients.products(block, p, ds, q_rows, do_rows)

    workers.each(plan.blocks, multiply, lambda result: gradients.add(*result))
    dweights = weights.new_zeros(B * H * T * plan.K, plan.GW)
    dweights[plan.slot[plan.real]] = dw_pairs[plan.real]
    dweights = dweights.view(B, H, T, plan.K, plan.GW).permute(0, 2, 1, 4, 3).reshape(weights.shape).contiguous()
    return *gradients.results(scale, q.dtype), dweights
