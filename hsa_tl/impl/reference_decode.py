"""Decode in PyTorch on any device: gathers the chosen pages of a block of rows and multiplies them in batches.

A row is a token and key/value head; on a CPU workers share out the blocks.

With P[k] the softmax of one page's scores, out = sum_k (weights[k] P[k]) V[k]; without weights P is that of all pages'
scores. Each product [G, S] x [S, D] is summed apart: one sum over all K * S keys would err more.
"""

import torch

from hsa_tl import workers
from hsa_tl.pairs import within

# Of gathered keys, and as many of values: they should stay in a CPU's cache; accelerators want fewer launches.
_BLOCK_ELEMENTS = {"cpu": 2**19}
_BLOCK_ELEMENTS_ACCELERATOR = 2**24


def slots(q, k_pages, indices, page_table):
    """Of each row's slots [rows, K]: what `gather` reads, and which hold a chunk; and how many rows make a block.

    An empty slot reads a page that the row chose elsewhere: 0 * nan of any other would be nan. On a CPU, where asking
    is cheap, None says that no slot is empty.
    """
    B, T, _, D = q.shape
    P, S, H, _ = k_pages.shape
    K, rows = indices.shape[3], B * T * H
    page = page_table.gather(1, indices.flatten(1).clamp(0, page_table.shape[1] - 1).long()).view(rows, K)
    valid = None
    if q.is_cuda or not (within(indices, 0, page_table.shape[1]) and within(page, 0, P)):
        chosen = indices.reshape(rows, K)
        valid = (chosen >= 0) & (chosen < page_table.shape[1]) & (page >= 0) & (page < P)
        page = torch.where(valid, page, torch.where(valid, page, 0).amax(-1, keepdim=True))
    row = page if H == 1 else page.long() * H + torch.arange(H, device=q.device).repeat(B * T)[:, None]
    elements = _BLOCK_ELEMENTS.get(q.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    return row, valid, max(1, elements // max(1, K * S * D))


def gather(pages, row):
    """pages [P, S, H, D] at row [n, K], each page * H + head -> [n, K, S, D]."""
    _, S, H, D = pages.shape
    if H == 1:
        return pages.reshape(-1, S * D).index_select(0, row.flatten()).view(*row.shape, S, D)
    if not pages.is_contiguous():
        return pages[row // H, :, row % H]
    key = (row // H * (S * H) + row % H)[..., None] + torch.arange(0, S * H, H, device=row.device)  # they lie H apart
    return pages.view(-1, D).index_select(0, key.flatten()).view(*row.shape, S, D)


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    return attend(q, k_pages, v_pages, weights, indices, page_table, scale)[0]


def attend(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D] and, where weights is None and one softmax runs over all of a row's slots, lse [B, T, HQ]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    row, valid, step = slots(q, k_pages, indices, page_table)
    H, K = indices.shape[2:]
    rows = q.reshape(len(row), q.shape[2] // H, q.shape[3])  # [rows, G, D]
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    lse = None if weights is not None else torch.empty(rows.shape[:2], dtype=dtype, device=q.device)
    if weights is not None:
        weights = weights.reshape(len(row), -1, K)
        if valid is not None:
            weights = weights.masked_fill(~valid[:, None], 0)

    def attend_rows(start):
        part = slice(start, start + step)
        k, v = (gather(x, row[part]).to(dtype) for x in (k_pages, v_pages))  # [n, K, S, D]
        p = torch.bmm(rows[part].to(dtype), k.flatten(1, 2).mT).mul_(scale).unflatten(2, k.shape[1:3])  # [n, G, K, S]
        if weights is not None:
            p = p.softmax(-1).mul_(weights[part, ..., None])
        else:
            if valid is not None:
                p.masked_fill_(~valid[part, None, :, None], -torch.inf)
            lse[part] = p.logsumexp((2, 3))
            p.sub_(lse[part, ..., None, None]).exp_()  # NaN of a row without keys
        out[part] = (p.transpose(1, 2) @ v).sum(1)

    workers.each(range(0, len(row), step), attend_rows)
    if valid is not None:
        out.masked_fill_(~valid.any(-1)[:, None, None], 0)
    return out.view(q.shape), lse if lse is None else lse.view(q.shape[:3])
