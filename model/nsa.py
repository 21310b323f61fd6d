"""NSA, Native Sparse Attention (Yuan et al., 2025): a gated sum of three attentions, each with its own keys and values.

    compression    over one learned key and value for each whole chunk of the past
    selection      over all keys of the chunks to which compression gives the most weight
    window         over the latest tokens

Choosing chunks has no gradient of its own: the compression branch, whose softmax chooses them, learns what it attends
to. Shape suffixes: as in hsa_tl.model.hsa.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsa_tl import selected_attention
from hsa_tl.model.attention import SelfAttention, each_whole, positions, rotate
from hsa_tl.model.chunk_memory import visible
from hsa_tl.model.mlp import RMSNorm

BLOCK_SCORES = 1 << 22  # of queries and compressed keys at once
FIRST, NEAREST = 1, 2  # chunks that are always selected, among the top k


class Compression(nn.Module):
    """One vector for each chunk [B, N, S, H, D] -> [B, N, H, D]: an MLP of its tokens, each with its place in it."""

    def __init__(self, chunk_size: int, dim: int):
        super().__init__()
        self.position_SD = nn.Parameter(torch.randn(chunk_size, dim) * 0.02)
        self.hidden = nn.Linear(chunk_size * dim, 2 * dim, bias=False)
        self.vector = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x_BNSHD: torch.Tensor) -> torch.Tensor:
        x = (x_BNSHD + self.position_SD[:, None]).transpose(2, 3).flatten(3)
        return self.vector(F.silu(self.hidden(x)))


class NativeSparseAttention(SelfAttention):
    """Attention over a window, with two branches that read further; a sigmoid gate for each head and branch.

    topk: selected chunks, the first and the two nearest among them; "all": every chunk. exclude_window: chunks that lie
    whole within so many tokens are hidden from both branches. far_theta: of their RoPE, None for NoPE; a compressed key
    stands where its chunk begins. impl: of `selected_attention`. The others are those of SelfAttention.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, chunk_size: int = 64, topk: int | str = 16,
        exclude_window: int = 0, far_theta: float | None = None, impl: str = "auto", **options,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **options)
        self.chunk_size, self.topk, self.exclude_window = chunk_size, topk, exclude_window
        self.far_theta, self.impl = far_theta, impl
        self.kv = nn.Linear(dim, 4 * kv_heads * head_dim, bias=False)  # compression's k and v, selection's k and v
        self.compress_k, self.compress_v = Compression(chunk_size, head_dim), Compression(chunk_size, head_dim)
        self.compressed_norm, self.selected_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.gate = nn.Linear(dim, 3 * heads, bias=False)

    def attend(self, x_BTC, start=0, cache=None, first_v_BTHD=None, with_lse=False, keep=None):
        """As SelfAttention.attend, without a log-sum-exp. cache: a pair, the window's and one that keeps everything."""
        assert not with_lse, "three softmaxes have no log-sum-exp in common"
        near, far = (None, None) if cache is None else cache
        window_BTAD, _, v_BTHD = super().attend(x_BTC, start, near, first_v_BTHD, False, keep)
        x, before = self.norm(x_BTC), x_BTC.shape[1] - window_BTAD.shape[1]
        q = self.q_norm(self.q(x[:, before:]).unflatten(-1, (self.heads, self.head_dim)))
        k_cmp, v_cmp, k, v = self.kv(x).unflatten(-1, (4, self.kv_heads, self.head_dim)).unbind(2)
        position = positions(start, x)
        q = rotate(q, position[..., before:], self.far_theta).to(v.dtype)
        k = rotate(self.selected_norm(k), position, self.far_theta).to(v.dtype)
        keys, past = torch.stack([k_cmp, v_cmp, k, v], 2), None
        if far is not None:
            keys, past = far.extend(keys)
            past = None if past is None else past + before
        compressed_BTAD, selected_BTAD = each_whole(self._read, past, q, keys)
        gate = self.gate(x[:, before:]).sigmoid().unflatten(-1, (3, self.heads, 1))
        out = gate[:, :, 0] * compressed_BTAD + gate[:, :, 1] * selected_BTAD + gate[:, :, 2] * window_BTAD
        return out, None, v_BTHD

    def _read(self, q_BTAD, keys_BP4HD) -> tuple[torch.Tensor, torch.Tensor]:
        """Compression's and selection's heads [B, T, A, D] of the last T tokens of P; keys: and values, of both."""
        (B, T, A, _), S = q_BTAD.shape, self.chunk_size
        k_cmp, v_cmp, k, v = keys_BP4HD.unbind(2)
        N = max(1, k.shape[1] // S)  # one that is not whole is seen by no query
        k_cmp, v_cmp = (F.pad(y, (0, 0, 0, 0, 0, N * S - k.shape[1])).unflatten(1, (N, S)) for y in (k_cmp, v_cmp))
        k_BNHD, v_BNHD = self.compressed_norm(self.compress_k(k_cmp)), self.compress_v(v_cmp)
        k_BNHD = rotate(k_BNHD, torch.arange(N, device=k.device) * S, self.far_theta).to(v_BNHD.dtype)
        position = positions(k.shape[1] - T, q_BTAD)
        block = max(1, BLOCK_SCORES // max(1, B * A * N))  # recomputed in the backward: never [T, N] at once
        parts = [
            checkpoint(self._compressed, *part, k_BNHD, v_BNHD, use_reentrant=False)
            for part in zip(q_BTAD.split(block, 1), position.split(block), strict=True)
        ]
        compressed_BTAD, indices_BTHK = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        selected_BTAD, _ = selected_attention(q_BTAD, k, v, indices_BTHK, chunk_size=S, impl=self.impl)
        return compressed_BTAD, selected_BTAD

    def _compressed(self, q_BTAD, position_T, k_BNHD, v_BNHD) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over compressed keys [B, T, A, D], and the chunks [B, T, H, K] that its weights choose."""
        q_BTHGD = q_BTAD.unflatten(2, (self.kv_heads, -1))
        score = torch.einsum("bthgd,bnhd->bthgn", q_BTHGD, k_BNHD) / math.sqrt(self.head_dim)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        seen_TN = visible(position_T, k_BNHD.shape[1], self.chunk_size, self.exclude_window)
        hidden = ~seen_TN[:, None, None]
        # A finite fill: a row with nothing visible stays free of NaN, and is 0 by the second mask.
        p = score.masked_fill(hidden, torch.finfo(score.dtype).min).softmax(-1).masked_fill(hidden, 0)
        out = torch.einsum("bthgn,bnhd->bthgd", p.to(v_BNHD.dtype), v_BNHD)
        return out.flatten(2, 3), self.select(p.detach().sum(3), seen_TN)

    def select(self, importance_BTHN: torch.Tensor, seen_TN: torch.Tensor) -> torch.Tensor:
        """Chunks [B, T, H, K] int32, ascending, -1 last: the first and the nearest ones, then those of the highest
        importance, the sum of the compression weights of a key/value head's queries; of equal ones the lower."""
        N = seen_TN.shape[1]
        n = N if self.topk == "all" else self.topk
        chunk = torch.arange(N, device=seen_TN.device)
        forced = (chunk < FIRST) | (chunk >= seen_TN.sum(-1, keepdim=True) - NEAREST)
        score = importance_BTHN.masked_fill(forced[:, None], torch.inf).masked_fill(~seen_TN[:, None], -torch.inf)
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        chosen = torch.where(score.gather(-1, best) == -torch.inf, N, best).sort(-1).values
        return chosen.masked_fill(chosen == N, -1).int()
