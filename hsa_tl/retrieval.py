"""Chunk retrieval in PyTorch, on any device: exact top-k over blocks of tokens, sparse backward."""

import itertools

import torch

BLOCK_SCORES = 1 << 20  # scores held at once; 4 MB of float32 and 8 MB of sort keys


def check_cu_seqlens(cu_seqlens: torch.Tensor, T: int) -> None:
    """ValueError unless cu_seqlens rises from 0 to T."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T or sorted(ends) != ends:
        raise ValueError(f"cu_seqlens must rise from 0 to the token count {T}, got {ends}")


def sequences(cu_seqlens, T, N, chunk_size):
    """(tokens, chunks) slices of each packed sequence, or of the one sequence there is."""
    if cu_seqlens is None:
        return [(slice(0, T), slice(0, N))]
    check_cu_seqlens(cu_seqlens, T)
    ends, parts, first = cu_seqlens.tolist(), [], 0
    for a, b in itertools.pairwise(ends):
        last = first - (a - b) // chunk_size
        parts.append((slice(a, b), slice(first, last)))
        first = last
    if first != N:
        raise ValueError(f"landmarks must hold {first} chunks, ceil(len / {chunk_size}) a sequence, got {N}")
    return parts


def visible_chunks(position: torch.Tensor, chunk_size: int, exclude_window: int) -> torch.Tensor:
    """How many chunks a token at each position may retrieve: whole ones in the past, not all inside its window."""
    visible = position // chunk_size
    if exclude_window > 0:
        outside = torch.div(position - exclude_window, chunk_size, rounding_mode="floor") + 1
        visible = torch.minimum(visible, outside.clamp(min=0))
    return visible


def _best(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Positions of the topk highest scores of each row; of equal scores the lower position wins."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    # One int64 key for each score: its float32 bits made to sort as integers, then the position, reversed.
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    reverse = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered * 2**32 + reverse).topk(topk, dim=-1, sorted=False).indices


def _retrieve_block(q, landmarks, visible, topk, scale):
    """q [R, n, D_r], landmarks [R, N, D_r], visible [n] -> scores, indices [R, n, min(topk, N)]."""
    N = landmarks.shape[1]
    # Scaled after the product: scaling the query first could break an exact tie.
    scores = (q @ landmarks.transpose(1, 2)).mul_(scale)
    hidden = torch.arange(N, device=q.device) >= visible[:, None]
    scores.masked_fill_(hidden, -torch.inf)
    best = _best(scores, min(topk, N))
    chosen = torch.where(best < visible[:, None], best, N).sort(dim=-1).values
    empty = chosen == N
    scores = scores.gather(-1, chosen.clamp(max=N - 1)).masked_fill_(empty, -torch.inf)
    return scores, chosen.masked_fill_(empty, -1)


def retrieve(q_slc, landmarks, topk, chunk_size, q_start, exclude_window, cu_seqlens, scale):
    """See hsa_tl.api.retrieve_chunks."""
    B, T, R, _ = q_slc.shape
    dtype = torch.promote_types(q_slc.dtype, torch.float32)
    scores = q_slc.new_full((B, T, R, topk), -torch.inf, dtype=dtype)
    indices = torch.full((B, T, R, topk), -1, dtype=torch.int32, device=q_slc.device)
    for tokens, chunks in sequences(cu_seqlens, T, landmarks.shape[1], chunk_size):
        for b in range(B):
            marks = landmarks[b, chunks].to(dtype).transpose(0, 1).contiguous()
            begin, end = tokens.start, tokens.stop
            while begin < end:
                # Later tokens see more chunks: keep rows * visible near the budget.
                widest = max(1, min(marks.shape[1], (q_start + end - tokens.start) // chunk_size))
                stop = min(end, begin + max(1, BLOCK_SCORES // (R * widest)))
                first = q_start - tokens.start
                position = torch.arange(begin + first, stop + first, device=q_slc.device)
                visible = visible_chunks(position, chunk_size, exclude_window).clamp(max=marks.shape[1])
                seen = min(marks.shape[1], (stop - 1 + first) // chunk_size)
                if seen > 0:
                    q = q_slc[b, begin:stop].to(dtype).transpose(0, 1)
                    s, i = _retrieve_block(q, marks[:, :seen], visible, topk, scale)
                    scores[b, begin:stop, :, : s.shape[-1]] = s.transpose(0, 1)
                    indices[b, begin:stop, :, : s.shape[-1]] = i.transpose(0, 1).int()
                begin = stop
    return scores, indices


def retrieve_backward(dscores, indices, q_slc, landmarks, cu_seqlens, chunk_size, scale):
    """dq_slc[t] = scale * sum_k ds[t, k] landmarks[i], dlandmarks[i] = scale * sum over (t, k) that chose i of ds q."""
    B, T, R, D_r = q_slc.shape
    topk = indices.shape[3]
    dq = torch.empty_like(q_slc, memory_format=torch.contiguous_format)
    dmarks = landmarks.new_zeros(landmarks.shape, dtype=dscores.dtype)
    ds = torch.where(indices >= 0, dscores * scale, 0.0)
    rows = max(1, BLOCK_SCORES // max(1, topk * D_r))
    for tokens, chunks in sequences(cu_seqlens, T, landmarks.shape[1], chunk_size):
        if chunks.start == chunks.stop:
            continue
        for b in range(B):
            for r in range(R):
                marks = landmarks[b, chunks, r].to(ds.dtype)
                for begin in range(tokens.start, tokens.stop, rows):
                    part = slice(begin, min(tokens.stop, begin + rows))
                    # An empty slot points at chunk 0 with gradient 0, and adds.
                    chosen = indices[b, part, r].clamp(min=0).long()
                    weight = ds[b, part, r]
                    dq[b, part, r] = torch.einsum("tk,tkd->td", weight, marks[chosen]).to(dq.dtype)
                    grads = weight[..., None] * q_slc[b, part, r, None].to(ds.dtype)
                    dmarks[b, chunks, r].index_add_(0, chosen.flatten(), grads.flatten(0, 1))
    return dq, dmarks.to(landmarks.dtype)
