"""A sequence's keys and values as whole chunks, and the mean key of each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsa_tl import ops
from hsa_tl.validation import require, require_chunk_size, require_cu_seqlens, require_float, require_tensor


def whole_chunks(
    k: Tensor, v: Tensor, indices: Tensor, chunk_size: int, cu_seqlens: Tensor | None, validate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What operators take: k and v [B, N, S, H, D] padded by zeros, indices that count these chunks, and chunk_len [N].

    chunk_len is None where no chunk is short.
    """
    T, T_kv, H, D = indices.shape[1], *k.shape[1:]
    if cu_seqlens is None:
        N = (T_kv + chunk_size - 1) // chunk_size
        chunk_len = None
        if T_kv % chunk_size:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, N * chunk_size - T_kv)) for x in (k, v))
            chunk_len = (T_kv - chunk_size * torch.arange(N, device=k.device)).clamp(max=chunk_size).int()
    else:
        require_cu_seqlens(cu_seqlens, indices)
        require(T_kv == T, "k", lambda: f"have q's {T} tokens with cu_seqlens", lambda: f"{T_kv} tokens")
        N = T // chunk_size + cu_seqlens.shape[0] - 1
        position, indices, chunk_len = ops.pack(cu_seqlens, indices, chunk_size, N, validate)
        k, v = (x.new_zeros(1, N * chunk_size, H, D).index_copy(1, position, x) for x in (k, v))
    k, v = (x.unflatten(1, (N, chunk_size)) for x in (k, v))
    return k, v, indices, chunk_len


def pairs_for_backward(
    inputs: tuple[Tensor, ...], indices: Tensor, num_chunks: int, validate: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The inverted index, pair and offsets, if the call may be differentiated in one of the inputs."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return ops.build_pairs(indices, num_chunks, validate)
    return None, None


def chunk_means(k: Tensor, chunk_size: int) -> Tensor:
    """The mean key of each chunk, a landmark that needs no training.

    Args:
        k (Tensor [B, T, H, D]): keys in any floating dtype, such as a pretrained layer's before or after its rotary
            encoding.
        chunk_size (int): S, one of 16, 32, 64, 128.

    Returns:
        Tensor [B, N, H, D] in k's dtype, N = ceil(T / S), summed in float32 at least. A last chunk shorter than S has
        the mean of its own keys. Differentiable.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, the rule and the value.

    Example:
        >>> chunk_means(torch.arange(20.0).view(1, 20, 1, 1), 16).flatten().tolist()
        [7.5, 17.5]
    """
    require_tensor("k", k, 4)
    require_float("k", k)
    require_chunk_size(chunk_size)
    T = k.shape[1]
    N = (T + chunk_size - 1) // chunk_size
    chunks = F.pad(k, (0, 0, 0, 0, 0, N * chunk_size - T)).unflatten(1, (N, chunk_size))
    length = (T - chunk_size * torch.arange(N, device=k.device)).clamp(max=chunk_size)
    total = chunks.sum(2, dtype=torch.promote_types(k.dtype, torch.float32))
    return (total / length[:, None, None]).to(k.dtype)
