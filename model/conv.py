"""Short causal convolutions: of the embeddings, and of what the chunk encoder reads."""

import torch
import torch.nn.functional as F
from torch import nn


def shifts(x_BTC: torch.Tensor, width: int, past: torch.Tensor | None) -> list[torch.Tensor]:
    """x [B, T, C] delayed by width - 1, .., 1, 0 tokens; past [B, width - 1, C]: what stands before it, or zeros."""
    T = x_BTC.shape[1]
    padded = F.pad(x_BTC, (0, 0, width - 1, 0)) if past is None else torch.cat([past, x_BTC], 1)
    return [padded[:, i : i + T] for i in range(width)]


class ShortConv(nn.Module):
    """x + a causal depthwise convolution of x [B, T, C]: each token sees the width - 1 before it, `past` [B, ., C]."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.weight_WC = nn.Parameter((torch.rand(width, dim) * 2 - 1) / width**0.5)

    def forward(self, x_BTC: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        delayed = shifts(x_BTC, len(self.weight_WC), past)
        return x_BTC + sum(x * self.weight_WC[i] for i, x in enumerate(delayed))


class MixingConv(nn.Module):
    """A causal convolution of x [B, T, C] with a matrix for each tap, `past` [B, width - 1, C]. At first x_t + x_{t-1}:
    what is read from a token is then read from the next one too, and the matrices learn to keep the two apart."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.taps = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(width))
        for i, tap in enumerate(self.taps):
            nn.init.eye_(tap.weight) if i >= width - 2 else nn.init.zeros_(tap.weight)

    def forward(self, x_BTC: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        return sum(tap(x) for tap, x in zip(self.taps, shifts(x_BTC, len(self.taps), past), strict=True))
