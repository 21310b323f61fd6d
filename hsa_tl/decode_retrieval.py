"""The retrieval step of decode in PyTorch, on any device: a scan of the landmarks and a top-k, for a few tokens.

O(tokens * N) memory for the scores: few, where retrieve_chunks has many tokens. With bounds, blocks of BLOCK landmarks
whose best possible score is below the topk-th of the blocks seen so far are not read at all: exact.
"""

import functools

import torch

from hsa_tl import workers
from hsa_tl.retrieval import best_of_any, empty_slots, recency_share, visible_in_decode
from hsa_tl.validation import require_float, require_tensor

BLOCK = 64  # landmarks that share a bound
_ROWS = 16  # MKL sums a score the same way, to the last bit, for a multiple of so many tokens and as many landmarks
_RANGE_ELEMENTS = 1 << 19  # of the landmarks that a worker scores at once
_CONVERTED = 1 << 20  # elements of 16-bit landmarks made float32 at once


def landmark_bounds(landmarks: torch.Tensor) -> torch.Tensor:
    """Bounds of each block of 64 landmarks, by which `retrieve_decode` skips blocks.

    Args:
        landmarks (Tensor [B, N, R, D_r]): in any floating dtype.

    Returns:
        Tensor [B, ceil(N / 64), 2, R, D_r]: the least and the greatest value of each coordinate in each block.

    Raises:
        ValueError, TypeError: landmarks of another number of dimensions or not of a floating dtype.
    """
    require_tensor("landmarks", landmarks, 4)
    require_float("landmarks", landmarks)
    missing = -landmarks.shape[1] % BLOCK
    if missing:  # the last landmark again moves no bound
        landmarks = torch.cat([landmarks, landmarks[:, -1:].expand(-1, missing, -1, -1)], 1)
    landmarks = landmarks.unflatten(1, (landmarks.shape[1] // BLOCK, BLOCK))
    return torch.stack([landmarks.amin(2), landmarks.amax(2)], 2)


def products(q, marks, dtype):
    """q [.., T, D_r] . marks [.., n, D_r] -> [.., T, n] summed in dtype; a token's bits depend on nothing else."""
    if q.device.type == "cuda" and q.dtype != dtype and q.ndim == 3:
        return torch.bmm(q, marks.mT, out_dtype=dtype)
    T, n = q.shape[-2], marks.shape[-2]
    if q.device.type == "cpu":
        q = torch.constant_pad_nd(q, (0, 0, 0, -T % _ROWS))
    q = q.to(dtype)
    if marks.dtype == dtype or marks.numel() <= _CONVERTED:
        if n < _ROWS:  # a pad by nothing would copy all of them
            marks = torch.nn.functional.pad(marks, (0, 0, 0, _ROWS - n))
        return (q @ marks.to(dtype).mT)[..., :T, :n]
    step = max(_ROWS, _CONVERTED * n // marks.numel())
    return torch.cat([products(q, part, dtype)[..., :T, :] for part in marks.split(step, -2)], -1)


def retrieve_decode(
    q_slc, landmarks, lengths, chunks, topk, chunk_size, exclude_window, scale, bounds=None, recency=None,
    recency_span=16,
):  # fmt: skip
    """See hsa_tl.api.retrieve_decode; without recency where bounds are given."""
    T, dtype = q_slc.shape[1], torch.promote_types(q_slc.dtype, torch.float32)
    visible = visible_in_decode(lengths, chunks, T, landmarks.shape[1], chunk_size, exclude_window)
    hides = True
    if visible.device.type == "cpu" and visible.numel():  # what no token sees need not be read
        ends = visible.flatten().tolist()
        landmarks, hides = landmarks[:, : max(ends)], min(ends) < max(ends)
    N = landmarks.shape[1]
    if not N or not visible.numel():
        return empty_slots(q_slc, topk)
    k = min(topk, N)
    if bounds is not None:
        scores, chosen = _two_level(q_slc, landmarks, bounds, visible, k, scale, dtype)
    else:
        lowering = None
        if recency is not None:
            own = (lengths.long()[:, None] + torch.arange(T, device=lengths.device)) // chunk_size
            lowering = recency.to(dtype)[:, None], own, recency_span
        scores, chosen = _scan(q_slc, landmarks, visible if hides else None, k, scale, dtype, lowering)
    if hides:
        empty = chosen >= visible[:, :, None, None]  # behind the others
        scores, chosen = scores.masked_fill(empty, -torch.inf), chosen.masked_fill(empty, -1)
    indices = chosen.int()
    if k == topk:
        return scores, indices
    pad = torch.nn.functional.pad
    return pad(scores, (0, topk - k), value=-torch.inf), pad(indices, (0, topk - k), value=-1)


def _best(scores, k):
    """Positions of the k best of each row, ascending; of equal scores the lower position wins."""
    if k < scores.shape[-1] and not scores.is_cuda:
        value, at = scores.topk(k + 1)
        if (value[..., k - 1] > value[..., k]).all():
            return at[..., :k].sort(-1).values
    return best_of_any(scores, k).sort(-1).values


def _scan(q_slc, landmarks, visible, k, scale, dtype, lowering):
    """Scores and chunks [B, T, R, k] of the best, ascending: those of ranges of landmarks first, on a CPU.

    visible: [B, T], None where every token sees all landmarks. lowering: recency [R, 1], the tokens' own chunks [B, T]
    and the span, or None.
    """
    (B, _, R, D_r), N = q_slc.shape, landmarks.shape[1]
    size = N if q_slc.is_cuda else max(BLOCK, _RANGE_ELEMENTS // (B * R * D_r) // BLOCK * BLOCK)
    parts = []

    def score(start):
        marks = landmarks[:, start : start + size]
        scores = [products(q_slc[:, :, r], marks[:, :, r], dtype) for r in range(R)]
        scores = scores[0].unsqueeze(2) if R == 1 else torch.stack(scores, 2)
        scores.mul_(scale)  # [B, T, R, n]; after the product, as in retrieve_chunks: scaling first could break a tie
        if lowering is not None:
            recency, own, span = lowering
            distance = own[..., None] - 1 - start - torch.arange(marks.shape[1], device=own.device)
            scores -= recency * recency_share(distance, span, dtype).unsqueeze(2)
        if visible is not None:
            hidden = torch.arange(start, start + marks.shape[1], device=q_slc.device) >= visible[..., None]
            scores.masked_fill_(hidden[:, :, None], -torch.inf)
        chosen = _best(scores, min(k, marks.shape[1]))
        return scores.gather(-1, chosen), chosen + start if start else chosen

    workers.each(range(0, N, size), score, parts.append)
    if len(parts) == 1:
        return parts[0]
    scores, chosen = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    best = _best(scores, k)
    return scores.gather(-1, best), chosen.gather(-1, best)


def _two_level(q_slc, landmarks, bounds, visible, k, scale, dtype):
    """Scores and chunks [B, T, R, k] of the best, ascending; reads the device, to know which blocks to read."""
    B, T, R, D_r = q_slc.shape
    N = landmarks.shape[1]
    blocks = -(-N // BLOCK)
    scores = torch.full((B, T, R, k), -torch.inf, dtype=dtype, device=q_slc.device)
    chosen = torch.full((B, T, R, k), N, dtype=torch.int64, device=q_slc.device)
    low, high = bounds[:, :blocks].to(dtype).unbind(2)  # [B, blocks, R, D_r]
    q, sums = q_slc.to(dtype), functools.partial(torch.einsum, "btrd,bnrd->btrn")
    best_of = sums(q.clamp(min=0), high) + sums(q.clamp(max=0), low)
    # Both the bound and a score may be off by the rounding of D_r products.
    size = sums(q.abs(), torch.maximum(low.abs(), high.abs()))
    best_of = (best_of + 4 * D_r * torch.finfo(dtype).eps * size) * scale
    first = torch.arange(blocks, device=q.device) * BLOCK
    best_of.masked_fill_((first >= visible[..., None])[:, :, None], -torch.inf)
    enough = min(blocks, -(-2 * k // BLOCK) + 1)

    def select(query):
        b, t, r = query
        bound, n = best_of[b, t, r], int(visible[b, t])
        seen = bound.topk(enough).indices
        s, i = _score_blocks(q_slc[b, t, r], landmarks[b, :n, r], seen, scale, dtype)
        least = s.topk(min(k, len(s))).values[-1] if len(s) >= k else -torch.inf
        rest = ~(bound < least) & (bound != -torch.inf)  # of a nan nobody knows
        rest[seen] = False
        if int(rest.sum()) > blocks // 4:  # a gather costs more than it saves
            i = torch.arange(n, device=q.device)
            s = products(q_slc[b, t, r][None], landmarks[b, :n, r], dtype)[0] * scale
        else:
            more = _score_blocks(q_slc[b, t, r], landmarks[b, :n, r], rest.nonzero()[:, 0], scale, dtype)
            s, i = torch.cat([s, more[0]]), torch.cat([i, more[1]])
        i, order = i.sort()  # of equal scores the lower position wins
        s = s[order]
        best = _best(s, min(k, len(s)))
        scores[b, t, r, : len(best)], chosen[b, t, r, : len(best)] = s[best], i[best]

    workers.each(torch.cartesian_prod(*map(torch.arange, (B, T, R))).view(-1, 3).tolist(), select)
    return scores, chosen


def _score_blocks(q, marks, blocks, scale, dtype):
    """Scores of the landmarks [n, D_r] in the blocks, and which they are."""
    i = (blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten()
    i = i[i < len(marks)]
    return products(q[None], marks[i], dtype)[0] * scale, i
