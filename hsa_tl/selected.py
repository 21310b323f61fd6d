"""One softmax over all chosen chunks: the public functions, and the merge with attention to other keys.

Dims as in hsa_tl.api. A pretrained layer whose window is merged with the chunks it chose computes with its own weights.
"""

import torch
from torch import Tensor

from hsa_tl import fusion, ops, transforms
from hsa_tl.chunks import pairs_for_backward, whole_chunks
from hsa_tl.pairs import check_range
from hsa_tl.validation import (
    check_past,
    config_json,
    require,
    require_attention,
    require_common,
    require_decode,
    require_flags,
    require_float,
    require_shape,
    require_tensor,
    shape_of,
    validates,
)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
    config: dict | None = None,
    deterministic: bool = False,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all chosen chunks at once, with their log-sum-exp.

        lse[t] = log sum_j exp(q[t] . k[j] * scale)    out[t] = sum_j exp(q[t] . k[j] * scale - lse[t]) v[j]

    over the keys j of the chunks that `indices` names for token t. `hsa_attention` has a softmax for each chunk; with
    weights = softmax of the chunks' own log-sum-exps it gives the same out. By lse the result merges with attention to
    other keys, such as a sliding window: `merge_attention`. The call does not check causality. Accumulation is float32
    (float64 for float64). Saved for the backward are the inputs, out, lse and the inverted index.

    Args:
        q (Tensor [B, T, HQ, D]): queries in bfloat16, float16 or float32; float64 with "reference" only.
        k (Tensor [B, T_kv, H, D], like q): keys, HQ a multiple of H. A last chunk shorter than chunk_size counts with
            the keys that it has.
        v (Tensor [B, T_kv, H, D], like q): values.
        indices (Tensor [B, T, H, K], int32): chosen chunks in any order. -1 is an empty slot and may stand anywhere; a
            chunk counts once, however often it stands in a row.
        chunk_size (int): S, one of 16, 32, 64, 128. Default: 64.
        scale (float): default: 1 / sqrt(D).
        cu_seqlens (Tensor [n + 1], int32): packed sequences, as in `hsa_attention`. Default: None.
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here.
        config (dict): {program name: its fields} in place of what `impl` would choose. Default: None.
        deterministic (bool): no program that adds atomically, as in `hsa_attention`. Default: False.
        validate (bool): True: indices must lie in range and name whole chunks in the past, the last query being the
            last key. False: nothing is checked, and an index out of range is an empty slot. Default: None, the range
            alone, on CUDA only where HSA_TL_VALIDATE=1 is set. Under torch.compile True checks no more than that.

    Returns:
        out [B, T, HQ, D] in q's dtype and lse [B, T, HQ] float32 (float64 for float64 inputs), the natural logarithm,
        both differentiable in q, k and v. A row without keys has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> q, kv, indices = torch.randn(1, 64, 4, 32), torch.randn(1, 64, 2, 32), torch.zeros(1, 64, 2, 3).int()
        >>> indices[:, :16] = -1  # nothing is whole and past before token 16
        >>> out, lse = selected_attention(q, kv, kv, indices, chunk_size=16)
        >>> out.shape, lse.shape, lse[0, 15, 0].item()
        (torch.Size([1, 64, 4, 32]), torch.Size([1, 64, 4]), -inf)
    """
    require_attention(q, k, v, indices)
    require_flags(validate, deterministic)
    scale = require_common(chunk_size, scale, impl, q.shape[3])
    if validate and not torch.compiler.is_compiling():
        check_range(indices, -(-k.shape[1] // chunk_size))
        check_past(indices, k.shape[1], chunk_size, cu_seqlens)
    validate = validates(q, validate)
    k, v, indices, chunk_len = whole_chunks(k, v, indices, chunk_size, cu_seqlens, validate)
    indices = ops.distinct(indices, k.shape[1], validate)
    pair, offsets = pairs_for_backward((q, k, v), indices, k.shape[1], False)
    return transforms.selected(
        q, k, v, indices, pair, offsets, chunk_len, scale, impl, config_json(config), deterministic
    )


def selected_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    indices: Tensor,
    page_table: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`selected_attention` of one or a few new tokens over a paged pool of whole chunks; inference only.

    Pages are as in `hsa_decode`: one holds a chunk, sequences may share them, and all shapes are static.

    Args:
        q (Tensor [B, T, HQ, D]): queries in bfloat16, float16 or float32; float64 with "reference" only.
        k_pages (Tensor [num_pages, S, H, D], like q): keys, S one of 16, 32, 64, 128 and HQ a multiple of H.
        v_pages (Tensor [num_pages, S, H, D], like q): values.
        indices (Tensor [B, T, H, K], int32): as in `selected_attention`, counted within the sequence; checked as in
            `hsa_decode`.
        page_table (Tensor [B, max_chunks], int32): the page of each chunk of each sequence.
        scale (float): default: 1 / sqrt(D).
        impl (str): "auto", "reference", "tilelang" or "triton". Default: "auto", the fastest that runs here.

    Returns:
        out [B, T, HQ, D] in q's dtype and lse [B, T, HQ] float32 (float64 for float64 inputs). They have no gradient:
        a backward pass through them raises.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.
        NotImplementedError: `impl` cannot run this problem here; the message says why.

    Example:
        >>> pages, table = torch.randn(3, 16, 1, 32), torch.tensor([[2, 0]]).int()  # chunk 0 is in page 2, 1 in 0
        >>> out, lse = selected_decode(torch.zeros(1, 1, 4, 32), pages, pages, torch.tensor([[[[1, 0]]]]).int(), table)
        >>> lse.exp().round().flatten().tolist()  # 32 keys of score 0
        [32.0, 32.0, 32.0, 32.0]
    """
    require_decode(q, k_pages, v_pages, indices, page_table)
    scale = require_common(k_pages.shape[1], scale, impl, q.shape[3])
    return transforms.selected_decode(q, k_pages, v_pages, indices, page_table, scale, impl, validates(q, None))


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to several disjoint sets of keys as one, exactly.

        lse = log sum_i exp(lse_i)    out = sum_i exp(lse_i - lse) out_i

    Args:
        parts (tuple (out [.., HQ, D], lse [.., HQ])): the results of each set of keys, such as `selected_attention`
            returns; lse is the natural log-sum-exp of the scaled scores, float32 or float64, and -inf where a row has
            no keys, whatever out holds there. Gradients need that of each lse: FlexAttention's has one, flash's none.

    Returns:
        out [.., HQ, D] in the type of the first out and lse [.., HQ] like the first one, differentiable in all parts. A
        row that has no keys in any part has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: no part, or tensors that do not match.

    Example:
        >>> one, two = (torch.zeros(1, 1, 2), torch.zeros(1, 1)), (torch.ones(1, 1, 2), torch.zeros(1, 1))
        >>> merge_attention(one, two)[0].tolist()  # equal sums of exp(scores): the mean
        [[[0.5, 0.5]]]
    """
    require(len(parts) > 0, "parts", "hold at least one pair (out, lse)", "none")
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"parts[{i}] must be a pair (out, lse), got {type(part).__name__}")
        for name, x in zip(("out", "lse"), part, strict=True):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{name} of parts[{i}] must be a torch.Tensor, got {type(x).__name__}")
    first, first_lse = parts[0]
    require(first.ndim >= 2, "out of parts[0]", "have at least 2 dimensions", shape_of(first))
    require(first_lse.dtype in (torch.float32, torch.float64), "lse", "be float32 or float64", first_lse.dtype)
    for i, (out, lse) in enumerate(parts):
        require_tensor(f"out of parts[{i}]", out, first.ndim, first)
        require_tensor(f"lse of parts[{i}]", lse, first.ndim - 1, first)
        require_float(f"out of parts[{i}]", out, first)
        require_float(f"lse of parts[{i}]", lse, first_lse)
        require_shape(f"out of parts[{i}]", out, tuple(first.shape), "like the first")
        require_shape(f"lse of parts[{i}]", lse, tuple(first.shape[:-1]), "to match out")
    lses = torch.stack([lse for _, lse in parts], -1)
    empty, most = lses == -torch.inf, lses.detach().amax(-1)
    known = most.isinf()  # logsumexp's gradient would be NaN
    lse = torch.where(known, most, lses.masked_fill(known[..., None], 0.0).logsumexp(-1))
    weights = fusion.softmax(lses)
    total = sum(weights[..., i, None] * out.masked_fill(empty[..., i, None], 0.0) for i, (out, _) in enumerate(parts))
    return total.to(first.dtype), lse
