"""The chunk encoder and the HSA layer (paper, section 2 and figure 3), on the public operator.

Shape suffixes: B batch, T tokens, C channels, N chunks, S chunk size, A query heads, H key/value heads, D head dim,
R retrieval dim, K selected chunks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl import fusion_weights, hsa_attention, retrieve_chunks
from hsa_tl.model.memory import PagedMemory


class ChunkMemory(NamedTuple):
    """What every HSA layer reads: keys and values of whole chunks, and one landmark a chunk and key/value head."""

    k: torch.Tensor  # [B, N * S, H, D]
    v: torch.Tensor  # [B, N * S, H, D]
    landmarks: torch.Tensor  # [B, N, H, R]


class ChunkEncoder(nn.Module):
    """One bidirectional attention and MLP within each chunk of S tokens and its [CLS]; no chunk sees another.

    forward: x [B, T, C] -> ChunkMemory with N = ceil(T / S) chunks. The tokens give keys and values, [CLS] gives the
    landmark. A last chunk shorter than S is padded; no token may retrieve it before it is whole.
    """

    def __init__(self, dim: int, kv_heads: int, head_dim: int, retrieval_dim: int, chunk_size: int, heads: int = 4):
        super().__init__()
        self.chunk_size, self.heads, self.kv_heads = chunk_size, heads, kv_heads
        self.cls_C = nn.Parameter(torch.randn(dim) * 0.02)
        self.position_SC = nn.Parameter(torch.randn(chunk_size + 1, dim) * 0.02)
        self.norm, self.mlp_norm, self.out_norm = nn.RMSNorm(dim), nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.landmark = nn.Linear(dim, kv_heads * retrieval_dim, bias=False)
        self.k_norm, self.landmark_norm = nn.RMSNorm(head_dim), nn.RMSNorm(retrieval_dim)

    def forward(self, x_BTC: torch.Tensor) -> ChunkMemory:
        B, T, C = x_BTC.shape
        S = self.chunk_size
        N = (T + S - 1) // S
        x = F.pad(x_BTC, (0, 0, 0, N * S - T)).view(B * N, S, C)
        x = torch.cat([x, self.cls_C.expand(B * N, 1, C)], 1) + self.position_SC
        q, k, v = self.qkv(self.norm(x)).view(B * N, S + 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        x = self.out_norm(x + self.down(F.silu(gate) * up))
        k, v = self.kv(x[:, :S]).view(B, N * S, 2, self.kv_heads, -1).unbind(2)
        landmarks = self.landmark(x[:, S]).view(B, N, self.kv_heads, -1)
        return ChunkMemory(self.k_norm(k), v, self.landmark_norm(landmarks))


class HSALayer(nn.Module):
    """Retrieve, weigh, attend: queries with QK-norm and no positional encoding (NoPE) over a shared chunk memory.

    forward: x [B, T, C] and a ChunkMemory -> [B, T, C], to be added to the residual stream. q_start: absolute position
    of x's first token. Every key/value head retrieves for itself. A token with no visible chunk gets 0.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, retrieval_dim: int, *, chunk_size: int = 64,
        topk: int = 64, exclude_window: int = 0, fusion: str = "softmax", impl: str = "auto",
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.chunk_size, self.topk, self.exclude_window = chunk_size, topk, exclude_window
        self.fusion, self.impl = fusion, impl
        self.norm = nn.RMSNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.q_slc = nn.Linear(dim, kv_heads * retrieval_dim, bias=False)
        self.q_norm, self.q_slc_norm = nn.RMSNorm(head_dim), nn.RMSNorm(retrieval_dim)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def queries(self, x_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of attention [B, T, A, D] and of retrieval [B, T, H, R]."""
        B, T, _ = x_BTC.shape
        x = self.norm(x_BTC)
        q_BTAD = self.q_norm(self.q(x).view(B, T, self.heads, -1))
        return q_BTAD, self.q_slc_norm(self.q_slc(x).view(B, T, self.kv_heads, -1))

    def forward(self, x_BTC: torch.Tensor, memory: ChunkMemory, q_start: int = 0) -> torch.Tensor:
        q_BTAD, q_BTHR = self.queries(x_BTC)
        scores_BTHK, indices_BTHK = retrieve_chunks(
            q_BTHR, memory.landmarks, self.topk, chunk_size=self.chunk_size, q_start=q_start,
            exclude_window=self.exclude_window,
        )  # fmt: skip
        weights_BTHK = fusion_weights(scores_BTHK, self.fusion)
        out_BTAD = hsa_attention(
            q_BTAD, memory.k, memory.v, weights_BTHK, indices_BTHK, chunk_size=self.chunk_size, impl=self.impl
        )
        return self.out(out_BTAD.flatten(2))

    @torch.no_grad()
    def decode(self, x_BTC: torch.Tensor, memory: PagedMemory, lengths_B: torch.Tensor) -> torch.Tensor:
        """forward of one or a few new tokens; lengths [B] int32: tokens of each sequence before them."""
        q_BTAD, q_BTHR = self.queries(x_BTC)
        scores_BTHK, indices_BTHK = memory.retrieve(q_BTHR, lengths_B, self.topk, exclude_window=self.exclude_window)
        weights_BTHK = fusion_weights(scores_BTHK, self.fusion)
        return self.out(memory.attend(q_BTAD, weights_BTHK, indices_BTHK, impl=self.impl).flatten(2))
