"""The oracle: the operator's equations in plain PyTorch, meant for float64 and for small shapes. Gradients by autograd.

Dense in (token, chunk), so O(T * T) time and memory. Everything else in the project is tested against this file.
"""

import itertools
import math

import torch


def retrieve_oracle(q_slc, landmarks, topk, *, chunk_size=64, q_start=0, exclude_window=0, scale=None):
    """scores, indices [B, T, R, K]: the K best visible chunks of each token, ascending, then -1 with score -inf."""
    _B, T, _R, D_r = q_slc.shape
    N = landmarks.shape[1]
    s = torch.einsum("btrd,bnrd->btrn", q_slc, landmarks) * (1 / math.sqrt(D_r) if scale is None else scale)
    p = q_start + torch.arange(T)[:, None]
    i = torch.arange(N)[None, :]
    visible = (i + 1) * chunk_size <= p
    if exclude_window > 0:
        visible &= i * chunk_size <= p - exclude_window
    visible = visible[None, :, None, :].expand_as(s)
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
