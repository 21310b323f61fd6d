"""Causal self-attention over a sliding window, or over everything (BaseLM): QK-norm, RoPE or no positions.

Shape suffixes: as in hsa_tl.model.hsa; W window, N blocks of W tokens.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hsa_tl.model.config import EPS
from hsa_tl.model.mlp import RMSNorm

BLOCK = 128  # rows and columns of a FlexAttention block


class KeyCache(Protocol):
    """Keys and values of the tokens before a segment, one for each attention."""

    def extend(self, k_BTHD: torch.Tensor, v_BTHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, object]:
        """k, v [B, P, H, D] that end with those given, and how many of the P - T before them are real: an int32 [B],
        the latest ones; or None, all. Stores what later segments need."""


def positions(start: int | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[T] or [B, T] absolute positions of x [B, T, ...]; start: of its first token, int or int32 [B]."""
    t = torch.arange(x.shape[1], device=x.device)
    return t + start if isinstance(start, int) else start[:, None] + t


def rotate(x_BTHD: torch.Tensor, position: torch.Tensor, theta: float | tuple[float, ...] | None) -> torch.Tensor:
    """RoPE: turns (x[d], x[d + D / 2]) by position * theta ** (-2 d / D), or by position * theta[d] of a tuple; not at
    all for None.

    Angles are float64: in float32 they would be off by 0.06 at position one million, and by one at 16 million.
    """
    if theta is None:
        return x_BTHD
    half = x_BTHD.shape[-1] // 2
    if isinstance(theta, tuple):
        frequency = torch.tensor(theta, device=x_BTHD.device, dtype=torch.float64)
    else:
        frequency = theta ** (-torch.arange(half, device=x_BTHD.device, dtype=torch.float64) / half)
    angle = position[..., None, None] * frequency  # [(B), T, 1, D / 2]
    dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return (x_BTHD * cos + x_BTHD.roll(half, -1) * sin).to(x_BTHD.dtype)


def scores(q_BTAD: torch.Tensor, k_BPHD: torch.Tensor) -> torch.Tensor:
    """Scaled scores [B, H, G, T, P], float32 at least, and so are the products: of few bits one of a common part of all
    keys, such as a bias, would hide what tells them apart, and float16 would not hold it."""
    q = q_BTAD.unflatten(2, (k_BPHD.shape[2], -1)).permute(0, 2, 3, 1, 4)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        product = q.flatten(2, 3).to(dtype) @ k_BPHD.to(dtype).permute(0, 2, 3, 1)
    return product.unflatten(2, q.shape[2:4]) / math.sqrt(q.shape[-1])


def softmax_product(score_BHGTP: torch.Tensor, v_BPHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, A, D] and log-sum-exp [B, T, A] of scores, -inf where a key is hidden."""
    lse = score_BHGTP.logsumexp(-1)
    p = torch.exp(score_BHGTP - lse[..., None]).to(v_BPHD.dtype)
    out = (p.flatten(2, 3) @ v_BPHD.transpose(1, 2)).unflatten(2, p.shape[2:4])  # [B, H, G, T, D]
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2)


def _attend(q_BTAD, k_BPHD, v_BPHD, mask, with_lse):
    """Attention of one block: mask [T, P] or [B, 1, T, P], True where seen; None: causal, P = T, or T = 1."""
    T = q_BTAD.shape[1]
    if not with_lse:
        q, k, v = (x.transpose(1, 2) for x in (q_BTAD, k_BPHD, v_BPHD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=True)
        return out.transpose(1, 2), None
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q_BTAD.device).tril()
    hidden = ~(mask if mask.ndim == 2 else mask[:, None])
    return softmax_product(scores(q_BTAD, k_BPHD).masked_fill(hidden, -torch.inf), v_BPHD)


def flash(q_BTAD, k_BPHD, v_BPHD, window: int | None) -> torch.Tensor:
    """out [B, T, A, D] by flash_attn; the last query sees the last key."""
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


_compiled = functools.cache(lambda: torch.compile(flex_attention))


def flex(q_BTAD, k_BPHD, v_BPHD, window: int | None, with_lse: bool):
    """As `windowed`, by FlexAttention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTAD, k_BPHD, v_BPHD))
    T, P = q.shape[2], k.shape[2]
    run = _compiled() if q.is_cuda else flex_attention
    out, aux = run(
        q, k, v, block_mask=block_mask(T, P, P if window is None else window, q.device), enable_gqa=True,
        return_aux=AuxRequest(lse=with_lse),
    )  # fmt: skip
    return out.transpose(1, 2), aux.lse.transpose(1, 2) if with_lse else None


def windowed(
    q_BTAD: torch.Tensor, k_BPHD: torch.Tensor, v_BPHD: torch.Tensor, window: int | None = None,
    past_B: torch.Tensor | None = None, with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Causal attention of T queries over themselves and the P - T keys before them, each over `window` keys at most.

    Returns out [B, T, A, D] and, with_lse, the log-sum-exp [B, T, A] float32 of each query's scaled scores. window
    None: all keys. past_B: how many keys before the queries are real, the latest ones; None: all. Work and memory are
    O(T * window): queries in blocks of `window`, each over its own block of keys and the one before; on CUDA flash_attn
    where it is installed and no log-sum-exp is asked for, else FlexAttention for 128 queries and more.
    """
    if q_BTAD.is_cuda and past_B is None:
        half = q_BTAD.dtype in (torch.bfloat16, torch.float16)
        if half and not with_lse and importlib.util.find_spec("flash_attn") is not None:
            return flash(q_BTAD, k_BPHD, v_BPHD, window), None
        if q_BTAD.shape[1] >= BLOCK and (window is not None or with_lse):
            return flex(q_BTAD, k_BPHD, v_BPHD, window, with_lse)
    q, (B, T, _, _) = q_BTAD, q_BTAD.shape
    W = T if window is None else window
    before = k_BPHD.shape[1] - T
    drop = 0 if window is None else max(0, before - window + 1)
    k, v, before = k_BPHD[:, drop:], v_BPHD[:, drop:], before - drop

    n = min(W, T)
    mask = None
    if before and (T > 1 or past_B is not None):  # one query sees every key that there is
        r = torch.arange(n, device=q.device)[:, None] + before
        c = torch.arange(before + n, device=q.device)
        mask = (c <= r) & (c > r - (k_BPHD.shape[1] if window is None else window))
        if past_B is not None:
            mask = mask & (c >= before - past_B[:, None])[:, None, None]
    first = _attend(q[:, :n], k[:, : before + n], v[:, : before + n], mask, with_lse)
    if n == T:
        return first
    N = -(-T // W)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, N * W - T)) for x in (q, k[:, before:], v[:, before:]))
    q, k, v = (x.unflatten(1, (N, W)) for x in (q, k, v))
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1) for x in (k, v))
    r, c = torch.arange(W, device=q.device)[:, None], torch.arange(2 * W, device=q.device)
    rest = _attend(q[:, 1:].flatten(0, 1), k, v, (c > r) & (c <= r + W), with_lse)
    return tuple(
        None if a is None else torch.cat([a, b.unflatten(0, (B, N - 1)).flatten(1, 2)[:, : T - n]], 1)
        for a, b in zip(first, rest, strict=True)
    )


def each_whole(read: Callable, past_B: torch.Tensor | None, q: torch.Tensor, *keys: torch.Tensor) -> tuple:
    """read(q [B, T, ..], *keys [B, P, ..]), row by row where past (see `windowed`) differs: there, keys begin with the
    sequence's first one, as its chunks do."""
    if past_B is None:
        return read(q, *keys)
    columns = (keys[0].shape[1] - q.shape[1] - past_B).tolist()
    rows = [read(q[b, None], *(x[b, None, n:] for x in keys)) for b, n in enumerate(columns)]
    return tuple(torch.cat(x) for x in zip(*rows, strict=True))


class SelfAttention(nn.Module):
    """Pre-norm attention of a token over a sliding window, or over all before it, with QK-norm unless qk_norm is False.

    window: tokens, the query's own included; None: all. rope_theta: see `rotate`, None for no positions. eps: of the
    norms. biases: which of the projections q, k, v and out have one. value_residual: "none", or how the first layer's
    values enter (ResFormer: mixed by two learned scalars; SVFormer: they are the values, and there is no value
    projection). score_scale: of all scores. log_length: see ModelConfig.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, window: int | None = None,
        rope_theta: float | tuple[float, ...] | None = None, value_residual: str = "none", eps: float = EPS,
        qk_norm: bool = True, biases: tuple[str, ...] = (), score_scale: float = 1.0, log_length: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.score_scale, self.log_length = score_scale, log_length
        self.window, self.rope_theta, self.value_residual = window, rope_theta, value_residual
        self.norm = RMSNorm(dim, eps=eps)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, eps=eps) if qk_norm else nn.Identity() for _ in range(2))
        self.q = nn.Linear(dim, heads * head_dim, bias="q" in biases)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias="k" in biases)
        if value_residual != "svformer":
            self.v = nn.Linear(dim, kv_heads * head_dim, bias="v" in biases)
        if value_residual == "resformer":
            self.value_mix = nn.Parameter(torch.full((2,), 0.5))
        self.out = nn.Linear(heads * head_dim, dim, bias="out" in biases)

    def project(self, x_BTC, start=0, keep: int | None = None, first_v_BTHD=None):
        """q of the last `keep` positions, k and v of all, and how many q leaves out."""
        x = self.norm(x_BTC)
        before = 0 if keep is None else max(0, x.shape[1] - keep)
        q = self.q_norm(self.q(x[:, before:]).unflatten(-1, (self.heads, self.head_dim)))
        k = self.k_norm(self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)))
        if self.value_residual == "svformer":
            v = first_v_BTHD
        else:
            v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.value_residual == "resformer":
            v = (self.value_mix[0] * first_v_BTHD + self.value_mix[1] * v).to(v.dtype)
        position = positions(start, x)
        q, k = rotate(q, position[..., before:], self.rope_theta), rotate(k, position, self.rope_theta)
        if self.score_scale != 1:
            q = q * self.score_scale
        if self.log_length:
            n = position[..., before:, None, None] + 1
            q = q * (n.log() / math.log(self.log_length))
        return q.to(v.dtype), k.to(v.dtype), v, before

    def attend(
        self, x_BTC: torch.Tensor, start: int | torch.Tensor = 0, cache: KeyCache | None = None,
        first_v_BTHD: torch.Tensor | None = None, with_lse: bool = False, keep: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
        """Heads' outputs [B, T, A, D] before the projection, log-sum-exp [B, T, A] or None, values [B, T, H, D].

        keep: only the last so many positions ask; the first two results are of these.
        """
        q, k, own_v, before = self.project(x_BTC, start, keep, first_v_BTHD)
        v, past = own_v, None
        if cache is not None:
            k, v, past = cache.extend(k, v)
            past = None if past is None else past + before
        return *self.over(q, k, v, past, with_lse), own_v

    def over(self, q_BTAD, k_BPHD, v_BPHD, past_B: torch.Tensor | None = None, with_lse: bool = False):
        """out [B, T, A, D] and log-sum-exp [B, T, A] or None of the last T tokens of P; past: see `windowed`."""
        return windowed(q_BTAD, k_BPHD, v_BPHD, self.window, past_B, with_lse)
