"""Fused sliding windows for GPUs: flash_attn where it is installed, else FlexAttention. Legend: attention.py."""

import functools
import importlib.util

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128  # rows and columns of a FlexAttention block


def has_flash_attn(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and importlib.util.find_spec("flash_attn") is not None


def flash(q_BTAD, k_BPHD, v_BPHD, window: int | None) -> torch.Tensor:
    """out [B, T, A, D]; the last query sees the last key."""
    from flash_attn import flash_attn_func

    sides = (-1 if window is None else window - 1, 0)
    return flash_attn_func(q_BTAD, k_BPHD, v_BPHD, causal=True, window_size=sides)


@functools.lru_cache(maxsize=16)
def block_mask(T: int, P: int, window: int, device: torch.device) -> BlockMask:
    """Query t of T sees keys (t + P - T - window, t + P - T] of P. Built from its blocks: no T x P memory."""
    before = P - T
    rows, columns = -(-T // BLOCK), -(-P // BLOCK)
    first_query = torch.arange(rows, device=device) * BLOCK + before
    last_query = (first_query + BLOCK - 1).clamp(max=P - 1)
    low = (first_query - window + 1).clamp(min=0) // BLOCK
    count = last_query // BLOCK - low + 1
    order = (low[:, None] + torch.arange(columns, device=device)) % columns
    mask = lambda b, h, t, p: (p <= t + before) & (p > t + before - window)  # noqa: E731
    return BlockMask.from_kv_blocks(
        count.int()[None, None], order.int()[None, None], BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=(T, P)
    )


@functools.lru_cache(maxsize=1)
def _compiled():
    return torch.compile(flex_attention)


def flex(q_BTAD, k_BPHD, v_BPHD, window: int | None, with_lse: bool):
    """out [B, T, A, D], and the natural log-sum-exp [B, T, A] float32 or None; both differentiable."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTAD, k_BPHD, v_BPHD))
    T, P = q.shape[2], k.shape[2]
    run = _compiled() if q.is_cuda else flex_attention
    out = run(
        q, k, v, block_mask=block_mask(T, P, P if window is None else window, q.device), enable_gqa=True,
        return_aux=AuxRequest(lse=with_lse),
    )  # fmt: skip
    out, aux = out
    return out.transpose(1, 2), aux.lse.transpose(1, 2) if with_lse else None
