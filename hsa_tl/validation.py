"""What the public functions require of their arguments: each check raises "name must rule, got value"."""

import dataclasses
import math
import os
from collections.abc import Callable

import torch

IMPLS = ("auto", "reference", "tilelang", "triton")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require(ok: bool, name: str, rule: str | Callable[[], str], value: object) -> None:
    """rule and value may be functions: under torch.compile, printing a length would make it a constant of the graph."""
    if not ok:
        rule, value = (x() if callable(x) else x for x in (rule, value))
        raise ValueError(f"{name} must {rule}, got {value}")


def shape_of(x: torch.Tensor) -> Callable[[], str]:
    return lambda: f"shape {list(x.shape)}"


def require_shape(name: str, x: torch.Tensor, dims: tuple, reason: str, hint: Callable[[], str] = str) -> None:
    """dims: numbers, or "N" and "N >= 1" for free ones. Dim by dim: comparing shapes as a whole fixes lengths too.

    hint: what to add to the message, see `laid_out`.
    """
    for n, d in zip(x.shape, dims, strict=True):
        if n < d.count(">= 1") if isinstance(d, str) else n != d:
            rule = f"have shape [{', '.join(map(str, dims))}] {reason}"
            require(False, name, rule, shape_of(x)() + hint())


def laid_out(q: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor | None = None) -> Callable[[], str]:
    """What to say of shapes that disagree but would agree as [B, heads, T, D]."""

    def hint() -> str:
        tokens, heads = q.shape[2], keys.shape[1]
        swapped = heads and q.shape[1] % heads == 0
        if indices is None:
            swapped = swapped and q.shape[1] == heads
        else:
            swapped = swapped and tuple(indices.shape[1:3]) in ((tokens, heads), (heads, tokens))
        if not swapped:
            return ""
        return "; tensors must be laid out [B, T, heads, D], these look like [B, heads, T, D]: use x.transpose(1, 2)"

    return hint


def require_tensor(
    name: str, x: object, ndim: int, like: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> None:
    """like: a tensor on the same device."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != ndim:
        require(False, name, f"have {ndim} dimensions", shape_of(x))
    if like is not None and x.device != like.device:
        require(False, name, f"be on {like.device} like the other tensors", x.device)
    if dtype is not None and x.dtype != dtype:
        require(False, name, f"have dtype {str(dtype).removeprefix('torch.')}", x.dtype)


def require_float(name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    if like is not None and x.dtype != like.dtype:
        require(False, name, f"have dtype {like.dtype} like the others", x.dtype)
    require(x.dtype in FLOATS, name, "have dtype bfloat16, float16, float32 or float64", x.dtype)


def require_int(name: str, x: object, low: int, bits: int = 0) -> None:
    """bits: of a number that must be less than 2^bits, or 0."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(x).__name__}")
    if x < low:
        require(False, name, f"be at least {low}", lambda: x)
    if bits and x >= 2**bits:
        require(False, name, f"be less than 2^{bits}", lambda: x)


def require_flags(validate: object, deterministic: object = False) -> None:
    if validate is not None and not isinstance(validate, bool):
        raise TypeError(f"validate must be a bool or None, got {type(validate).__name__}")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool, got {type(deterministic).__name__}")


def require_integers(name: str, x: torch.Tensor, low: int, stop: int, ignored: int | None = None) -> torch.Tensor:
    """x of any integer type as int64. Where indices are validated, values must lie in [low, stop), or be `ignored`."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    x = x.long()
    if not torch.compiler.is_compiling() and validates(x, None):
        bad = (x < low) | (x >= stop)
        if ignored is not None:
            bad &= x != ignored
        if bad.any():
            where = bad.nonzero()[0].tolist()
            rule = f"lie in [{low}, {stop})" + ("" if ignored is None else f" or be {ignored}")
            raise ValueError(f"{name} must {rule}, got {int(x[tuple(where)])} at {where}")
    return x


def require_chunk_size(chunk_size: int) -> None:
    require_int("chunk_size", chunk_size, 1)
    require(chunk_size in (16, 32, 64, 128), "chunk_size", "be 16, 32, 64 or 128", chunk_size)


def require_common(chunk_size: int, scale: float | None, impl: str, dim: int) -> float:
    """The scale, 1 / sqrt(dim) unless given."""
    require_chunk_size(chunk_size)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        largest = torch.finfo(torch.float32).max
        require(0 <= scale <= largest, "scale", "be finite, in float32 too, and at least 0", scale)
    if impl not in IMPLS:
        require(False, "impl", f"be one of {', '.join(IMPLS)}", repr(impl))
    return 1.0 / math.sqrt(dim) if scale is None else float(scale)


def require_cu_seqlens(cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    require_tensor("cu_seqlens", cu_seqlens, 1, q, torch.int32)
    require(cu_seqlens.shape[0] >= 2, "cu_seqlens", "hold at least two offsets", shape_of(cu_seqlens))
    require(q.shape[0] == 1, "cu_seqlens", "come with batch size B = 1", lambda: f"B = {q.shape[0]}")


def require_retrieval(
    q_slc: torch.Tensor, landmarks: torch.Tensor, topk: int, exclude_window: int, recency: torch.Tensor | None,
    recency_span: int,
) -> None:  # fmt: skip
    require_tensor("q_slc", q_slc, 4)
    require_tensor("landmarks", landmarks, 4, q_slc)
    require_float("q_slc", q_slc)
    require_float("landmarks", landmarks, q_slc)
    B, _, R, D_r = q_slc.shape
    require(D_r > 0, "q_slc", "have a D_r of at least 1", shape_of(q_slc))
    require_shape("landmarks", landmarks, (B, "N", R, D_r), "to match q_slc", laid_out(q_slc, landmarks))
    require_int("topk", topk, 1)
    require_int("exclude_window", exclude_window, 0, bits=62)
    require_int("recency_span", recency_span, 2, bits=24)
    if recency is not None:
        require_tensor("recency", recency, 1, q_slc)
        require_float("recency", recency)
        require_shape("recency", recency, (R,), "to match q_slc")


def validates(x: torch.Tensor, validate: bool | None) -> bool:
    """Whether to look at the values of x's call. None: on a CPU; elsewhere, where it waits for the device, if asked."""
    return x.device.type == "cpu" or os.environ.get("HSA_TL_VALIDATE") == "1" if validate is None else validate


def config_json(config: object) -> str:
    if config is None:
        return ""
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict from program name to its config, got {type(config).__name__}")
    x = config.get("overlap", 0)
    require(isinstance(x, (int, float)) and 0 <= x <= 1, "config['overlap']", "be a number in [0, 1]", lambda: repr(x))
    named = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in config.items()}
    for k, v in named.items():
        if k != "overlap":
            require(isinstance(v, dict), "config", "hold a dict for each program", f"{k!r}: {v!r}")
    return _json(named)


def _json(x: object) -> str:
    """Names and numbers as JSON; torch.compile cannot trace json.dumps."""
    if isinstance(x, dict):
        for k in x:
            require(isinstance(k, str), "config", "have names as keys", repr(k))
        return "{" + ", ".join([f"{_json(k)}: {_json(v)}" for k, v in x.items()]) + "}"
    if isinstance(x, bool):
        return "true" if x else "false"
    if isinstance(x, (int, float)) and abs(x) < math.inf:
        n, d = x.as_integer_ratio()  # torch.compile makes a constant of a float that changed only by this
        return repr(n / d if isinstance(x, float) else n)
    require(isinstance(x, str) and x.isidentifier(), "config", "hold names and finite numbers", lambda: repr(x))
    return f'"{x}"'


def require_pairs(indices: torch.Tensor) -> None:
    """The inverted index counts a head's pairs of token and slot in int32."""
    T, K = indices.shape[1], indices.shape[3]
    require(T * K < 2**31, "indices", "have less than 2^31 slots T * K", lambda: f"{T} * {K}")


def require_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, names: tuple[str, str] = ("k", "v"),
    places: tuple = (),
) -> None:  # fmt: skip
    """Queries, keys, values and a selection that fit together. places: k's first dims if not B and T_kv."""
    require_tensor("q", q, 4)
    for name, x in (*zip(names, (k, v), strict=True), ("indices", indices)):
        require_tensor(name, x, 4, q)
    (B, T, HQ, D), H = q.shape, k.shape[2]
    require_float("q", q)
    require_float(names[0], k, q)
    require_float(names[1], v, q)
    hint = str if places else laid_out(q, k, indices)
    require(D > 0, "q", "have a D of at least 1", shape_of(q))
    require_shape(names[0], k, (*(places or (B, "T_kv >= 1")), "H >= 1", D), "to match q")
    require_shape(names[1], v, tuple(k.shape), f"like {names[0]}")
    rule = lambda: f"have a multiple of {names[0]}'s {H} heads"  # noqa: E731
    require(HQ % H == 0 and HQ > 0, "q", rule, lambda: f"{HQ} heads{hint()}")
    require_shape("indices", indices, (B, T, H, "K >= 1"), "to match q and k", hint)
    require(indices.dtype == torch.int32, "indices", "have dtype int32", indices.dtype)
    require_pairs(indices)


def require_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, indices: torch.Tensor, page_table: torch.Tensor
) -> None:
    """As `require_attention`, of keys and values in pages."""
    require_tensor("k_pages", k_pages, 4)
    rule = "have pages of 16, 32, 64 or 128 keys"
    require(k_pages.shape[1] in (16, 32, 64, 128), "k_pages", rule, shape_of(k_pages))
    require_attention(q, k_pages, v_pages, indices, ("k_pages", "v_pages"), ("num_pages >= 1", "S"))
    require_tensor("page_table", page_table, 2, q, torch.int32)
    require_shape("page_table", page_table, (q.shape[0], "max_chunks >= 1"), "to match q")


def require_weights(weights: torch.Tensor, q: torch.Tensor, indices: torch.Tensor) -> None:
    require_tensor("weights", weights, 4, q)
    B, T, H, K = indices.shape
    HQ = q.shape[2]
    require(
        weights.shape[0] == B and weights.shape[1] == T and weights.shape[2] in (H, HQ) and weights.shape[3] == K,
        "weights",
        lambda: f"have shape [{B}, {T}, {H} or {HQ}, {K}] to match indices",
        shape_of(weights),
    )
    weights_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if weights.dtype != weights_dtype:
        require(False, "weights", f"have dtype {weights_dtype}", weights.dtype)


def check_cu_seqlens(cu_seqlens: torch.Tensor, T: int) -> None:
    """ValueError unless cu_seqlens rises from 0 to T."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T or sorted(ends) != ends:
        raise ValueError(f"cu_seqlens must rise from 0 to the token count {T}, got {ends}")


def check_past(indices: torch.Tensor, T_kv: int, chunk_size: int, cu_seqlens: torch.Tensor | None) -> None:
    """ValueError where a token chose a chunk that is not whole and past.

    Queries are taken for the last of T_kv tokens, so that no selection of `retrieve_chunks` is refused.
    """
    T = indices.shape[1]
    position = torch.arange(T, device=indices.device)
    if cu_seqlens is None:
        position = position + max(0, T_kv - T)
    else:
        require_cu_seqlens(cu_seqlens, indices)
        check_cu_seqlens(cu_seqlens, T)
        sequence = torch.searchsorted(cu_seqlens[1:], position.int(), right=True).clamp(max=len(cu_seqlens) - 2)
        position = position - cu_seqlens[sequence]
    whole = (position // chunk_size)[None, :, None, None]
    if (bad := indices >= whole).any():
        where = bad.nonzero()[0].tolist()
        rule = f"name whole chunks in the past, below {int(whole[0, where[1]])} for token {where[1]}"
        require(False, "indices", rule, f"{int(indices[tuple(where)])} at {where}")


def check_weights(weights: torch.Tensor) -> None:
    """ValueError where weights look like raw scores."""
    fit = (weights >= 0).all(-1) & (weights.sum(-1) <= 1 + 1e-3)  # a comparison with NaN is False
    if not fit.all():
        where = (~fit).nonzero()[0].tolist()
        rule = "be at least 0 and sum to at most 1 for a token, as fusion_weights(scores) gives; are these raw scores?"
        require(False, "weights", rule, f"{weights[tuple(where)].tolist()[:4]} at {where}")
