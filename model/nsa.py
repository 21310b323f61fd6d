"""The NSA-style baseline (paper, table 1): chunks chosen by mean-pooled keys, one softmax over all their keys.

Shape suffixes: B batch, T tokens, C channels, P past and new keys, N chunks, S chunk size, A query heads, H key/value
heads, G = A / H, D head dim, K selected chunks.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hsa_tl import retrieve_chunks
from hsa_tl.model.attention import KeyCache, SelfAttention, positions
from hsa_tl.model.hsa import visible

BLOCK_KEYS = 1 << 22  # elements of gathered keys at once


def _attend_block(q_BTHGD, k_MSD, v_MSD, indices_BTHK, N):
    """Softmax attention over the keys of the chosen chunks; k and v are those of (b, chunk, head), flattened."""
    B, _, H, _ = indices_BTHK.shape
    b, h = torch.arange(B, device=q_BTHGD.device), torch.arange(H, device=q_BTHGD.device)
    row = (b[:, None, None, None] * N + indices_BTHK.clamp(min=0)) * H + h[:, None]
    k, v = (x[row].flatten(3, 4) for x in (k_MSD, v_MSD))  # [B, T, H, K * S, D]
    empty = (indices_BTHK < 0).repeat_interleave(k_MSD.shape[1], -1)[:, :, :, None]
    score = (q_BTHGD @ k.mT).float() / math.sqrt(q_BTHGD.shape[-1])
    # A finite fill: a row with nothing visible stays free of NaN, and is 0 by the second mask.
    p = score.masked_fill(empty, torch.finfo(score.dtype).min).softmax(-1).masked_fill(empty, 0)
    return p.to(v.dtype) @ v


def attend_selected(
    q_BTAD: torch.Tensor, k_BPHD: torch.Tensor, v_BPHD: torch.Tensor, indices_BTHK: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """out [B, T, A, D]: one softmax over the keys of all chunks that a token chose; 0 if it chose none.

    k, v [B, N * chunk_size, H, D]; indices without duplicates. Blocks of tokens are recomputed in the backward pass:
    memory O(T), not O(T * K * chunk_size).
    """
    B, T, A, D = q_BTAD.shape
    H, N = k_BPHD.shape[2], k_BPHD.shape[1] // chunk_size
    q = q_BTAD.unflatten(2, (H, A // H))
    k, v = (x.unflatten(1, (N, chunk_size)).transpose(2, 3).flatten(0, 2) for x in (k_BPHD, v_BPHD))
    block = max(1, BLOCK_KEYS // max(1, B * indices_BTHK.shape[2] * indices_BTHK.shape[3] * chunk_size * D))
    parts = [
        checkpoint(_attend_block, q[:, i : i + block], k, v, indices_BTHK[:, i : i + block], N, use_reentrant=False)
        for i in range(0, T, block)
    ]
    return torch.cat(parts, 1).flatten(2, 3)


class NSALayer(SelfAttention):
    """Selection with keys and values of its own: a chunk's landmark is the mean of its keys, and scores only select.

    forward: x [B, T, C] -> [B, T, C], to be added to the residual stream. The query heads of a key/value head choose
    together, by their mean. topk "all": every chunk, without a selection. impl: of retrieval. rope_theta: None for
    NoPE. start: position of x's first token. cache: for each sequence one that keeps every key and value; start may
    then be an int32 [B]. keep: outputs of the last so many tokens only.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, chunk_size: int = 64, topk: int | str = 64,
        exclude_window: int = 0, rope_theta: float | None = None, impl: str = "auto",
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, rope_theta=rope_theta)
        self.chunk_size, self.topk, self.exclude_window, self.impl = chunk_size, topk, exclude_window, impl

    def forward(
        self, x_BTC: torch.Tensor, start: int | torch.Tensor = 0, cache: list[KeyCache] | None = None,
        keep: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if cache is not None and len(cache) > 1:  # chunks of each sequence begin at its own start
            starts = [start] * len(cache) if isinstance(start, int) else start.tolist()
            rows = zip(x_BTC.split(1), starts, cache, strict=True)
            return torch.cat([self(x, first, [c], keep) for x, first, c in rows])
        q, k, v, skip = self.project(x_BTC, start, keep)
        if cache is not None:
            k, v, _ = cache[0].extend(k, v)
        k, v = (F.pad(y, (0, 0, 0, 0, 0, -y.shape[1] % self.chunk_size)) for y in (k, v))
        landmarks = k.unflatten(1, (-1, self.chunk_size)).mean(2)
        options = {"chunk_size": self.chunk_size, "exclude_window": self.exclude_window}
        if self.topk == "all":
            seen = visible(positions(start + skip, q), landmarks.shape[1], **options)
            every = torch.arange(seen.shape[1], dtype=torch.int32, device=q.device)
            indices_BTHK = torch.where(seen, every, -1)[:, None].expand(len(q), -1, self.kv_heads, -1)
        else:
            q_slc = q.unflatten(2, (self.kv_heads, -1)).mean(3)
            with torch.no_grad():
                _, indices_BTHK = retrieve_chunks(
                    q_slc, landmarks, self.topk, q_start=start + skip, impl=self.impl, **options
                )
        return self.out(attend_selected(q, k, v, indices_BTHK, self.chunk_size).flatten(2))
