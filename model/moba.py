"""MoBA (Lu et al., 2025): one softmax over the current chunk and the past chunks whose mean key fits a query best.

The current chunk comes on top of `topk`; the published code counts it in.

Shape suffixes: as in hsa_tl.model.hsa.
"""

import torch
import torch.nn.functional as F

from hsa_tl import chunk_means, merge_attention, retrieve_chunks, selected_attention
from hsa_tl.model.attention import SelfAttention, each_whole, windowed


class MixtureOfBlockAttention(SelfAttention):
    """SelfAttention over the current chunk's keys up to the token, and all keys of `topk` whole chunks of the past
    ("all": of every one), which each query head chooses. impl: of the operators. The others are SelfAttention's.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, chunk_size: int = 64, topk: int | str = 64,
        impl: str = "auto", **options,
    ):  # fmt: skip
        super().__init__(dim, heads, kv_heads, head_dim, **options)
        self.chunk_size, self.topk, self.impl = chunk_size, topk, impl

    def over(self, q_BTAD, k_BPHD, v_BPHD, past_B=None, with_lse=False):
        """As SelfAttention.over, with the log-sum-exp in any case."""
        return each_whole(self._over, past_B, q_BTAD, k_BPHD, v_BPHD)

    def _over(self, q_BTAD, k_BPHD, v_BPHD) -> tuple[torch.Tensor, torch.Tensor]:
        (B, T, A, _), S = q_BTAD.shape, self.chunk_size
        start = k_BPHD.shape[1] - T
        k, v = (y.repeat_interleave(A // self.kv_heads, 2) for y in (k_BPHD, v_BPHD))
        with torch.no_grad():
            means = chunk_means(k, S)
            topk = means.shape[1] if self.topk == "all" else self.topk
            _, indices = retrieve_chunks(q_BTAD, means, topk, chunk_size=S, q_start=start, impl=self.impl)
        chosen, chosen_lse = selected_attention(q_BTAD, k, v, indices, chunk_size=S, impl=self.impl)
        skip = start % S  # tokens of the first query's chunk before it
        current = F.pad(q_BTAD, (0, 0, 0, 0, skip, 0)), k[:, start - skip :], v[:, start - skip :]
        n = -(-(skip + T) // S)
        current = (F.pad(y, (0, 0, 0, 0, 0, n * S - y.shape[1])).unflatten(1, (n, S)).flatten(0, 1) for y in current)
        parts = windowed(*current, with_lse=True)
        near, near_lse = (y.unflatten(0, (B, n)).flatten(1, 2)[:, skip : skip + T] for y in parts)
        return merge_attention((chosen, chosen_lse), (near, near_lse.to(chosen_lse.dtype)))
