"""Selections of a trained model as inputs of the kernels' benchmarks: `hsa-tl bench --selection trained=FILE`."""

import json
from pathlib import Path

import numpy as np
import torch

from hsa_tl import selection_overlap
from hsa_tl.files import write_together
from hsa_tl.model.model import Model
from hsa_tl.problem import Problem
from hsa_tl.text import choosing, union_size

TILES = (4, 8, 16)  # neighbouring tokens that could share one walk over the union of their chunks


@torch.no_grad()
def trained_selection(model: Model, tokens: np.ndarray) -> torch.Tensor:
    """indices [1, T, R, K] int32 that the first HSA layer chooses for tokens [T].

    ValueError: a model without HSA, or one that selects all.
    """
    topk = model.config.topk
    if model.encoder is None or topk == "all":
        raise ValueError(f"model must have HSA with a topk, got {model.config.attention} with topk {topk}")
    ids = torch.from_numpy(tokens.astype(np.int64))[None].to(next(model.parameters()).device)
    h, _ = model.lower(model.embed(ids))
    layer = model.layers[model.config.lower_layers].hsa
    _, q_slc = layer.queries(h)
    return model.encode(h).retrieve(q_slc, 0, topk, exclude_window=layer.exclude_window)[1].cpu()


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
