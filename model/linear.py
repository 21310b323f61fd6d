"""Linear attention with a gated decay: each head has a state of fixed size instead of the keys of all tokens.

    S_t = g_t S_{t-1} + k_t^T v_t        out_t = q_t S_t / sqrt(D)

g_t in (0, 1) is a scalar of the token and the head, as in simple GLA (Yang et al., 2024) and Mamba-2; heads begin with
the rates of Lightning Attention (Qin et al., 2024). The query heads of a key/value head share its keys and
values, and have gates and states of their own.

Shape suffixes: B batch, T tokens, C channels, A query heads, D head dim, N blocks of BLOCK tokens.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl.model.attention import SelfAttention
from hsa_tl.model.mlp import RMSNorm

BLOCK = 64  # tokens, among which attention is a matrix; from block to block goes a state


def linear_attention(
    q_BTAD: torch.Tensor, k_BTAD: torch.Tensor, v_BTAD: torch.Tensor, log_g_BTA: torch.Tensor,
    state_BADD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B, T, A, D] of q's dtype and the state [B, A, D, D] behind the last token, of float32 or float64 sums.

    log_g: at most 0. state: before the first token, by default 0. On CUDA 16-bit inputs take flash-linear-attention's
    kernels where it is installed; that has not run yet.
    """
    if q_BTAD.is_cuda and q_BTAD.element_size() == 2 and importlib.util.find_spec("fla") is not None:
        return by_fla(q_BTAD, k_BTAD, v_BTAD, log_g_BTA, state_BADD)
    (B, T, A, D), dtype = q_BTAD.shape, torch.promote_types(q_BTAD.dtype, torch.float32)
    n = min(T, BLOCK)
    blocks = lambda x: F.pad(x.to(dtype), (0, 0, 0, 0, 0, -T % n)).unflatten(1, (-1, n)).transpose(2, 3)  # noqa: E731
    state = q_BTAD.new_zeros(B, A, D, D, dtype=dtype) if state_BADD is None else state_BADD
    with torch.autocast(q_BTAD.device.type, enabled=False):
        q, k, v = blocks(q_BTAD) * D**-0.5, blocks(k_BTAD), blocks(v_BTAD)  # [B, N, A, n, D]
        # From the block's beginning, [B, N, A, n, 1]; float64, since what counts is differences of long sums.
        since = blocks(log_g_BTA[..., None]).double().cumsum(-2)
        decay = (since - since.mT).to(dtype).tril(-1).exp().tril()
        inside = (q @ k.mT * decay) @ v
        added = (k.mT * decay[..., -1:, :]) @ v  # by each block to the state at its end
        kept, before = since.to(dtype).exp(), []  # of the state before the block
        for i in range(added.shape[1]):
            before.append(state)
            state = kept[:, i, :, -1:] * state + added[:, i]
        out = inside + (q * kept) @ torch.stack(before, 1)
    return out.transpose(2, 3).flatten(1, 2)[:, :T].to(q_BTAD.dtype), state


def by_fla(q_BTAD, k_BTAD, v_BTAD, log_g_BTA, state_BADD) -> tuple[torch.Tensor, torch.Tensor]:
    """As `linear_attention`, by flash-linear-attention."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    run = fused_recurrent_simple_gla if q_BTAD.shape[1] == 1 else chunk_simple_gla
    return run(q_BTAD, k_BTAD, v_BTAD, log_g_BTA, initial_state=state_BADD, output_final_state=True)


class LinearState:
    """What a cache holds for a LinearAttention: the state [B, A, D, D] behind each sequence's last token.

    counts: tokens that each row of a segment holds; the owner updates it in place.
    """

    def __init__(self, counts: list[int], heads: int, head_dim: int, dtype: torch.dtype, device):
        self.counts, dtype = counts, torch.promote_types(dtype, torch.float32)
        self.value = torch.zeros(len(counts), heads, head_dim, head_dim, dtype=dtype, device=device)

    def state(self) -> list[torch.Tensor]:
        return [self.value]

    def restore(self, value: torch.Tensor) -> None:
        self.value = value.to(self.value)


class LinearAttention(SelfAttention):
    """`linear_attention` of pre-normed tokens, with an RMS norm of each head's output.

    Gates are log g = -softplus(gate x) - 1 / window, so that a state keeps at most 1/e of what is `window` tokens back:
    one that never forgot would leave HSA nothing to learn. The other options are SelfAttention's.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, *, window: int, **options):
        super().__init__(dim, heads, kv_heads, head_dim, window=window, **options)
        self.gate = nn.Linear(dim, heads)
        self.out_norm = RMSNorm(head_dim, eps=self.norm.eps)
        with torch.no_grad():  # without the bound 1/e is left after 2 ** (8 / A), 2 ** (16 / A), .., 256 tokens
            self.gate.bias.copy_(torch.expm1(2.0 ** (-8 * torch.arange(1, heads + 1) / heads)).log())

    def attend(self, x_BTC, start=0, cache: LinearState | None = None, first_v_BTHD=None, with_lse=False, keep=None):
        """As SelfAttention.attend, without a log-sum-exp."""
        assert not with_lse, "linear attention has no softmax"
        q, k, own_v, _ = self.project(x_BTC, start, None, first_v_BTHD)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 2) for y in (k, own_v))
        gate = self.gate(self.norm(x_BTC))
        log_g = -F.softplus(gate.to(torch.promote_types(gate.dtype, torch.float32))) - 1 / self.window
        if cache is not None and min(cache.counts) < x_BTC.shape[1]:
            ends = torch.tensor(cache.counts, device=x_BTC.device)[:, None, None]
            real = torch.arange(x_BTC.shape[1], device=x_BTC.device)[:, None] < ends  # [B, T, 1]: no padding
            k, log_g = k * real[..., None], log_g * real  # what is no token leaves the state alone
        out, state = linear_attention(q, k, v, log_g, None if cache is None else cache.value)
        if cache is not None:
            cache.value = state
        out = self.out_norm(out).to(own_v.dtype)
        before = 0 if keep is None else max(0, out.shape[1] - keep)
        return out[:, before:], None, own_v
