"""The operator in a transformer of your own: local attention to recent tokens, HSA to whole chunks of the past.

    python examples/operator_in_your_transformer.py [--tokens 1024]

Landmarks here are the mean of each chunk's retrieval keys, the simplest choice; `hsa_tl.model.ChunkEncoder` learns
better ones. Shows that the layer is causal, what tokens before the first whole chunk get, and that retrieval learns.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from hsa_tl import fusion_weights, hsa_attention, retrieve_chunks

S, TOPK = 64, 4  # tokens of a chunk, chunks that each token reads


class Attention(nn.Module):
    """Causal attention within blocks of S tokens, plus HSA over the chunks before."""

    def __init__(self, dim: int = 128, heads: int = 8, kv_heads: int = 2, head_dim: int = 32, retrieval_dim: int = 16):
        super().__init__()
        self.sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)] + [kv_heads * retrieval_dim] * 2
        self.head_dim, self.retrieval_dim = head_dim, retrieval_dim
        self.projections = nn.Linear(dim, sum(self.sizes), bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x):  # [B, T, dim], T a multiple of S
        parts = self.projections(x).split(self.sizes, -1)
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in parts[:3])  # [B, T, heads, D]
        q_slc, k_slc = (p.unflatten(-1, (-1, self.retrieval_dim)) for p in parts[3:])  # [B, T, kv_heads, D_r]
        landmarks = k_slc.unflatten(1, (-1, S)).mean(2)  # [B, N, kv_heads, D_r]
        scores, indices = retrieve_chunks(q_slc, landmarks, TOPK, chunk_size=S)
        past = hsa_attention(q, k, v, fusion_weights(scores), indices, chunk_size=S)
        blocks = (t.unflatten(1, (-1, S)).transpose(2, 3) for t in (q, k, v))  # [B, N, heads, S, D]
        local = F.scaled_dot_product_attention(*blocks, is_causal=True, enable_gqa=True).transpose(2, 3).flatten(1, 2)
        return self.out((past + local).flatten(2)), past


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {S}")
T = parser.parse_args().tokens
torch.manual_seed(0)
layer, x = Attention(), torch.randn(1, T, 128)
out, past = layer(x)
print(f"{T} tokens in, {list(out.shape)} out; each token reads {TOPK * S} retrieved tokens at most")
print("HSA's part of the first chunk is exactly 0:", bool((past[:, :S] == 0).all()))

changed = x.clone()
changed[:, T // 2 :] = torch.randn(1, T - T // 2, 128)
difference = (layer(changed)[0] - out).abs().amax(-1)[0]
print(f"other tokens from {T // 2} on: the outputs before differ by {difference[: T // 2].max():.1e}, ", end="")
print(f"those after by {difference[T // 2 :].max():.1e}")

out.square().mean().backward()
q_slc_grad = layer.projections.weight.grad.split(layer.sizes)[3]
print(f"the gradient of the retrieval queries' projection is {q_slc_grad.norm():.1e}: retrieval learns end to end")
