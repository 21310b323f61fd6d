"""Dense causal attention by others, each a function of q [B, T, HQ, D], k and v [B, T, H, D], and why it cannot run."""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_tl.problem import Problem


def dense_oracle(q, k, v, *, chunk_size):
    """Causal softmax attention over all keys, as the equation has it: the whole score matrix is held."""
    G, T = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (x.repeat_interleave(G, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[3] ** 0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshd->bthd", s.masked_fill(future, -torch.inf).softmax(-1), v)


def sdpa(q, k, v, *, chunk_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def sdpa_expanded(q, k, v, *, chunk_size):
    """Keys and values copied to every query head first: on a CPU faster than letting SDPA group the heads."""
    G = q.shape[2] // k.shape[2]
    return sdpa(q, *(x.repeat_interleave(G, 2) for x in (k, v)), chunk_size=chunk_size)


def cudnn(q, k, v, *, chunk_size):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, chunk_size=chunk_size)


def flash2(q, k, v, *, chunk_size):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, chunk_size=chunk_size)


def needs_half_on_cuda(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"needs CUDA tensors, the problem is on {problem.device_type}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the problem is in {problem.dtype_name}"
    return None


def flash3(q, k, v, *, chunk_size):
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def flash3_unavailable(problem: Problem) -> str | None:
    if reason := needs_half_on_cuda(problem):
        return reason
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "FlashAttention-3 is not installed: no module flash_attn_interface"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"FlashAttention-3 needs a Hopper GPU, got {torch.cuda.get_device_name()}"
    return None


def _is_past(b, h, query, key):
    return query >= key


@functools.cache
def _flex(device: str, T: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), create_block_mask(_is_past, None, None, T, T, device=device)


def flex(q, k, v, *, chunk_size):
    function, mask = _flex(str(q.device), q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def flex_unavailable(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"FlexAttention has a backward on CUDA only, the problem is on {problem.device_type}"
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.flex_attention"
    return None
