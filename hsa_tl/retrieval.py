"""Chunk retrieval in PyTorch, on any device: exact top-k over blocks of tokens, sparse backward."""

import itertools
import math
import warnings

import torch

from hsa_tl import workers
from hsa_tl.validation import check_cu_seqlens

BLOCK_SCORES = 1 << 19  # scores held at once: 2 MB of float32, which a CPU's cache holds
BLOCK_TOKENS = 1 << 10  # at once: a few blocks even of a short sequence, for the workers to share
TILE_CHUNKS = 1 << 15  # landmarks at once
ROWS, COLUMNS = 16, 64  # of a matrix product at least; see _scores


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
    return (position - max(0, exclude_window - chunk_size)).clamp(min=0) // chunk_size


def visible_in_decode(lengths, chunks, T: int, N: int, chunk_size: int, exclude_window: int) -> torch.Tensor:
    """[B, T]: as visible_chunks, of T tokens behind `lengths` [B] and of N chunks, or of the `chunks` [B] there are."""
    position = lengths.long()[:, None] + torch.arange(T, device=lengths.device)
    held = N if chunks is None else chunks.clamp(0, N)[:, None]
    return visible_chunks(position, chunk_size, exclude_window).clamp(max=held)


def recency_share(distance: torch.Tensor, span: int, dtype: torch.dtype) -> torch.Tensor:
    """Of recency that a chunk at a distance loses: min(1, log(1 + distance) / log(span)).

    By log2 in float64, so that what is a simple fraction is exact.
    """
    return ((1 + distance.clamp(0, span - 1)).double().log2() / math.log2(span)).to(dtype)


def empty_slots(q_slc: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [B, T, R, topk] and indices of slots that hold no chunk."""
    shape, dtype = (*q_slc.shape[:3], topk), torch.promote_types(q_slc.dtype, torch.float32)
    scores = torch.full(shape, -torch.inf, dtype=dtype, device=q_slc.device)
    return scores, torch.full(shape, -1, dtype=torch.int32, device=q_slc.device)


def best_of_any(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Positions of the topk highest scores of each row; of equal scores the lower position wins."""
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    # One int64 key for each score: an integer that sorts alike (-0 equals 0, NaN is above all, as torch.sort has it),
    # then the position, reversed.
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(scores.isnan(), 2**31 - 1).long()
    reverse = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered * 2**32 + reverse).topk(topk, dim=-1, sorted=False).indices


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


def _lowering(recency, span, own, first, n, dtype):
    """[tokens, n]: what a head's recency takes off n chunks from `first` on; own [tokens], their chunks, ascends."""
    low, high = int(own[0]), int(own[-1])
    distance = torch.arange(high - 1 - first, low - 1 - first - n, -1, device=own.device)
    # What a chunk loses, the next one loses for tokens of the next chunk.
    return (recency.to(dtype) * recency_share(distance, span, dtype)).unfold(0, n, 1)[high - own]


def _retrieve_block(q, marks, visible, topk, scale, lowering):
    """q [rows, D_r], marks [n, D_r], visible [rows] <= n -> scores, positions [rows, min(topk, n)], ascending.

    lowering: what recency takes off the scores [rows, n], or None.
    """
    n = marks.shape[0]
    low, high = (int(x) for x in visible.aminmax())
    scores = _scores(q, marks, scale)
    if lowering is not None:
        scores -= lowering
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


def merge(scores, chosen, topk):
    """The topk best slots of each row, a chunk of -1 is an empty one; they ascend by chunk, empty ones stand last."""
    last = torch.iinfo(chosen.dtype).max
    chosen, order = torch.where(chosen < 0, last, chosen).sort(dim=-1)
    scores = scores.gather(1, order)
    # An empty slot loses against a score of -inf: it stands behind.
    best = best_of_any(scores, min(topk, scores.shape[1])).sort(dim=-1).values
    chosen = chosen.gather(1, best)
    return scores.gather(1, best), torch.where(chosen == last, -1, chosen)


def _blocks(tokens, chunks, q_start, chunk_size):
    """Cuts a sequence's tokens: later ones see more chunks, and rows * visible stays near the budget."""
    N, begin = chunks.stop - chunks.start, tokens.start
    while N and begin < tokens.stop:
        first = q_start + begin - tokens.start
        widest = min(N, max(1, (first + tokens.stop - begin) // chunk_size), TILE_CHUNKS)
        stop = min(tokens.stop, begin + min(BLOCK_TOKENS, max(1, BLOCK_SCORES // widest)))
        yield slice(begin, stop), first, chunks
        begin = stop


def retrieve(
    q_slc, landmarks, topk, chunk_size, q_start, exclude_window, scale, parts, recency=None, recency_span=16
):  # fmt: skip
    """See hsa_tl.api.retrieve_chunks; parts: what `sequences` gives."""
    B, _, R, _ = q_slc.shape
    scores, indices = empty_slots(q_slc, topk)
    dtype = scores.dtype

    def select(block):
        b, r, (tokens, first, chunks) = block
        position = torch.arange(first, first + tokens.stop - tokens.start, device=q_slc.device)
        visible = visible_chunks(position, chunk_size, exclude_window).clamp(max=chunks.stop - chunks.start)
        q, marks, most, best = q_slc[b, tokens, r].to(dtype), landmarks[b, chunks, r], int(visible[-1]), None
        lowering = None
        for tile in range(0, most, TILE_CHUNKS):
            seen = min(most - tile, TILE_CHUNKS)
            part = torch.nn.functional.pad(marks[tile : tile + seen].to(dtype), (0, 0, 0, -seen % COLUMNS))
            if recency is not None:
                lowering = _lowering(recency[r], recency_span, position // chunk_size, tile, len(part), dtype)
            s, i = _retrieve_block(q, part, (visible - tile).clamp(0, seen), topk, scale, lowering)
            i = torch.where(i < 0, -1, i + tile) if tile else i
            best = merge(*(torch.cat(x, 1) for x in zip(best, (s, i), strict=True)), topk) if best else (s, i)
        if best:
            kept = min(topk, best[0].shape[1])
            scores[b, tokens, r, :kept], indices[b, tokens, r, :kept] = (x[:, :kept] for x in best)

    blocks = [x for part in parts for x in _blocks(*part, q_start, chunk_size)]
    # The latest first: their blocks take longest.
    workers.each(list(itertools.product(range(B), range(R), reversed(blocks))), select)
    return scores, indices


def global_chunks(indices, cu_seqlens, num_chunks, chunk_size):
    """Indices that count chunks within their packed sequence, as rows of landmarks."""
    if cu_seqlens is None:
        return indices
    indices = indices.clone()
    for tokens, chunks in sequences(cu_seqlens, indices.shape[1], num_chunks, chunk_size):
        part = indices[:, tokens]
        part += torch.where(part >= 0, chunks.start, 0)
    return indices


def _product(bounds, column, value, dense, out):
    """out [rows, D] = a sparse matrix, by rows, times a dense one. Each row's terms add up in their order."""
    rows, D = out.shape
    step = max(1, BLOCK_SCORES * rows // max(1, len(value) * D))

    def multiply(first):
        part = bounds[first : first + step + 1]
        begin, end = int(part[0]), int(part[-1])
        shape = len(part) - 1, len(dense)
        matrix = (part - begin).int(), column[begin:end].int(), value[begin:end]
        out[first : first + step] = torch.sparse_csr_tensor(*matrix, shape, check_invariants=False) @ dense

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        workers.each(range(0, rows, step), multiply)


def dq_slc(dscores, indices, q_slc, landmarks, scale):
    """dq_slc[t] = scale * sum_k dscores[t, k] landmarks[i]; indices: rows of landmarks."""
    B, T, R, D_r = q_slc.shape
    dq = torch.empty_like(q_slc, memory_format=torch.contiguous_format)
    rows = max(1, BLOCK_SCORES // (indices.shape[3] * D_r))
    for b, r in itertools.product(range(B), range(R)):
        marks = landmarks[b, :, r].to(dscores.dtype)
        if not marks.numel():
            return dq.zero_()
        if not dq.is_cuda:
            valid = indices[b, :, r] >= 0
            bounds = torch.nn.functional.pad(valid.sum(-1).cumsum(0), (1, 0))
            weight = dscores[b, :, r][valid] * scale
            _product(bounds, indices[b, :, r][valid], weight, marks, dq[b, :, r])
            continue
        for begin in range(0, T, rows):
            part = slice(begin, begin + rows)
            empty = indices[b, part, r] < 0
            chosen = marks[indices[b, part, r].clamp(min=0).long()].masked_fill_(empty[..., None], 0.0)
            weight = torch.where(empty, 0.0, dscores[b, part, r] * scale)
            # No matrix product: a program may have set it to TensorFloat-32.
            dq[b, part, r] = chosen.mul_(weight[..., None]).sum(1).to(dq.dtype)
    return dq


def dlandmarks(dscores, pairs, q_slc, num_chunks, scale):
    """dlandmarks[i] = scale * sum of dscores[t, k] q_slc[t] over the pairs that chose chunk i, in the pairs' order."""
    B, _, R, D_r = q_slc.shape
    K = dscores.shape[3]
    out = q_slc.new_empty(B, num_chunks, R, D_r)
    pair, offsets = pairs
    ends = offsets[::num_chunks].tolist() if num_chunks else []
    for b, r in itertools.product(range(B), range(R) if num_chunks else ()):
        i = b * R + r
        part = pair[ends[i] : ends[i + 1]]
        bounds = offsets[i * num_chunks : (i + 1) * num_chunks + 1] - ends[i]
        weight = dscores[b, :, r].flatten()[part] * scale
        _product(bounds, part // K, weight, q_slc[b, :, r].to(weight.dtype), out[b, :, r])
    return out
