"""Decode over a paged chunk memory: two sequences of different lengths, one new token each.

    python examples/decode_with_pages.py [--tokens 20000]

Keys, values and landmarks of whole chunks are appended to a PagedMemory; a step retrieves and reads the chosen pages
only. Shows that a step equals the operator over the whole sequence, and that a memory survives a file.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from hsa_tl import fusion_weights, hsa_attention, retrieve_chunks
from hsa_tl.model import MemorySpec, PagedMemory

HEADS, KV_HEADS, D, D_R, S, TOPK = 8, 2, 64, 32, 64, 8

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=20000, help="of the longer sequence")
T = parser.parse_args().tokens
torch.manual_seed(0)

lengths = [T, T // 3]  # tokens before the new ones; what does not fill a chunk waits outside the memory
spec = MemorySpec(batch=2, heads=KV_HEADS, head_dim=D, retrieval_heads=KV_HEADS, retrieval_dim=D_R, chunk_size=S)
memory = PagedMemory(spec, capacity=T // S)  # offload=True keeps pages on the host, directory= in mapped files
sequences = []
for b, length in enumerate(lengths):
    chunks = length // S
    k, v = (torch.randn(chunks * S, KV_HEADS, D) for _ in range(2))
    landmarks = torch.randn(chunks, KV_HEADS, D_R)
    for c in range(0, chunks, 100):  # as a prefill would, a segment at a time
        part = slice(c * S, (c + 100) * S)
        memory.append(b, k[part], v[part], landmarks[c : c + 100])
    sequences.append((k, v, landmarks))
print(f"memory: {memory.held} chunks of {S} tokens, {memory.nbytes / 2**20:.0f} MiB")

q, q_slc = torch.randn(2, 1, HEADS, D), torch.randn(2, 1, KV_HEADS, D_R)
scores, indices = memory.retrieve(q_slc, torch.tensor(lengths, dtype=torch.int32), TOPK)
out = memory.attend(q, fusion_weights(scores), indices)
print(f"one token reads {TOPK * S} of {lengths[0]} tokens; sequence 0, head 0, chose {indices[0, 0, 0].tolist()}")

for b, (k, v, landmarks) in enumerate(sequences):
    scores, whole = retrieve_chunks(q_slc[b : b + 1], landmarks[None], TOPK, chunk_size=S, q_start=lengths[b])
    want = hsa_attention(q[b : b + 1], k[None], v[None], fusion_weights(scores), whole, chunk_size=S)
    assert torch.equal(indices[b : b + 1], whole)
    print(f"sequence {b}: the same chunks as over the whole sequence, out differs by {(out[b] - want).abs().max():.0e}")
    torch.testing.assert_close(out[b : b + 1], want)

with tempfile.TemporaryDirectory() as folder:
    memory.save(Path(folder) / "memory.safetensors")
    again = PagedMemory.load(Path(folder) / "memory.safetensors", spec, two_level=True)  # skips blocks of landmarks
scores, same = again.retrieve(q_slc, torch.tensor(lengths, dtype=torch.int32), TOPK)
print("saved and loaded, the same chunks:", torch.equal(same, indices))
