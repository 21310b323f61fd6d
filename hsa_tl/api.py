"""The public functions: meaning, validation, shapes, choice of implementation.

Dims, for the whole project: B batch, T tokens, HQ query heads, H key/value heads, G = HQ // H query heads for each
key/value head, D head dimension, S chunk size, N chunks, K selected chunks, R retrieval heads, D_r their dimension.
Tensors are laid out [B, T, heads, dim]. Index -1 is an empty slot.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hsa_tl import fusion, ops
from hsa_tl.decode_retrieval import BLOCK
from hsa_tl.pairs import Pairs

IMPLS = ("auto", "reference", "tilelang", "triton")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _require(ok: bool, name: str, rule: str | Callable[[], str], value: object) -> None:
    """rule and value may be functions: under torch.compile, printing a length would make it a constant of the graph."""
    if not ok:
        rule, value = (x() if callable(x) else x for x in (rule, value))
        raise ValueError(f"{name} must {rule}, got {value}")


def _shape_of(x: torch.Tensor) -> Callable[[], str]:
    return lambda: f"shape {list(x.shape)}"


def _require_shape(name: str, x: torch.Tensor, dims: tuple, reason: str) -> None:
    """dims: numbers, or "N" and "N >= 1" for free ones. Dim by dim: comparing shapes as a whole fixes lengths too."""
    same = all(n >= d.count(">= 1") if isinstance(d, str) else n == d for n, d in zip(x.shape, dims, strict=True))
    _require(same, name, lambda: f"have shape [{', '.join(map(str, dims))}] {reason}", _shape_of(x))


def _require_tensor(name: str, x: object, ndim: int, like: torch.Tensor | None = None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    _require(x.ndim == ndim, name, f"have {ndim} dimensions", _shape_of(x))
    if like is not None:
        _require(x.device == like.device, name, f"be on {like.device} like the other tensors", x.device)


def _require_float(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    if like is not None:
        _require(x.dtype == like.dtype, name, f"have dtype {like.dtype} like the query", x.dtype)
    _require(x.dtype in FLOATS, name, "have dtype bfloat16, float16, float32 or float64", x.dtype)


def _require_int(name: str, x: object, low: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    _require(x >= low, name, f"be at least {low}", lambda: x)


def _require_common(chunk_size: int, scale: float | None, impl: str) -> None:
    _require_int("chunk_size", chunk_size, 1)
    _require(chunk_size in (16, 32, 64, 128), "chunk_size", "be 16, 32, 64 or 128", chunk_size)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        _require(math.isfinite(scale) and scale >= 0, "scale", "be finite and at least 0", scale)
    _require(impl in IMPLS, "impl", f"be one of {', '.join(IMPLS)}", repr(impl))


def _require_cu_seqlens(cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    _require_tensor("cu_seqlens", cu_seqlens, 1, q)
    _require(cu_seqlens.dtype == torch.int32, "cu_seqlens", "have dtype int32", cu_seqlens.dtype)
    _require(cu_seqlens.shape[0] >= 2, "cu_seqlens", "hold at least two offsets", _shape_of(cu_seqlens))
    _require(q.shape[0] == 1, "cu_seqlens", "come with batch size B = 1", lambda: f"B = {q.shape[0]}")


def _validates(x: torch.Tensor, validate: bool | None) -> bool:
    if x.device.type == "cpu":
        return True
    return os.environ.get("HSA_VALIDATE") == "1" if validate is None else validate


def _config_json(config: object) -> str:
    if config is None:
        return ""
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict from program name to its config, got {type(config).__name__}")
    return json.dumps({k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in config.items()})


def _require_selection(q: torch.Tensor, H: int, weights: torch.Tensor, indices: torch.Tensor) -> None:
    B, T, HQ, _ = q.shape
    _require_shape("indices", indices, (B, T, H, "K >= 1"), "to match q and k")
    _require(indices.dtype == torch.int32, "indices", "have dtype int32", indices.dtype)
    K = indices.shape[3]
    _require(
        weights.shape[0] == B and weights.shape[1] == T and weights.shape[2] in (H, HQ) and weights.shape[3] == K,
        "weights",
        lambda: f"have shape [{B}, {T}, {H} or {HQ}, {K}] to match indices",
        _shape_of(weights),
    )
    weights_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    _require(weights.dtype == weights_dtype, "weights", f"have dtype {weights_dtype}", weights.dtype)


def build_pairs(indices: torch.Tensor, num_chunks: int) -> Pairs:
    """The inverted index of a selection: its (token, slot) pairs sorted by chunk. O(pairs) memory, deterministic.

    indices [B, T, H, K] int32, -1 for an empty slot. Returns Pairs(pair, offsets): pair [B * T * H * K] int32 holds
    t * K + slot, sorted by (b, h, chunk) and stable in (t, slot); offsets [B * H * num_chunks + 1] int64 bounds the
    pairs of (b, h, c) at (b * H + h) * num_chunks + c. Empty slots stand after offsets[-1].
    ValueError: indices not int32 or not 4-D, or (on CPU) outside [-1, num_chunks).
    """
    _require_tensor("indices", indices, 4)
    _require(indices.dtype == torch.int32, "indices", "have dtype int32", indices.dtype)
    _require_int("num_chunks", num_chunks, 0)
    return Pairs(*ops.build_pairs(indices, num_chunks, _validates(indices, None)))


def fusion_weights(
    scores: torch.Tensor, kind: str = "softmax", swa_lse: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Weights of the chosen chunks from their retrieval scores; 0 for an empty slot, all 0 for an empty row.

    scores [B, T, R, K] float32 (float64 passes through), -inf in empty slots. kind:
    "softmax": exp(s_k) / sum_j exp(s_j). "softmax1": the denominator has an extra exp(0).
    "stick_breaking": sigmoid(s_k) * prod_{j > k} (1 - sigmoid(s_j)), so the nearest chunk takes first.
    "joint": normalised together with the sliding window, whose log-sum-exp (natural log) is swa_lse [B, T, R], or
    [B, T, HQ] with HQ a multiple of R; returns (weights [B, T, R or HQ, K], window weight [B, T, R or HQ]).
    Differentiable in scores and swa_lse. ValueError: unknown kind, swa_lse missing, superfluous or of another shape.
    """
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
    _require(scores.ndim >= 1, "scores", "have a last dimension of slots", _shape_of(scores))
    _require(scores.dtype in FLOATS, "scores", "have a floating dtype", scores.dtype)
    _require(kind in fusion.KINDS, "kind", f"be one of {', '.join(fusion.KINDS)}", repr(kind))
    _require((swa_lse is not None) == (kind == "joint"), "swa_lse", 'be given for kind="joint" only', f"kind={kind!r}")
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    if kind != "joint":
        return fusion.KINDS[kind](scores)
    _require_tensor("swa_lse", swa_lse, scores.ndim - 1, scores)
    heads, lse_heads = scores.shape[-2], swa_lse.shape[-1]
    _require(
        all(a == b for a, b in zip(swa_lse.shape[:-1], scores.shape[:-2], strict=True)) and lse_heads % heads == 0,
        "swa_lse",
        lambda: f"have shape {list(scores.shape[:-1])} or a multiple of its heads",
        _shape_of(swa_lse),
    )
    return fusion.joint(scores.repeat_interleave(lse_heads // heads, -2), swa_lse.to(scores.dtype))


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
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The topk visible chunks of highest score s[t, i] = q_slc[t] . landmarks[i] * scale (paper, section 2.2).

    q_slc [B, T, R, D_r], landmarks [B, N, R, D_r] of one floating dtype; scale defaults to 1 / sqrt(D_r).
    Returns scores [B, T, R, topk] float32 (float64 for float64 inputs), accumulated in float32, and indices of the
    same shape, int32. Chunk i is visible to the token at position p = q_start + t when (i + 1) * chunk_size <= p and,
    with exclude_window = w > 0, when also i * chunk_size <= p - w. Equal scores: the lower chunk wins. Slots ascend
    by chunk; slots past the visible count come last with index -1 and score -inf. No (T, N) matrix is built beyond a
    block of tokens. Differentiable in q_slc and landmarks through scores.
    cu_seqlens [n + 1] int32 (B = 1, q_start = 0): packed sequences; landmarks holds ceil(len / chunk_size) rows for
    each sequence, one after the other, and indices count chunks within the sequence. It is read on the host.
    ValueError: shapes, dtypes or devices that disagree. NotImplementedError: an impl that has no retrieval.
    """
    _require_tensor("q_slc", q_slc, 4)
    _require_tensor("landmarks", landmarks, 4, q_slc)
    _require_float("q_slc", q_slc)
    _require_float("landmarks", landmarks, q_slc)
    B, _T, R, D_r = q_slc.shape
    _require_shape("landmarks", landmarks, (B, "N", R, D_r), "to match q_slc")
    _require_int("topk", topk, 1)
    _require_int("q_start", q_start, 0)
    _require_int("exclude_window", exclude_window, 0)
    _require_common(chunk_size, scale, impl)
    if cu_seqlens is not None:
        _require_cu_seqlens(cu_seqlens, q_slc)
        _require(q_start == 0, "q_start", "be 0 with cu_seqlens", q_start)
    scale = 1.0 / math.sqrt(D_r) if scale is None else float(scale)
    return ops.retrieve(q_slc, landmarks, topk, chunk_size, q_start, exclude_window, cu_seqlens, scale, impl)


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
    """out[t] = sum_k weights[t, k] * softmax(q[t] . K[c]^T * scale) V[c], c = indices[t, k] (paper, section 2.2).

    q [B, T, HQ, D]; k, v [B, T_kv, H, D], HQ a multiple of H; weights [B, T, H, K] or [B, T, HQ, K] float32;
    indices [B, T, H, K] int32 -> out [B, T, HQ, D] in q's dtype. The softmax runs over the chunk_size keys of one
    chunk (a short last chunk: over its real keys). -1 is an empty slot and may stand anywhere, duplicates add up, an
    all-empty row gives exactly 0. scale defaults to 1 / sqrt(D). bfloat16, float16, float32; float64 in the reference.
    Accumulation is float32 (float64 for float64). Differentiable in q, k, v and weights; a chunk nobody selected has
    gradient 0. Nothing is saved but the inputs and, for the backward, the inverted index.
    cu_seqlens [n + 1] int32 (B = 1, T_kv = T): packed sequences, whose chunks start at the sequence's own start.
    impl: "auto" (the fastest that supports the problem here), "reference", "tilelang", "triton".
    config: {program name: fields} of that impl overrides its choice. deterministic: bitwise the same gradients always.
    validate: check indices on CUDA too (default: HSA_VALIDATE=1); without it an index out of range is an empty slot.
    ValueError / TypeError: names the argument, the rule and the value. NotImplementedError: impl cannot run here.
    """
    _require_tensor("q", q, 4)
    for name, x in (("k", k), ("v", v), ("weights", weights), ("indices", indices)):
        _require_tensor(name, x, 4, q)
    B, T, HQ, D = q.shape
    T_kv, H = k.shape[1], k.shape[2]
    _require_float("q", q)
    _require_float("k", k, q)
    _require_float("v", v, q)
    _require_shape("k", k, (B, "T_kv >= 1", "H >= 1", D), "to match q")
    _require_shape("v", v, tuple(k.shape), "like k")
    _require(HQ % H == 0 and HQ > 0, "q", lambda: f"have a multiple of k's {H} heads", lambda: f"{HQ} heads")
    _require_selection(q, H, weights, indices)
    _require_common(chunk_size, scale, impl)
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    validate = _validates(q, validate)

    if cu_seqlens is None:
        N = (T_kv + chunk_size - 1) // chunk_size
        chunk_len = None
        if T_kv % chunk_size:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, N * chunk_size - T_kv)) for x in (k, v))
            chunk_len = (T_kv - chunk_size * torch.arange(N, device=q.device)).clamp(max=chunk_size).int()
    else:
        _require_cu_seqlens(cu_seqlens, q)
        _require(T_kv == T, "k", lambda: f"have q's {T} tokens with cu_seqlens", lambda: f"{T_kv} tokens")
        N = T // chunk_size + cu_seqlens.shape[0] - 1
        position, indices, chunk_len = ops.pack(cu_seqlens, indices, chunk_size, N, validate)
        k, v = (x.new_zeros(1, N * chunk_size, H, D).index_copy(1, position, x) for x in (k, v))
    k, v = (x.unflatten(1, (N, chunk_size)) for x in (k, v))

    pair = offsets = None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weights)):
        pair, offsets = ops.build_pairs(indices, N, validate)
    return ops.attention(
        q, k, v, weights, indices, pair, offsets, chunk_len, scale, impl, _config_json(config), deterministic, validate
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
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`retrieve_chunks` for one or a few new tokens of sequences of different lengths; no gradient.

    q_slc [B, T, R, D_r], landmarks [B, N, R, D_r] of one floating dtype; lengths [B] int32, on their device: tokens of
    each sequence before these, so that token t of sequence b is at position lengths[b] + t. chunks [B] int32: chunks
    that each sequence holds, at most N (default N); rows of landmarks behind them are never used.
    Returns scores and indices [B, T, R, topk], what retrieve_chunks(q_start=lengths[b]) returns for sequence b: same
    visible chunks, ties, order and padding. All shapes are static and lengths is not read on the host, except on a CPU.
    bounds [B, ceil(N / 64), 2, R, D_r], what `landmark_bounds` returns: skips blocks of 64 landmarks that cannot hold
    one of the best. The result is the same. Pays where landmarks of a block are alike. For impl "auto" and "reference"
    only; on a GPU it waits for the device and cannot stand in a captured graph.
    ValueError / TypeError: names the argument, the rule and the value. NotImplementedError: impl cannot run here.
    """
    _require_tensor("q_slc", q_slc, 4)
    _require_tensor("landmarks", landmarks, 4, q_slc)
    _require_float("q_slc", q_slc)
    _require_float("landmarks", landmarks, q_slc)
    B, _T, R, D_r = q_slc.shape
    _require_shape("landmarks", landmarks, (B, "N", R, D_r), "to match q_slc")
    for name, x in (("lengths", lengths), ("chunks", chunks)):
        if x is not None or name == "lengths":
            _require_tensor(name, x, 1, q_slc)
            _require(x.dtype == torch.int32, name, "have dtype int32", x.dtype)
            _require_shape(name, x, (B,), "to match q_slc")
    if bounds is not None:
        _require_tensor("bounds", bounds, 5, q_slc)
        blocks = (landmarks.shape[1] + BLOCK - 1) // BLOCK
        _require_shape("bounds", bounds, (B, "N", 2, R, D_r), "to match q_slc")
        _require(bounds.shape[1] >= blocks, "bounds", lambda: f"have {blocks} blocks", _shape_of(bounds))
    _require_int("topk", topk, 1)
    _require_int("exclude_window", exclude_window, 0)
    _require_common(chunk_size, scale, impl)
    scale = 1.0 / math.sqrt(D_r) if scale is None else float(scale)
    return ops.retrieve_decode(q_slc, landmarks, lengths, chunks, bounds, topk, chunk_size, exclude_window, scale, impl)


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

    q [B, T, HQ, D]; k_pages, v_pages [num_pages, S, H, D], HQ a multiple of H, S 16, 32, 64 or 128: a page holds one
    chunk; weights [B, T, H, K] or [B, T, HQ, K] float32; indices [B, T, H, K] int32 count chunks of the sequence;
    page_table [B, max_chunks] int32 gives a chunk's page; sequences may share pages -> out [B, T, HQ, D] in q's dtype.
    -1 is an empty slot and may stand anywhere, duplicates add up, an all-empty row gives exactly 0. A page that no slot
    names is never read. scale defaults to 1 / sqrt(D). Types and accumulation as in hsa_attention.
    An index outside [-1, max_chunks), or whose page is outside [0, num_pages), raises on a CPU and wherever
    HSA_VALIDATE=1; without that it is an empty slot. Nothing is read on the host then and all shapes are static, so a
    step can be captured in a graph. Not differentiable: a backward pass through it raises.
    ValueError / TypeError: names the argument, the rule and the value. NotImplementedError: impl cannot run here.
    """
    _require_tensor("q", q, 4)
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages), ("weights", weights), ("indices", indices)):
        _require_tensor(name, x, 4, q)
    _require_tensor("page_table", page_table, 2, q)
    B, _T, HQ, D = q.shape
    S, H = k_pages.shape[1], k_pages.shape[2]
    _require_float("q", q)
    _require_float("k_pages", k_pages, q)
    _require_float("v_pages", v_pages, q)
    _require_shape("k_pages", k_pages, ("num_pages >= 1", "S", "H >= 1", D), "to match q")
    _require(S in (16, 32, 64, 128), "k_pages", "have pages of 16, 32, 64 or 128 keys", _shape_of(k_pages))
    _require_shape("v_pages", v_pages, tuple(k_pages.shape), "like k_pages")
    _require(HQ % H == 0 and HQ > 0, "q", lambda: f"have a multiple of k_pages' {H} heads", lambda: f"{HQ} heads")
    _require_selection(q, H, weights, indices)
    _require_shape("page_table", page_table, (B, "max_chunks >= 1"), "to match q")
    _require(page_table.dtype == torch.int32, "page_table", "have dtype int32", page_table.dtype)
    _require_common(S, scale, impl)
    scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
    return ops.decode(q, k_pages, v_pages, weights, indices, page_table, scale, impl, _validates(q, None))
