"""The public functions: meaning, validation, shapes, choice of implementation.

Dims, for the whole project: B batch, T tokens, HQ query heads, H key/value heads, G = HQ // H query heads for each
key/value head, D head dimension, S chunk size, N chunks, K selected chunks, R retrieval heads, D_r their dimension.
Tensors are laid out [B, T, heads, dim]. Index -1 is an empty slot.
"""

import torch

from hsa_tl import ops, transforms
from hsa_tl.chunks import pairs_for_backward, whole_chunks
from hsa_tl.decode_retrieval import BLOCK
from hsa_tl.fusion import fusion_weights as fusion_weights
from hsa_tl.pairs import Pairs, check_range
from hsa_tl.validation import IMPLS as IMPLS
from hsa_tl.validation import (
    check_past,
    check_weights,
    config_json,
    require,
    require_attention,
    require_common,
    require_cu_seqlens,
    require_decode,
    require_flags,
    require_float,
    require_int,
    require_pairs,
    require_retrieval,
    require_shape,
    require_tensor,
    require_weights,
    shape_of,
    validates,
)


def build_pairs(indices: torch.Tensor, num_chunks: int) -> Pairs:
    """The inverted index of a selection: its (token, slot) pairs sorted by chunk, in O(pairs) memory, deterministic.

    Args:
        indices (Tensor [B, T, H, K], int32): the chosen chunks; -1 is an empty slot.
        num_chunks (int): N, the chunks that each sequence has.

    Returns:
        Pairs: `pair` [B * T * H * K] int32 and `offsets` [B * H * N + 1] int64, see `Pairs`.

    Raises:
        ValueError, TypeError: indices of another dtype or shape, or, on a CPU, outside [-1, num_chunks).

    Example:
        >>> pairs = build_pairs(torch.tensor([[[[0, -1]], [[0, 1]]]], dtype=torch.int32), num_chunks=2)
        >>> pairs.pair[pairs.offsets[0] : pairs.offsets[1]].tolist()  # chunk 0: token 0 slot 0, token 1 slot 0
        [0, 2]
    """
    require_tensor("indices", indices, 4, dtype=torch.int32)
    require_pairs(indices)
    require_int("num_chunks", num_chunks, 0)
    return Pairs(*ops.build_pairs(indices, num_chunks, validates(indices, None)))


def retrieve_chunks(
    q_slc: torch.Tensor,
    landmarks: torch.Tensor,
    topk: int,
    *,
    chunk_size: int = 64,
    q_start: int = 0,
    exclude_window: int = 0,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    recency: torch.Tensor | None = None,
    recency_span: int = 16,
    impl: str = "auto",
    validate: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` visible chunks of highest score s[t, i] = q_slc[t] . landmarks[i] * scale (paper, section 2.2).

    Chunk i is visible to the token at position p = q_start + t when (i + 1) * chunk_size <= p: only whole chunks
    strictly in the past. No (T, N) matrix is built beyond a block of tokens.

    Args:
        q_slc (Tensor [B, T, R, D_r]): retrieval queries in any floating dtype.
        landmarks (Tensor [B, N, R, D_r], like q_slc): one vector for each chunk, such as the landmarks of
            `hsa_tl.model.ChunkEncoder`.
        topk (int): K, the slots of each token.
        chunk_size (int): S, one of 16, 32, 64, 128. Default: 64.
        q_start (int): position of the first query. Default: 0.
        exclude_window (int): w > 0 also hides chunks that a sliding window of w tokens covers whole: visible chunks
            then have i * chunk_size <= p - w. Default: 0.
        cu_seqlens (Tensor [n + 1], int32): offsets of packed sequences, with B = 1 and q_start = 0. `landmarks` then
            holds ceil(length / chunk_size) rows for each sequence, one sequence after the other, and indices count
            chunks within the sequence. It is read on the host. Default: None.
        scale (float): default: 1 / sqrt(D_r).
        recency (Tensor [R], float32): at least 0: how much far chunks are disfavoured. Chunk i loses
            recency[r] * min(1, log(1 + d) / log(recency_span)) of its score, before the selection, d = p // chunk_size
            - 1 - i being the whole chunks between it and the token. Default: None, as if 0.
        recency_span (int): at least 2; chunks at d = recency_span - 1 and farther all lose recency[r]. Default: 16.
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here.
        validate (bool): True: landmarks must hold every whole chunk before the last token. Default: None, they may be
            fewer, and what they do not hold is not chosen. The values of recency are checked as in `hsa_attention`
            those of indices.

    Returns:
        scores [B, T, R, topk] float32 (float64 for float64 inputs), differentiable in q_slc, landmarks and recency, and
        indices [B, T, R, topk] int32. Slots ascend by chunk; of equal scores the lower chunk wins; slots beyond the
        visible chunks come last with index -1 and score -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> scores, indices = retrieve_chunks(torch.ones(1, 64, 1, 8), torch.ones(1, 4, 1, 8), 2, chunk_size=16)
        >>> indices[0, [15, 16, 63], 0].tolist()  # nothing is whole and past before token 16
        [[-1, -1], [0, -1], [0, 1]]
    """
    require_retrieval(q_slc, landmarks, topk, exclude_window, recency, recency_span)
    require_int("q_start", q_start, 0, bits=62)
    require_flags(validate)
    scale, T = require_common(chunk_size, scale, impl, q_slc.shape[3]), q_slc.shape[1]
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens, q_slc)
        require(q_start == 0, "q_start", "be 0 with cu_seqlens", q_start)
    elif validate and T:
        whole = (q_start + T - 1) // chunk_size
        rule = f"hold the {whole} whole chunks before the last token"
        require(landmarks.shape[1] >= whole, "landmarks", rule, landmarks.shape[1])
    return transforms.retrieve(
        q_slc, landmarks, topk, chunk_size, q_start, exclude_window, cu_seqlens, recency, recency_span, scale, impl,
        validates(q_slc, validate),
    )  # fmt: skip


def hsa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
    config: dict | None = None,
    deterministic: bool = False,
    validate: bool | None = None,
) -> torch.Tensor:
    """Attention to each chosen chunk on its own, summed by weight (paper, section 2.2).

        out[t] = sum_k weights[t, k] * softmax(q[t] . K[c]^T * scale) V[c],  c = indices[t, k]

    The softmax runs over the keys of one chunk. The call does not check causality: a token attends to whatever chunks
    `indices` names, and `retrieve_chunks` is what names past ones only. Accumulation is float32 (float64 for float64).
    Nothing is saved for the backward but the inputs and the inverted index.

    Args:
        q (Tensor [B, T, HQ, D]): queries in bfloat16, float16 or float32; float64 with "reference" only.
        k (Tensor [B, T_kv, H, D], like q): keys, HQ a multiple of H. A last chunk shorter than chunk_size counts with
            the keys that it has.
        v (Tensor [B, T_kv, H, D], like q): values.
        weights (Tensor [B, T, H, K] or [B, T, HQ, K], float32): weight of each slot, per key/value head or per query
            head; float64 for float64 queries.
        indices (Tensor [B, T, H, K], int32): chosen chunks in any order. -1 is an empty slot and may stand anywhere;
            duplicates add up; an all-empty row gives exactly 0.
        chunk_size (int): S, one of 16, 32, 64, 128. Default: 64.
        scale (float): default: 1 / sqrt(D).
        cu_seqlens (Tensor [n + 1], int32): offsets of packed sequences, with B = 1 and T_kv = T. Chunks start at each
            sequence's own start and indices count within the sequence. Default: None.
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here. On Hopper
            that may be TileLang's union tile, in which an inf or NaN in v reaches other tokens of its tile; for such
            values name another program, config={"hsa_fwd_token": {}}.
        config (dict): {program name: its fields} in place of what `impl` would choose; {"overlap": x} says what
            `selection_overlap` is about, by which TileLang's programs are chosen, unless told 0.9, an assumption.
            Default: None.
        deterministic (bool): no program that adds atomically: the same bits on every call, which other programs may
            not give. Default: False.
        validate (bool): True: indices must lie in range and name whole chunks in the past, the last query being the
            last key, and weights must be such as `fusion_weights` gives. False: nothing is checked, and an index out
            of range is an empty slot. Default: None, the range alone, on CUDA only where HSA_TL_VALIDATE=1 is set.
            Under torch.compile True checks the range alone too.

    Returns:
        Tensor [B, T, HQ, D] in q's dtype, differentiable in q, k, v and weights. A chunk that nobody chose has
        gradient 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> q, kv = torch.randn(1, 64, 4, 32), torch.randn(1, 64, 2, 32)
        >>> scores, indices = retrieve_chunks(torch.randn(1, 64, 2, 8), torch.randn(1, 4, 2, 8), 2, chunk_size=16)
        >>> out = hsa_attention(q, kv, kv, fusion_weights(scores), indices, chunk_size=16)
        >>> out.shape, bool((out[:, :16] == 0).all())  # no whole chunk lies before the first 16 tokens
        (torch.Size([1, 64, 4, 32]), True)
    """
    require_attention(q, k, v, indices)
    require_weights(weights, q, indices)
    require_flags(validate, deterministic)
    scale = require_common(chunk_size, scale, impl, q.shape[3])
    if validate and not torch.compiler.is_compiling():
        check_range(indices, -(-k.shape[1] // chunk_size))
        check_past(indices, k.shape[1], chunk_size, cu_seqlens)
        check_weights(weights)
    validate = validates(q, validate)
    k, v, indices, chunk_len = whole_chunks(k, v, indices, chunk_size, cu_seqlens, validate)
    pair, offsets = pairs_for_backward((q, k, v, weights), indices, k.shape[1], validate)
    return transforms.attention(
        q, k, v, weights, indices, pair, offsets, chunk_len, scale, impl, config_json(config), deterministic, validate
    )


def retrieve_decode(
    q_slc: torch.Tensor,
    landmarks: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    *,
    chunk_size: int = 64,
    exclude_window: int = 0,
    chunks: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    scale: float | None = None,
    recency: torch.Tensor | None = None,
    recency_span: int = 16,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`retrieve_chunks` for one or a few new tokens of sequences of different lengths; without gradient.

    The result for sequence b is that of `retrieve_chunks(q_start=lengths[b])`: the same visible chunks, ties, order
    and padding. All shapes are static, and `lengths` is not read on the host except on a CPU.

    Args:
        q_slc (Tensor [B, T, R, D_r]): retrieval queries in any floating dtype.
        landmarks (Tensor [B, N, R, D_r], like q_slc): room for N chunks of each sequence.
        lengths (Tensor [B], int32): tokens of each sequence before these: token t of sequence b is at position
            lengths[b] + t.
        topk (int): K, the slots of each token.
        chunk_size (int): S, one of 16, 32, 64, 128. Default: 64.
        exclude_window (int): as in `retrieve_chunks`. Default: 0.
        chunks (Tensor [B], int32): chunks that each sequence holds; landmarks behind them are never used. Default: N.
        bounds (Tensor [B, ceil(N / 64), 2, R, D_r], like q_slc): what `landmark_bounds` returned for these landmarks.
            Blocks of 64 landmarks that cannot hold one of the best are then skipped, with the same result; that pays
            where the landmarks of a block are alike. For "auto" and "reference" only; on a GPU it waits for the device
            and cannot stand in a captured graph. Default: None.
        scale (float): default: 1 / sqrt(D_r).
        recency (Tensor [R], float32): as in `retrieve_chunks`. Default: None.
        recency_span (int): as there. Default: 16.
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here.

    Returns:
        scores [B, T, R, topk] float32 (float64 for float64 inputs) and indices [B, T, R, topk] int32.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> q_slc, landmarks, lengths = torch.ones(2, 1, 1, 8), torch.ones(2, 4, 1, 8), torch.tensor([15, 48]).int()
        >>> retrieve_decode(q_slc, landmarks, lengths, 2, chunk_size=16)[1].flatten(1).tolist()
        [[-1, -1], [0, 1]]
    """
    require_retrieval(q_slc, landmarks, topk, exclude_window, recency, recency_span)
    B, _T, R, D_r = q_slc.shape
    scale = require_common(chunk_size, scale, impl, D_r)
    for name, x in (("lengths", lengths), ("chunks", chunks)):
        if x is not None or name == "lengths":
            require_tensor(name, x, 1, q_slc, torch.int32)
            require_shape(name, x, (B,), "to match q_slc")
    if bounds is not None:
        require_tensor("bounds", bounds, 5, q_slc)
        require_float("bounds", bounds, q_slc)
        blocks = (landmarks.shape[1] + BLOCK - 1) // BLOCK
        require_shape("bounds", bounds, (B, "N", 2, R, D_r), "to match q_slc")
        require(bounds.shape[1] >= blocks, "bounds", lambda: f"have {blocks} blocks", shape_of(bounds))
    return transforms.retrieve_decode(
        q_slc, landmarks, lengths, chunks, bounds, topk, chunk_size, exclude_window, recency, recency_span, scale, impl,
        validates(q_slc, None),
    )  # fmt: skip


def hsa_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    page_table: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`hsa_attention` of one or a few new tokens over a paged pool of whole chunks; inference only.

    A page holds one chunk, sequences may share pages, and a page that no slot names is never read. Nothing is read on
    the host unless indices are validated, and all shapes are static, so that a step can be captured in a graph.

    Args:
        q (Tensor [B, T, HQ, D]): queries in bfloat16, float16 or float32; float64 with "reference" only.
        k_pages (Tensor [num_pages, S, H, D], like q): keys, S one of 16, 32, 64, 128 and HQ a multiple of H.
        v_pages (Tensor [num_pages, S, H, D], like q): values.
        weights (Tensor [B, T, H, K] or [B, T, HQ, K], float32): as in `hsa_attention`.
        indices (Tensor [B, T, H, K], int32): chosen chunks, counted within the sequence; -1 is an empty slot. On a
            CPU, and wherever HSA_TL_VALIDATE=1, an index outside [-1, max_chunks), or whose page is outside
            [0, num_pages), raises; elsewhere it is an empty slot.
        page_table (Tensor [B, max_chunks], int32): the page of each chunk of each sequence.
        scale (float): default: 1 / sqrt(D).
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here.

    Returns:
        Tensor [B, T, HQ, D] in q's dtype. It has no gradient: a backward pass through it raises.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> pages, table = torch.randn(3, 16, 1, 32), torch.tensor([[2, 0]]).int()  # chunk 0 is in page 2, 1 in 0
        >>> indices = torch.tensor([[[[1]]]]).int()
        >>> hsa_decode(torch.randn(1, 1, 4, 32), pages, pages, torch.ones(1, 1, 1, 1), indices, table).shape
        torch.Size([1, 1, 4, 32])
    """
    require_decode(q, k_pages, v_pages, indices, page_table)
    require_weights(weights, q, indices)
    scale = require_common(k_pages.shape[1], scale, impl, q.shape[3])
    return transforms.decode(q, k_pages, v_pages, weights, indices, page_table, scale, impl, validates(q, None))
