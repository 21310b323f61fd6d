"""The oracle: the operator's equations in plain PyTorch, meant for float64 and for small shapes.

`attention_oracle` is dense in (token, chunk), so O(T * T) time and memory; its gradients are autograd's. Beside it,
`expect_attention` gives values and gradients with the units in which their errors are counted (`hsa_tl.accuracy`).
Everything else in the project is tested against this file.
"""

import itertools
import math

import torch

from hsa_tl.accuracy import Expected, eps_of, least_of


def _scores(q_slc, landmarks, chunk_size, q_start, exclude_window, scale):
    """Scores [B, T, R, N], and whether the token may see the chunk."""
    s = torch.einsum("btrd,bnrd->btrn", q_slc, landmarks) * (q_slc.shape[3] ** -0.5 if scale is None else scale)
    p = q_start + torch.arange(s.shape[1], device=s.device)[:, None]
    i = torch.arange(s.shape[3], device=s.device)[None, :]
    visible = (i + 1) * chunk_size <= p
    if exclude_window > 0:
        visible &= i * chunk_size <= p - exclude_window
    return s, visible[None, :, None, :].expand_as(s)


def expect_scores(
    q_slc, landmarks, *, chunk_size=64, q_start=0, exclude_window=0, scale=None
) -> tuple[Expected, torch.Tensor]:
    """Every score [B, T, R, N] in float64 and its unit, a float32 sum of D_r products, and whether it is visible."""
    options, D_r = (chunk_size, q_start, exclude_window, scale), q_slc.shape[3]
    eps = 2 * min(eps_of(q_slc.dtype), eps_of(torch.float32))
    q_slc, landmarks = q_slc.detach().double(), landmarks.detach().double()
    value, visible = _scores(q_slc, landmarks, *options)
    scale = D_r**-0.5 if scale is None else scale
    squares = torch.einsum("btrd,bnrd->btrn", q_slc.square(), landmarks.square()) * scale**2
    return Expected(value, eps * (D_r * (squares + value.square())).sqrt(), eps), visible


def retrieve_oracle(q_slc, landmarks, topk, *, chunk_size=64, q_start=0, exclude_window=0, scale=None):
    """scores, indices [B, T, R, K]: the K best visible chunks of each token, ascending, then -1 with score -inf."""
    N = landmarks.shape[1]
    s, visible = _scores(q_slc, landmarks, chunk_size, q_start, exclude_window, scale)
    # A stable descending sort puts the lower of two equal chunks first.
    best = s.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    chosen = torch.where(visible.gather(-1, best), best, N).sort(dim=-1).values
    chosen = torch.nn.functional.pad(chosen, (0, topk - chosen.shape[-1]), value=N)
    empty = chosen == N
    if N == 0:
        return s.new_full(chosen.shape, -torch.inf), torch.full_like(chosen, -1).int()
    scores = s.gather(-1, chosen.clamp(max=N - 1)).masked_fill(empty, -torch.inf)
    return scores, chosen.masked_fill(empty, -1).int()


def attention_oracle(q, k, v, weights, indices, *, chunk_size=64, scale=None):
    """out[t] = sum_c w[t, c] softmax(q[t] . K[c]^T * scale) V[c], with w[t, c] the sum of the slots that hold c."""
    _B, _T, HQ, D = q.shape
    T_kv, H = k.shape[1], k.shape[2]
    G, S, N = HQ // H, chunk_size, -(-T_kv // chunk_size)
    scale = 1 / math.sqrt(D) if scale is None else scale
    slot_chunk = indices.repeat_interleave(G, 2)
    slot_weight = weights if weights.shape[2] == HQ else weights.repeat_interleave(G, 2)
    out = torch.zeros_like(q)
    for c in range(N):
        k_c = k[:, c * S : (c + 1) * S].repeat_interleave(G, 2)
        v_c = v[:, c * S : (c + 1) * S].repeat_interleave(G, 2)
        w_c = torch.where(slot_chunk == c, slot_weight, 0.0).sum(-1).to(q.dtype)
        p = torch.softmax(torch.einsum("bthd,bshd->bths", q, k_c) * scale, dim=-1)
        out = out + w_c[..., None] * torch.einsum("bths,bshd->bthd", p, v_c)
    return out


def attention_oracle_packed(q, k, v, weights, indices, cu_seqlens, *, chunk_size=64, scale=None):
    """`attention_oracle` on each sequence of a packed batch (B = 1)."""
    ends = cu_seqlens.tolist()
    parts = [
        attention_oracle(*(x[:, a:b] for x in (q, k, v, weights, indices)), chunk_size=chunk_size, scale=scale)
        for a, b in itertools.pairwise(ends)
    ]
    return torch.cat(parts, dim=1)


def _product(a, b, terms, eps):
    """a b and the square of its unit: each of the sum's `terms` steps rounds a partial sum by eps."""
    value = a @ b
    return value, eps**2 * terms * (a.square() @ b.square() + value.square())


def expect_attention(
    q, k, v, weights, indices, do=None, *, chunk_size=64, scale=None, cu_seqlens=None
) -> dict[str, Expected]:
    """out, dq, dk, dv and dweights of `hsa_attention` in float64, each with its unit; without do, out alone.

    Kept in the type of q: probabilities P (weighed by w or not), dS, a pair's rows of out and dq before they are summed
    over the slots, and the results. In float32: scores, softmax, dP = do V^T, delta = rowsum(P dP), every sum. An error
    E of a score moves P by P E, and through the row sum all of the row. Slots that hold the same chunk are one pair of
    weight sum w; their roundings are counted by sum |w|. Squares of units have names in 2.
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        tensors = [x for x in (q, k, v, weights, indices, do) if x is not None]
        parts = [
            expect_attention(*(x[:, a:b] for x in tensors), chunk_size=chunk_size, scale=scale)
            for a, b in itertools.pairwise(ends)
            if b > a
        ]
        return {
            name: Expected(*(torch.cat([getattr(p[name], x) for p in parts], 1) for x in ("value", "unit")), one.eps)
            for name, one in parts[0].items()
        }
    B, _T, HQ, D = q.shape
    H, K, S, GW = k.shape[2], indices.shape[3], chunk_size, weights.shape[2] // k.shape[2]
    G, eps, least2 = HQ // H, eps_of(q.dtype), least_of(q.dtype) ** 2
    sums = 2 * min(eps, eps_of(torch.float32))  # tensor cores truncate; exp2 and division may be off by one more
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k, v, weights = (x.detach().double() for x in (q, k, v, weights))
    shapes = {"out": q} if do is None else {"out": q, "dq": q, "dk": k, "dv": v, "dweights": weights}
    value, unit2 = ({name: torch.zeros_like(x) for name, x in shapes.items()} for _ in range(2))

    for b, h in itertools.product(range(B), range(H)):
        chosen, heads, own = indices[b, :, h], slice(h * G, (h + 1) * G), slice(h * GW, (h + 1) * GW)
        for c in chosen[(chosen >= 0) & (chosen * S < k.shape[1])].unique().tolist():
            slots = chosen == c  # [T, K]
            t, keys = slots.any(-1).nonzero().squeeze(-1), slice(c * S, (c + 1) * S)
            k_c, v_c = k[b, keys, h], v[b, keys, h]  # [L, D]
            q_t, n = q[b, t, heads], len(t) * G  # [tokens, G, D]
            slot_weights = torch.where(slots[t][:, None], weights[b, t, own], 0.0)  # [tokens, GW, K]
            w, most = (x.sum(-1)[..., None].expand(-1, G, -1) for x in (slot_weights, slot_weights.abs()))
            most2 = most.square()
            # What is too small for the type's relative rounding may be kept with the weight, without it, or scaled.
            small2 = least2 * most2.clamp(min=max(1.0, scale**-2 if scale else 1.0))

            s, s2 = _product(q_t, k_c.T, D, sums)
            s, s2 = s * scale, s2 * scale**2 + sums**2 * (1 + (s * scale).square())
            p = s.softmax(-1)  # [tokens, G, L]
            row2 = (p.square() * s2).sum(-1, keepdim=True)
            moved2 = p.square() * (s2 + row2)  # by the errors of the scores, its own and through the row sum
            wp, wp2 = w * p, most2 * ((eps * p).square() + moved2) + small2

            o, o_sum2 = _product(p, v_c, S, sums)
            value["out"][b, t, heads] += w * o
            unit2["out"][b, t, heads] += wp2 @ v_c.square() + small2
            unit2["out"][b, t, heads] += most2 * (o.square() * (row2 + eps**2 + K * sums**2) + o_sum2)

            if do is None:
                continue
            do_t = do[b, t, heads].detach().double()
            dp, dp2 = _product(do_t, v_c.T, D, sums)
            terms = p * dp
            delta = terms.sum(-1, keepdim=True)
            delta2 = (p.square() * dp2 + dp.square() * moved2).sum(-1, keepdim=True) + delta.square() * row2
            delta2 = delta2 + sums**2 * S * (terms.square().sum(-1, keepdim=True) + delta.square())
            dw2 = delta2 + (eps * terms).square().sum(-1, keepdim=True)  # P may be kept in q's type, as in <do, o>
            token, slot = slots[t].nonzero().T
            for total, x in ((value, delta), (unit2, dw2)):
                x = x[..., 0] if GW == G else x.sum(1)  # [tokens, GW]
                total["dweights"][b, t[token], own, slot] = x[token]

            ds = p * (dp - delta)
            wds, wds2 = w * ds, most2 * (p.square() * (dp2 + delta2) + ds.square() * (s2 + row2 + eps**2)) + small2
            dq, dq_sum2 = _product(ds, k_c, S, sums)
            value["dq"][b, t, heads] += scale * w * dq
            dq2 = wds2 @ k_c.square() + most2 * (dq_sum2 + (eps**2 + K * sums**2) * dq.square()) + small2
            unit2["dq"][b, t, heads] += scale**2 * dq2

            for name, x, x2, other, factor in (("dv", wp, wp2, do_t, 1.0), ("dk", wds, wds2, q_t, scale)):
                other = other.reshape(n, D)
                total, sum2 = _product(x.reshape(n, -1).T, other, n, sums)
                value[name][b, keys, h] += factor * total
                unit2[name][b, keys, h] += factor**2 * (x2.reshape(n, -1).T @ other.square() + sum2)
    for name in value.keys() - {"dweights"}:  # what nobody chose is exactly 0
        unit2[name] += torch.where(unit2[name] > 0, (eps * value[name]).square() + least2, 0.0)
    return {name: Expected(value[name], unit2[name].sqrt(), eps) for name in value}
