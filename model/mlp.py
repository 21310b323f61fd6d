"""Feed-forward layers: SwiGLU.

Shape suffixes: B batch, T tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x_BTC).chunk(2, -1)
        return self.down(F.silu(gate) * up)
