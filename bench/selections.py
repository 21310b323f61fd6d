"""What the HSA layers of a trained model read: how far back their weight goes, and the first one's selections as inputs
of the kernels' benchmarks, `hsa-tl bench --selection trained=FILE`."""

import json
from pathlib import Path

import numpy as np
import torch

from hsa_tl import selection_overlap
from hsa_tl.files import write_together
from hsa_tl.model.chunk_memory import Memory
from hsa_tl.model.model import Model
from hsa_tl.problem import Problem
from hsa_tl.text import choosing, union_size

TILES = (4, 8, 16)  # neighbouring tokens that could share one walk over the union of their chunks


class _Watched:
    """A memory that keeps what each HSA layer asks of it: weights [1, T, H or A, K] and chunks [1, T, H, K]."""

    def __init__(self, memory: Memory):
        self.memory, self.asked = memory, []
        self.retrieve, self.scores, self.masses = memory.retrieve, memory.scores, memory.masses

    def attend(self, q, weights, indices, **options) -> torch.Tensor:
        self.asked.append((weights.cpu(), indices.cpu()))
        return self.memory.attend(q, weights, indices, **options)


@torch.no_grad()
def trained_selections(model: Model, tokens: np.ndarray) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of each HSA layer, by its number, the weights [1, T, H or A, K] and chunks [1, T, H, K] for tokens [T].

    ValueError: a model without HSA, or one that selects all.
    """
    c = model.config
    if model.encoder is None or c.topk == "all":
        raise ValueError(f"model must have HSA with a topk, got {c.attention} with topk {c.topk}")
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
    h, first_v = model.lower(model.embed(ids))
    memory = _Watched(model.encode(h))
    model.upper(h, memory, first_v)
    return dict(zip((i for i, kind in enumerate(c.kinds) if kind == "hsa"), memory.asked, strict=True))


def weight_by_distance(weights: torch.Tensor, indices: torch.Tensor, chunk_size: int) -> list[float]:
    """Mean weight, of the tokens of the second half, on chunks 0, 1 to 2, 3 to 6, 7 to 14 and so on before their own.

    Of the second half, since tokens near the start see no far chunk. weights [1, T, H or A, K], indices [1, T, H, K]:
    what trained_selections gives. The shares add up to 1 where every token has chunks and fusion is by a softmax.
    """
    T = indices.shape[1]
    weights = weights.unflatten(2, (indices.shape[2], -1)).mean(3)
    weights, indices = (x[0, T // 2 :].double() for x in (weights, indices))
    between = torch.arange(T // 2, T)[:, None, None] // chunk_size - 1 - indices
    bucket = torch.where(indices < 0, 0, (between + 1).log2().floor()).long()  # what is no chunk has no weight
    total = torch.bincount(bucket.flatten(), weights.flatten(), max(1, ((T - 1) // chunk_size).bit_length()))
    return (total / (weights.shape[0] * weights.shape[1])).tolist()


def statistics(indices: torch.Tensor, chunk_size: int) -> dict:
    """Share of a token's chunks that its predecessor chose too, and distinct chunks of neighbouring tokens."""
    unions = {str(n): union_size(indices, chunk_size, n) for n in TILES}
    K = indices.shape[3]
    return {
        "tokens": indices.shape[1], "heads": indices.shape[2], "topk": K, "chunk_size": chunk_size,
        "overlap": selection_overlap(choosing(indices, chunk_size)), "union_chunks": unions,
        "union_share": {n: u / (int(n) * K) for n, u in unions.items()},
    }  # fmt: skip


def save_selection(path: Path, indices: torch.Tensor, chunk_size: int, about: dict) -> None:
    """A safetensors file of indices [1, T, R, K], and about as JSON beside it."""
    from safetensors.torch import save

    data = save({"indices": indices.contiguous()}, {"chunk_size": json.dumps(chunk_size)})
    write_together({path: data, path.with_suffix(".json"): json.dumps(about, indent=1) + "\n"})


def load_selection(path: Path, problem: Problem) -> torch.Tensor:
    """indices [B, T, H, K] for a problem: the first T tokens, the first head for every head that the file lacks.

    ValueError: a file that is not one, of another chunk size or K, or with fewer tokens. OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            indices, S = file.get_tensor("indices"), json.loads((file.metadata() or {})["chunk_size"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"selection must be a file that hsa-tl eval selections wrote, got {path}: {error}") from None
    p = problem
    for name, want, got in (("chunk size", p.S, S), ("K", p.K, indices.shape[3])):
        if want != got:
            raise ValueError(f"selection must have {name} {want}, got {got} in {path}")
    if indices.shape[1] < p.T:
        raise ValueError(f"selection must hold at least {p.T} tokens, got {indices.shape[1]} in {path}")
    heads = [min(h, indices.shape[2] - 1) for h in range(p.H)]
    return indices[:, : p.T, heads].expand(p.B, -1, -1, -1).contiguous()
