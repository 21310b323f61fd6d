"""The oracle: the operator's equations in plain PyTorch, meant for float64 and for small shapes.

`attention_oracle` and `selected_oracle` are dense, so O(T * T) time and memory; their gradients are autograd's. Beside
them, `expect_attention` and `expect_selected` give values and gradients with the units in which their errors are
counted (`hsa_tl.accuracy`). Everything else in the project is tested against this file.
"""

import itertools
import math

import torch

from hsa_tl.accuracy import Expected, eps_of, least_of


def _scores(q_slc, landmarks, chunk_size, q_start, exclude_window, scale):
    """Scores [B, T, R, N], whether the token may see the chunk, and the whole chunks [T, N] between them."""
    s = torch.einsum("btrd,bnrd->btrn", q_slc, landmarks) * (q_slc.shape[3] ** -0.5 if scale is None else scale)
    p = q_start + torch.arange(s.shape[1], device=s.device)[:, None]
    i = torch.arange(s.shape[3], device=s.device)[None, :]
    visible = (i + 1) * chunk_size <= p
    if exclude_window > 0:
        visible &= i * chunk_size <= p - exclude_window
    return s, visible[None, :, None, :].expand_as(s), p // chunk_size - 1 - i


def _lowering(recency, distance, span):
    """What recency takes off the scores of chunks at a distance [T, N]: [T, R, N], or 0."""
    if recency is None:
        return 0.0
    return recency[:, None] * ((1 + distance.clamp(min=0)).to(recency).log2() / math.log2(span)).clamp(max=1)[:, None]


def expect_scores(
    q_slc, landmarks, *, chunk_size=64, q_start=0, exclude_window=0, scale=None, recency=None, recency_span=16
) -> tuple[Expected, torch.Tensor]:
    """Every score [B, T, R, N] in float64 and its unit, a float32 sum of D_r products, and whether it is visible."""
    options, D_r = (chunk_size, q_start, exclude_window, scale), q_slc.shape[3]
    eps = 2 * min(eps_of(q_slc.dtype), eps_of(torch.float32))
    q_slc, landmarks = q_slc.detach().double(), landmarks.detach().double()
    value, visible, distance = _scores(q_slc, landmarks, *options)
    scale = D_r**-0.5 if scale is None else scale
    squares = torch.einsum("btrd,bnrd->btrn", q_slc.square(), landmarks.square()) * scale**2
    unit2 = D_r * (squares + value.square())
    if recency is not None:  # rounded, and so is the difference
        lowering = _lowering(recency.detach().double(), distance, recency_span)
        value = value - lowering
        unit2 = unit2 + lowering.square() + value.square()
    return Expected(value, eps * unit2.sqrt(), eps), visible


def retrieve_oracle(
    q_slc, landmarks, topk, *, chunk_size=64, q_start=0, exclude_window=0, scale=None, recency=None, recency_span=16
):
    """scores, indices [B, T, R, K]: the K best visible chunks of each token, ascending, then -1 with score -inf."""
    N = landmarks.shape[1]
    s, visible, distance = _scores(q_slc, landmarks, chunk_size, q_start, exclude_window, scale)
    s = s - _lowering(recency, distance, recency_span)
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


def selected_oracle(q, k, v, indices, *, chunk_size=64, scale=None):
    """out [B, T, HQ, D] and lse [B, T, HQ] of one softmax over the keys of all chunks that a token chose."""
    G = q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    chunk = torch.arange(k.shape[1], device=k.device) // chunk_size
    seen = (indices[..., None] == chunk).any(-2).repeat_interleave(G, 2)  # [B, T, HQ, T_kv]
    k, v = (x.repeat_interleave(G, 2) for x in (k, v))
    s = (torch.einsum("bthd,bshd->bths", q, k) * scale).masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.clamp(min=torch.finfo(s.dtype).min)[..., None])  # -inf - -inf would be NaN
    return torch.einsum("bths,bshd->bthd", p, v), lse


def _product(a, b, terms, eps):
    """a b and the square of its unit: each of the sum's `terms` steps rounds a partial sum by eps."""
    value = a @ b
    return value, eps**2 * terms * (a.square() @ b.square() + value.square())


def _scaled_scores(q_t, k_c, scale, eps):
    """Scores [tokens, G, L] of rows [tokens, G, D] and keys [L, D], and the squares of their units."""
    s, s2 = _product(q_t, k_c.T, q_t.shape[-1], eps)
    s = s * scale
    return s, s2 * scale**2 + eps**2 * (1 + s.square())


def _each_sequence(expect, tensors, cu_seqlens, **options) -> dict[str, Expected]:
    """What `expect` gives for each sequence of a packed batch, one after the other."""
    tensors, ends = [x for x in tensors if x is not None], cu_seqlens.tolist()
    parts = [expect(*(x[:, a:b] for x in tensors), **options) for a, b in itertools.pairwise(ends) if b > a]
    return {
        name: Expected(*(torch.cat([getattr(p[name], x) for p in parts], 1) for x in ("value", "unit")), one.eps)
        for name, one in parts[0].items()
    }


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
        tensors = (q, k, v, weights, indices, do)
        return _each_sequence(expect_attention, tensors, cu_seqlens, chunk_size=chunk_size, scale=scale)
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

            s, s2 = _scaled_scores(q_t, k_c, scale, sums)
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
            ds2 = p.square() * dp2 + ds.square() * (s2 + eps**2)
            dq, dq_sum2 = _product(ds, k_c, S, sums)
            value["dq"][b, t, heads] += scale * w * dq
            dq2 = (most2 * ds2 + small2) @ k_c.square() + most2 * (dq_sum2 + (eps**2 + K * sums**2) * dq.square())
            dq2 += most2 * (row2 * dq.square() + delta2 * (p @ k_c).square()) + small2  # errors that all keys share
            wds, wds2 = w * ds, most2 * (ds2 + ds.square() * row2 + p.square() * delta2) + small2
            unit2["dq"][b, t, heads] += scale**2 * dq2

            for name, x, x2, other, factor in (("dv", wp, wp2, do_t, 1.0), ("dk", wds, wds2, q_t, scale)):
                other = other.reshape(n, D)
                total, sum2 = _product(x.reshape(n, -1).T, other, n, sums)
                value[name][b, keys, h] += factor * total
                unit2[name][b, keys, h] += factor**2 * (x2.reshape(n, -1).T @ other.square() + sum2)
    for name in value.keys() - {"dweights"}:  # what nobody chose is exactly 0
        unit2[name] += torch.where(unit2[name] > 0, (eps * value[name]).square() + least2, 0.0)
    return {name: Expected(value[name], unit2[name].sqrt(), eps) for name in value}


def expect_selected(
    q, k, v, indices, do=None, dlse=None, *, chunk_size=64, scale=None, cu_seqlens=None
) -> dict[str, Expected]:
    """out, lse, dq, dk and dv of `selected_attention` in float64, each with its unit; without do and dlse, out and lse.

    Kept in the type of q: probabilities P = exp(s - lse), dS = P (dP - delta + dlse), a chunk's rows of out and dq
    before they are summed over the chunks, out, of which delta = do . out may be made, and the results. In float32:
    scores, lse, dP = do V^T, every sum. An error E of a score moves its P by P E and lse by P E; one of lse moves all P
    of the row alike, and one of delta all dS of the row in proportion to P. So the last two are counted once for the
    row's sums over keys, out and dq, and for each row in the sums over tokens, dk and dv. Squares of units have names
    in 2.
    """
    if cu_seqlens is not None:
        tensors = (q, k, v, indices, do, dlse)
        return _each_sequence(expect_selected, tensors, cu_seqlens, chunk_size=chunk_size, scale=scale)
    B, T, HQ, D = q.shape
    H, K, S = k.shape[2], indices.shape[3], chunk_size
    G, eps, least2 = HQ // H, eps_of(q.dtype), least_of(q.dtype) ** 2
    exact = min(eps, eps_of(torch.float32))
    sums = 2 * exact  # as in expect_attention
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k, v = (x.detach().double() for x in (q, k, v))
    value = {"out": torch.zeros_like(q), "lse": q.new_full((B, T, HQ), -torch.inf)}
    if do is not None:
        do, dlse = do.detach().double(), dlse.detach().double()
        value |= {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    unit2 = {name: torch.zeros_like(x) for name, x in value.items()}

    def chosen_chunks(b, h):
        """Of each chunk: the tokens that chose it, its keys, their scores [tokens, G, L] and these' units."""
        chosen = indices[b, :, h]
        for c in chosen[(chosen >= 0) & (chosen * S < k.shape[1])].unique().tolist():
            t, keys = (chosen == c).any(-1).nonzero().squeeze(-1), slice(c * S, (c + 1) * S)
            yield t, keys, *_scaled_scores(q[b, t, h * G : (h + 1) * G], k[b, keys, h], scale, sums)

    for b, h in itertools.product(range(B), range(H)):
        # Of this head, and what is kept of it for each row [T, G, 1]: lse, delta and the squares of their units.
        heads = slice(h * G, (h + 1) * G)
        out, out2, lse = value["out"][b, :, heads], unit2["out"][b, :, heads], value["lse"][b, :, heads]
        row2, delta2 = (q.new_zeros(T, G, 1) for _ in range(2))
        for t, _, s, _ in chosen_chunks(b, h):
            lse[t] = torch.logaddexp(lse[t], s.logsumexp(-1))
        for t, keys, s, s2 in chosen_chunks(b, h):
            v_c = v[b, keys, h]
            p = torch.exp(s - lse[t, :, None])
            row2[t] += (p.square() * s2).sum(-1, keepdim=True)
            o, o_sum2 = _product(p, v_c, S, sums)
            out[t] += o
            out2[t] += (p.square() * (eps**2 + s2) + least2) @ v_c.square() + least2
            out2[t] += o_sum2 + (eps**2 + K * sums**2) * o.square()
            if do is not None:
                do_t = do[b, t, heads]
                dp, dp2 = _product(do_t, v_c.T, D, sums)
                error2 = p.square() * (dp2 + dp.square() * (eps**2 + s2 + sums**2 * (S + K)))
                delta2[t] += error2.sum(-1, keepdim=True)
                delta2[t] += (do_t * eps * o).square().sum(-1, keepdim=True)
        row2 += sums**2 * (S + K + 1 + torch.where(lse.isfinite(), lse, 0.0).square()[..., None])
        unit2["lse"][b, :, heads] = row2[..., 0]
        out2 += out.square() * row2

        if do is None:
            continue
        terms = do[b, :, heads] * out
        delta = terms.sum(-1, keepdim=True)
        delta2 += delta.square() * (row2 + sums**2 * (S + K + D)) + (sums * dlse[b, :, heads, None]).square()
        delta2 += (terms.square() * (eps**2 + sums**2 * D) + do[b, :, heads].square() * least2).sum(-1, keepdim=True)
        dq, dq2, weighted_keys = value["dq"][b, :, heads], unit2["dq"][b, :, heads], q.new_zeros(T, G, D)
        # What is too small for the type's relative rounding may be kept scaled or not.
        small2 = least2 * max(1.0, scale**-2 if scale else 1.0)
        for t, keys, s, s2 in chosen_chunks(b, h):
            k_c, do_t, n = k[b, keys, h], do[b, t, heads], len(t) * G
            p = torch.exp(s - lse[t, :, None])
            dp, dp2 = _product(do_t, v[b, keys, h].T, D, sums)
            ds = p * (dp - delta[t] + dlse[b, t, heads, None])
            ds2 = p.square() * dp2 + ds.square() * (eps**2 + s2) + small2
            dq_c, dq_sum2 = _product(ds, k_c, S, sums)
            dq[t] += dq_c
            dq2[t] += ds2 @ k_c.square() + dq_sum2 + (eps**2 + K * sums**2) * dq_c.square() + small2
            weighted_keys[t] += p @ k_c
            ds2 += ds.square() * row2[t] + p.square() * delta2[t]
            p2 = p.square() * (eps**2 + s2 + row2[t]) + least2
            for name, x, x2, other, factor in (
                ("dv", p, p2, do_t, 1.0),
                ("dk", ds, ds2, q[b, t, heads], scale),
            ):
                other = other.reshape(n, D)
                total, sum2 = _product(x.reshape(n, -1).T, other, n, sums)
                value[name][b, keys, h] = factor * total
                unit2[name][b, keys, h] = factor**2 * (x2.reshape(n, -1).T @ other.square() + sum2)
        dq2 += dq.square() * row2 + weighted_keys.square() * delta2
        dq *= scale
        dq2 *= scale**2
    kept = {name: exact if name == "lse" else eps for name in value}
    for name in value:  # what nobody chose is exactly 0
        unit2[name] += torch.where(unit2[name] > 0, (kept[name] * value[name]).square() + least2, 0.0)
    return {name: Expected(value[name], unit2[name].sqrt(), kept[name]) for name in value}
