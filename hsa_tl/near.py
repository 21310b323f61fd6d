"""Bounded recency: scores lowered by recency[r] * min(1, log(1 + d) / log(span)), d whole chunks to the token's own.

Chunks with d >= span - 1 are far. All lose recency[r], which changes neither their order nor their ties: the topk best
of them are what a kernel finds by plain scores under a window that hides the others. Those others, at most span - 1
near chunks, are all scored here; the topk best of both are the topk best of all. Among near ones, and between near and
far, lowered scores decide, and of equal ones the lower chunk. PyTorch's retrieval lowers all of its scores instead, so
that far ones which rounding makes equal count as such there.
"""

import torch

from hsa_tl import workers
from hsa_tl.decode_retrieval import products
from hsa_tl.retrieval import merge, recency_share, sequences, visible_chunks, visible_in_decode

BLOCK_ELEMENTS = 1 << 20  # of queries, landmarks and scores that are held at once, on a CPU


def check(recency: torch.Tensor) -> None:
    """ValueError unless recency is finite and at least 0."""
    if not bool(((recency >= 0) & recency.isfinite()).all()):
        raise ValueError(f"recency must be finite and at least 0, got {recency.tolist()}")


def far_window(span, chunk_size, exclude_window):
    """The exclude_window that leaves the far chunks alone."""
    return max(exclude_window, span * chunk_size)


def _join(far, q, landmarks, own, visible, recency, span, scale):
    """far [B, G, s, R, K] twice, q [B, G, s, R, D_r], own [B, G], visible [B, G, s] -> scores, indices as far.

    A group of s tokens lies in the chunk own and so has its near chunks in common.
    """
    B, N, K, dtype = len(q), landmarks.shape[1], far[0].shape[4], far[0].dtype
    n = min(span - 1, N)
    i = (own - (span - 1)).clamp(min=0)[..., None] + torch.arange(n, device=q.device)  # [B, G, n]
    marks = landmarks[torch.arange(B, device=q.device)[:, None, None], i.clamp(max=N - 1)]  # [B, G, n, R, D_r]
    scores = products(q.transpose(2, 3), marks.transpose(2, 3), dtype).mul_(scale)  # [B, G, R, s, n]
    recency = recency.to(dtype)[:, None]
    scores -= (recency * recency_share(own[..., None] - 1 - i, span, dtype)[:, :, None])[:, :, :, None]
    hidden = (i[:, :, None] >= visible[..., None])[:, :, :, None]  # [B, G, s, 1, n]
    scores = scores.transpose(2, 3).masked_fill(hidden, -torch.inf)
    i = torch.where(hidden, -1, i[:, :, None, None]).int().expand_as(scores)
    both = torch.cat([far[0] - recency, scores], -1), torch.cat([far[1], i], -1)
    return [x.view_as(y) for x, y in zip(merge(*(x.flatten(0, 3) for x in both), K), far, strict=True)]


def join(q_slc, scores, indices, landmarks, cu_seqlens, recency, span, chunk_size, q_start, exclude_window, scale):
    """retrieve_chunks with recency, in place of its far chunks' scores and indices [B, T, R, K]."""
    (B, T, R, D_r), N, S = q_slc.shape, landmarks.shape[1], chunk_size
    if not scores.numel() or not N:
        return scores, indices
    n = min(span - 1, N)
    elements = B * R * (S * D_r + n * D_r + S * (n + scores.shape[3]))  # of a group: the tokens of a chunk
    step = max(1, BLOCK_ELEMENTS * (64 if q_slc.is_cuda else 1) // elements) * S

    def select(block):
        tokens, chunks, begin = block
        begin, end = max(begin, 0), min(begin + step, tokens.stop - tokens.start)
        first, part = q_start + begin, slice(tokens.start + begin, tokens.start + end)
        pad = (0, 0, 0, 0, first % S, -(q_start + end) % S)  # to whole groups
        q, *far = (torch.nn.functional.pad(x[:, part], pad).unflatten(1, (-1, S)) for x in (q_slc, scores, indices))
        position = torch.arange(first - first % S, q_start + end + pad[-1], device=q_slc.device).view(1, -1, S)
        visible = visible_chunks(position, S, exclude_window).clamp(max=chunks.stop - chunks.start)
        own = position[..., 0].expand(B, -1) // S
        found = _join(far, q, landmarks[:, chunks], own, visible, recency, span, scale)
        scores[:, part], indices[:, part] = (x.flatten(1, 2)[:, pad[4] : pad[4] + end - begin] for x in found)

    blocks = [
        (tokens, chunks, begin)
        for tokens, chunks in sequences(cu_seqlens, T, N, S)
        for begin in range(-(q_start % S), tokens.stop - tokens.start, step)
    ]
    workers.each(blocks, select)
    return scores, indices


def join_decode(
    q_slc, scores, indices, landmarks, lengths, chunks, recency, span, chunk_size, exclude_window, scale
):  # fmt: skip
    """As `join`, for retrieve_decode: each token is a group."""
    if not scores.numel() or not landmarks.shape[1]:
        return scores, indices
    T = q_slc.shape[1]
    visible = visible_in_decode(lengths, chunks, T, landmarks.shape[1], chunk_size, exclude_window)
    own = (lengths.long()[:, None] + torch.arange(T, device=lengths.device)) // chunk_size
    far, q = [x.unsqueeze(2) for x in (scores, indices)], q_slc.unsqueeze(2)
    found = _join(far, q, landmarks, own, visible.unsqueeze(2), recency, span, scale)
    return tuple(x.squeeze(2) for x in found)


def drecency(dscores, indices, cu_seqlens, recency, span, chunk_size, q_start):
    """drecency[r] = -sum over tokens and slots of dscores * min(1, log(1 + d) / log(span))."""
    if recency is None:
        return None
    position = q_start + torch.arange(indices.shape[1], device=indices.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1]
        position = position - starts[torch.searchsorted(starts, position.int(), right=True) - 1]
    distance = (position // chunk_size - 1)[:, None, None] - indices
    share = torch.where(indices < 0, 0.0, dscores * recency_share(distance, span, dscores.dtype))
    # A sum to one number would be shared out among threads: one head's bits would depend on how many there are.
    return -torch.nn.functional.pad(share.sum(3), (0, 1)).sum((0, 1))[:-1].to(recency.dtype)
