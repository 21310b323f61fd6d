"""HSALayer and ChunkEncoder in a model that is not ours: a causal convolution below, HSA above, trained on recall.

    python examples/layer.py [--steps 250]

A sequence holds 24 pairs (key, value), then asks for values by their keys; a convolution of 4 tokens cannot know them.
"""

import argparse

import torch
from torch import nn

from hsa_tl.model import ChunkEncoder, HSALayer

PAIRS, QUERIES, KEYS, VALUES = 24, 16, 64, 64


class Recall(nn.Module):
    def __init__(self, dim: int = 96):
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, dim)
        self.below = nn.Conv1d(dim, dim, 4)  # anything causal
        # The encoder turns each chunk's hidden states into keys, values and one landmark; any number of layers read it.
        self.encoder = ChunkEncoder(dim, kv_heads=1, head_dim=32, retrieval_dim=32, chunk_size=16)
        self.hsa = HSALayer(dim, heads=4, kv_heads=1, head_dim=32, retrieval_dim=32, topk=3)
        self.head = nn.Linear(dim, VALUES)

    def forward(self, tokens, read: bool = True):  # [B, T]
        h = self.embedding(tokens)
        h = h + self.below(nn.functional.pad(h.mT, (3, 0))).mT
        if read:
            h = h + self.hsa(h, self.encoder(h))  # reads whole chunks strictly in the past; 0 for the first 16 tokens
        return self.head(h[:, -QUERIES:])


def sample(batch: int):
    keys, asked = (torch.rand(batch, n).argsort(1)[:, :m] for n, m in ((KEYS, PAIRS), (PAIRS, QUERIES)))
    values = torch.randint(VALUES, (batch, PAIRS))
    pairs = torch.stack([keys, KEYS + values], 2).flatten(1)  # 48 tokens: three chunks, whole when the queries begin
    return torch.cat([pairs, keys.gather(1, asked)], 1), values.gather(1, asked)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=250)
steps = parser.parse_args().steps
torch.manual_seed(0)
model = Recall()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(steps):
    tokens, value = sample(64)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), value.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.3f}", flush=True)
tokens, value = sample(100)
for name, read in (("with", True), ("without", False)):
    right = (model(tokens, read).argmax(-1) == value).float().mean()
    print(f"values right after {steps} steps, {name} what the HSA layer reads: {100 * right:.0f} %")
