"""The short causal convolution of the embeddings."""

import torch
import torch.nn.functional as F
from torch import nn


class ShortConv(nn.Module):
    """x + a causal depthwise convolution of x [B, T, C]: each token sees the width - 1 before it, `past` [B, ., C]."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.weight_WC = nn.Parameter((torch.rand(width, dim) * 2 - 1) / width**0.5)

    def forward(self, x_BTC: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        W, T = len(self.weight_WC), x_BTC.shape[1]
        padded = F.pad(x_BTC, (0, 0, W - 1, 0)) if past is None else torch.cat([past, x_BTC], 1)
        return x_BTC + sum(padded[:, i : i + T] * self.weight_WC[i] for i in range(W))
