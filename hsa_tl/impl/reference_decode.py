"""Decode in PyTorch on any device: gathers the chosen pages of a block of tokens and multiplies them in batches.

With P[k] the softmax of one page's scores, out = sum_k (weights[k] P[k]) V[k]. Each product [G, S] x [S, D] is summed
apart: one sum over all K * S keys would err more.
"""

import torch

_BLOCK_ELEMENTS = 2**24  # of gathered keys, and as many of values


def unavailable(problem):
    """Why this implementation cannot run the problem: it always can."""
    return None


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    B, T, HQ, D = q.shape
    P, S, H, _ = k_pages.shape
    K, G = indices.shape[3], HQ // H
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = B * T
    page = page_table.gather(1, indices.flatten(1).clamp(0, page_table.shape[1] - 1).long()).view(rows, H, K)
    chosen = indices.reshape(rows, H, K)
    valid = (chosen >= 0) & (chosen < page_table.shape[1]) & (page >= 0) & (page < P)
    # An empty slot reads a page that the token chose elsewhere: 0 * nan of any other would be nan.
    spare = torch.where(valid, page, -1).amax(-1, keepdim=True)
    row = torch.where(valid, page, spare.clamp(min=0)).long() * H + torch.arange(H, device=q.device)[:, None]
    weights = weights.reshape(rows, H, -1, K).masked_fill(~valid[:, :, None], 0)  # [rows, H, 1 or G, K]
    q = q.reshape(rows, H, G, D)
    out = torch.empty(rows, H, G, D, dtype=q.dtype, device=q.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, H * K * S * D))
    for i in range(0, rows, step):
        part = slice(i, i + step)
        k, v = (_gather(x, row[part]).to(dtype) for x in (k_pages, v_pages))  # [n, H, K, S, D]
        p = (q[part, :, None].to(dtype) @ k.mT).mul_(scale).softmax(-1)  # [n, H, K, G, S]
        p.mul_(weights[part].mT[..., None].to(dtype))
        out[part] = (p @ v).sum(2).masked_fill(spare[part, ..., None] < 0, 0)
    return out.view(B, T, HQ, D)


def _gather(pages, row):
    """pages [P, S, H, D] at row [n, H, K], each page * H + head -> [n, H, K, S, D]."""
    _, S, H, D = pages.shape
    if H == 1:
        return pages.reshape(-1, S * D).index_select(0, row.flatten()).view(*row.shape, S, D)
    return pages[row // H, :, row % H]
