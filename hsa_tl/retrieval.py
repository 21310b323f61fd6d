"""Chunk retrieval in PyTorch, on any device: exact top-k over blocks of tokens, sparse backward."""

import itertools

import torch

BLOCK_SCORES = 1 << 18  # scores held at once: 1 MB of float32, which stays in a CPU's cache
TILE_CHUNKS = 1 << 15  # landmarks at once
ROWS, COLUMNS = 16, 64  # of a matrix product at least; see _scores


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


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """float32 scores as int64 that sort alike: -0 equals 0, NaN is above all, as torch.sort has it."""
    bits = (scores + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(scores.isnan(), 2**31 - 1).long()


def best_of_any(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Positions of the topk highest scores of each row; of equal scores the lower position wins."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    # One int64 key for each score: its order as an integer, then the position, reversed.
    reverse = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (_ordered(scores) * 2**32 + reverse).topk(topk, dim=-1, sorted=False).indices


def _best(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """As best_of_any, for rows whose topk-th score differs from the next in groups and alone; the others go there.

    A row's topk best lie in the topk groups of the highest maxima. scores [rows, n], n a multiple of COLUMNS.
    """
    rows, n = scores.shape
    if scores.dtype == torch.float64 or scores.is_cuda:  # on CUDA, asking whether there is a tie would synchronise
        return best_of_any(scores, topk)
    size = 1  # of a group: about sqrt(n / (2 topk)), a power of two
    while 8 * size * size * topk <= n and size < COLUMNS:
        size *= 2
    groups = scores.view(rows, size, n // size)  # group j: positions j, j + n / size, ...: maxima of whole vectors
    maxima = groups.amax(1) if size > 1 else scores
    highest, group = maxima.topk(topk, dim=-1, sorted=False)
    tie = (maxima >= highest.amin(-1, keepdim=True)).sum(-1) != topk
    if size == 1:
        best = group
    else:
        candidates = groups.gather(2, group[:, None].expand(-1, size, -1)).flatten(1)
        value, at = candidates.topk(topk, dim=-1, sorted=False)
        tie |= (candidates >= value.amin(-1, keepdim=True)).sum(-1) != topk
        best = group.gather(1, at % topk) + at // topk * (n // size)
    if tie.any():
        best[tie] = best_of_any(scores[tie], topk)
    return best


def _scores(q, marks, scale):
    """q [rows, D_r] . marks [n, D_r] * scale, the same bits for a row and a mark whatever is beside them.

    From about 8 rows and 16 columns on, a CPU's matrix product sums every element in the same order; fewer take other
    ways. n is a multiple of COLUMNS. Scaled after the product: scaling the query first could break an exact tie.
    """
    rows = q.shape[0]
    if rows < ROWS:
        q = torch.nn.functional.pad(q, (0, 0, 0, ROWS - rows))
    return (q @ marks.T).mul_(scale)[:rows]


def _retrieve_block(q, marks, visible, topk, scale):
    """q [rows, D_r], marks [n, D_r], visible [rows] <= n -> scores, positions [rows, min(topk, n)], ascending."""
    n = marks.shape[0]
    low, high = (int(x) for x in visible.aminmax())
    scores = _scores(q, marks, scale)
    if low < n:
        scores[:, low:].masked_fill_(torch.arange(low, n, device=q.device) >= visible[:, None], -torch.inf)
    kept = min(topk, n)
    if high <= kept:
        chosen = torch.arange(kept, device=q.device).expand(len(q), -1)
    else:
        chosen = _best(scores, kept)
    chosen = torch.where(chosen < visible[:, None], chosen, n).sort(dim=-1).values
    empty = chosen == n
    scores = scores.gather(-1, chosen.clamp(max=n - 1)).masked_fill_(empty, -torch.inf)
    return scores, chosen.masked_fill_(empty, -1)


def _merge(scores, chosen, others, other_chosen, topk):
    """The topk best of two selections, the second of later chunks; slots ascend by chunk, empty ones stand last."""
    scores, chosen = torch.cat([scores, others], 1), torch.cat([chosen, other_chosen], 1)
    last = torch.iinfo(chosen.dtype).max
    chosen, order = torch.where(chosen < 0, last, chosen).sort(dim=-1)
    scores = scores.gather(1, order)
    # An empty slot loses against a score of -inf: it stands behind.
    best = best_of_any(scores, min(topk, scores.shape[1])).sort(dim=-1).values
    chosen = chosen.gather(1, best)
    return scores.gather(1, best), torch.where(chosen == last, -1, chosen)


def retrieve(q_slc, landmarks, topk, chunk_size, q_start, exclude_window, cu_seqlens, scale):
    """See hsa_tl.api.retrieve_chunks."""
    B, T, R, _ = q_slc.shape
    dtype = torch.promote_types(q_slc.dtype, torch.float32)
    scores = q_slc.new_full((B, T, R, topk), -torch.inf, dtype=dtype)
    indices = torch.full((B, T, R, topk), -1, dtype=torch.int32, device=q_slc.device)
    for tokens, chunks in sequences(cu_seqlens, T, landmarks.shape[1], chunk_size):
        N = chunks.stop - chunks.start
        for b, r in itertools.product(range(B), range(R) if N else ()):
            marks = landmarks[b, chunks, r]
            begin, end = tokens.start, tokens.stop
            while begin < end:
                # Later tokens see more chunks: keep rows * visible near the budget.
                first = q_start + begin - tokens.start
                widest = min(N, max(1, (first + end - begin) // chunk_size), TILE_CHUNKS)
                stop = min(end, begin + max(1, BLOCK_SCORES // widest))
                position = torch.arange(first, first + stop - begin, device=q_slc.device)
                visible = visible_chunks(position, chunk_size, exclude_window).clamp(max=N)
                q, best = q_slc[b, begin:stop, r].to(dtype), None
                for tile in range(0, int(visible[-1]), TILE_CHUNKS):
                    seen = min(int(visible[-1]) - tile, TILE_CHUNKS)
                    part = marks[tile : tile + seen].to(dtype)
                    part = torch.nn.functional.pad(part, (0, 0, 0, -seen % COLUMNS))
                    s, i = _retrieve_block(q, part, (visible - tile).clamp(0, seen), topk, scale)
                    i = torch.where(i < 0, -1, i + tile) if tile else i
                    best = _merge(*best, s, i, topk) if best else (s, i)
                if best:
                    kept = min(topk, best[0].shape[1])
                    scores[b, begin:stop, r, :kept], indices[b, begin:stop, r, :kept] = (x[:, :kept] for x in best)
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
