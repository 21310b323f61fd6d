"""Feed-forward layers, SwiGLU and a mixture of them, the norm before every layer, and the embeddings' convolution.

Shape suffixes: B batch, T tokens, C channels, W width, E experts, F hidden width, M (token, expert) pairs sorted by
expert, K experts of a token.
"""

import contextlib
import threading
from functools import partial

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from hsa_tl.model.config import EPS

RMSNorm = partial(nn.RMSNorm, eps=EPS)  # the same epsilon in every type
COUNTING = threading.Lock()  # of MoE's load: a CPU's workers train on accumulated batches at once


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Of what a linear layer makes of x here: x's, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class ShortConv(nn.Module):
    """x + a causal depthwise convolution of x [B, T, C]: each token sees the width - 1 before it, `past` [B, ., C]."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.weight_WC = nn.Parameter((torch.rand(width, dim) * 2 - 1) / width**0.5)

    def forward(self, x_BTC: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
        W, T = len(self.weight_WC), x_BTC.shape[1]
        padded = F.pad(x_BTC, (0, 0, W - 1, 0)) if past is None else torch.cat([past, x_BTC], 1)
        return x_BTC + sum(padded[:, i : i + T] * self.weight_WC[i] for i in range(W))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(x_BTC).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def grouped_product(x_MC: torch.Tensor, weight_ECF: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
    """[M, F]: rows of x times their expert's matrix; the first load[0] rows are expert 0's, and so on."""
    if x_MC.is_cuda and x_MC.dtype == torch.bfloat16:
        return torch._grouped_mm(x_MC, weight_ECF, offs=load_E.cumsum(0, dtype=torch.int32))
    parts = x_MC.split(load_E.tolist())
    return torch.cat([x @ w for x, w in zip(parts, weight_ECF, strict=True)])


class MoE(nn.Module):
    """Mixture of experts: sigmoid router, shared experts, balanced by a bias and without an auxiliary loss (Ling 2.0).

    forward: [B, T, C] -> [B, T, C]. A token takes the experts of highest sigmoid(router) + bias; their gates are the
    sigmoids, without the bias, over their sum. In training, forward counts each expert's tokens in `load`, and
    `update_balance` moves the bias after the optimizer's step. (A forward that activation checkpointing recomputes
    counts twice, for every expert alike.)
    """

    def __init__(self, dim: int, experts: int, experts_per_token: int, hidden: int, shared: int = 1):
        super().__init__()
        self.experts, self.experts_per_token = experts, experts_per_token
        self.router = nn.Linear(dim, experts, bias=False)
        self.up_ECF = nn.Parameter(torch.empty(experts, dim, 2 * hidden).uniform_(-1, 1) * dim**-0.5)
        self.down_EFC = nn.Parameter(torch.empty(experts, hidden, dim).uniform_(-1, 1) * hidden**-0.5)
        self.shared = SwiGLU(dim, shared * hidden) if shared else None
        self.register_buffer("bias_E", torch.zeros(experts))
        self.register_buffer("load_E", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def route(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates [T, K] float32 and experts [T, K] int64 of tokens [T, C]; no autocast."""
        score_TE = torch.sigmoid(F.linear(x_TC.float(), self.router.weight.float()))
        expert_TK = (score_TE.detach() + self.bias_E).topk(self.experts_per_token, dim=-1).indices
        gate_TK = score_TE.gather(-1, expert_TK)
        return gate_TK / gate_TK.sum(-1, keepdim=True), expert_TK

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        x_TC = x_BTC.flatten(0, -2)
        with torch.autocast(x_TC.device.type, enabled=False):
            gate_TK, expert_TK = self.route(x_TC)
        order_M = expert_TK.flatten().argsort(stable=True)
        load_E = torch.zeros_like(self.load_E).scatter_add_(0, expert_TK.flatten(), torch.ones_like(order_M))
        if self.training:
            with contextlib.nullcontext() if torch.compiler.is_compiling() else COUNTING:
                self.load_E += load_E
        dtype = product_dtype(x_TC)
        x_MC = x_TC.to(dtype)[order_M // self.experts_per_token]
        gate, up = grouped_product(x_MC, self.up_ECF.to(dtype), load_E).chunk(2, -1)
        y_MC = grouped_product(F.silu(gate) * up, self.down_EFC.to(dtype), load_E)
        y_TKC = y_MC[order_M.argsort()].unflatten(0, expert_TK.shape)
        out_TC = (y_TKC * gate_TK[..., None].to(dtype)).sum(1)
        if self.shared is not None:
            out_TC = out_TC + self.shared(x_TC)
        return out_TC.view(x_BTC.shape)

    @torch.no_grad()
    def update_balance(self, rate: float = 1e-3) -> None:
        """Raises by `rate` the bias of experts with less than the mean load since the last call, lowers the others'.

        Loads are summed over all processes where torch.distributed is initialised.
        """
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.load_E)
        load_E = self.load_E.float()
        self.bias_E += rate * torch.sign(load_E.mean() - load_E)
        self.load_E.zero_()
