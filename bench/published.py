"""Sparse attentions that others published, adapted to the names of `Provider.uses`. None of their code is here.

fla-core is a package. The two HSA kernels are scripts: an environment variable names a checkout of each.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from hsa_tl.bench.baselines import needs_half_on_cuda
from hsa_tl.problem import Problem

RAMSTORAGE = "HSA_TL_RAMSTORAGE"  # a checkout of github.com/RamstorageAI/long-context-modeling
HILS = "HSA_TL_HILS"  # a checkout of github.com/Tencent-Hunyuan/HiLS-Attention


@functools.cache
def _load(root: str, module: str) -> ModuleType:
    """root/ops/<module>.py, imported as they import each other, `ops.<module>`, and then forgotten by sys.modules."""
    ours = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "ops"}
    sys.path.insert(0, root)
    try:
        return importlib.import_module(f"ops.{module}")
    finally:
        sys.path.remove(root)
        for n in [n for n in sys.modules if n.split(".")[0] == "ops"]:
            del sys.modules[n]
        sys.modules.update(ours)


def _from_checkout(variable: str, module: str) -> ModuleType:
    return _load(os.environ[variable], module)


def checkout_unavailable(variable: str, module: str, problem: Problem) -> str | None:
    """Why ops/<module>.py of the checkout that the variable names cannot run the problem, or None."""
    root = os.environ.get(variable)
    if not root:
        return f"the environment variable {variable} names no checkout"
    file = Path(root) / "ops" / f"{module}.py"
    if not file.is_file():
        return f"{variable} must name a checkout with ops/{module}.py, got {root}"
    if reason := needs_half_on_cuda(problem):
        return reason
    if problem.masked:
        return "needs lengths that are multiples of the chunk size"
    try:
        _load(root, module)
    except Exception as error:
        return f"{file} does not import: {type(error).__name__}: {error}"
    return None


def _filled(indices: torch.Tensor) -> torch.Tensor:
    """Empty slots name later chunks, at weight 0: Ramstorage's kernel takes no -1, and a repeated chunk costs it dk.

    For rows that hold every visible chunk in ascending order when they have an empty slot.
    """
    slots = torch.arange(indices.shape[3], dtype=indices.dtype, device=indices.device)
    return torch.where(indices < 0, slots, indices).contiguous()


def ramstorage_triton(q, k, v, weights, indices, *, chunk_size):
    # Their softmax with nothing added to its sum, and no regularisation of the scores.
    attention = _from_checkout(RAMSTORAGE, "hsa_triton").HSA
    weights = torch.where(indices < 0, 0.0, weights)  # so that an empty slot has no gradient either
    return attention(q, k, v, weights, _filled(indices), 0.0, chunk_size, q.shape[3] ** -0.5, 0.0, 0.0)


def ramstorage_tilelang(q, k, v, weights, indices, *, chunk_size):
    """Forward only; weights in bfloat16."""
    (B, T, HQ, D), H = q.shape, k.shape[2]
    kernel = _ramstorage_kernel(B, HQ, T, k.shape[1], D, chunk_size, HQ // H, indices.shape[3])
    return kernel(q, k, v, weights.to(q.dtype), indices)


@functools.cache
def _ramstorage_kernel(B, HQ, T, T_kv, D, S, G, K) -> Callable:
    build = _from_checkout(RAMSTORAGE, "hsa_tilelang").hierarchical_sparse_attention
    return build(B, HQ, T, T_kv, D, block_size=S, groups=G, selected_blocks=K)


def ramstorage_tilelang_unavailable(problem: Problem) -> str | None:
    if problem.device_type == "cuda" and problem.dtype != torch.bfloat16:
        return f"needs bfloat16, the problem is in {problem.dtype_name}"
    return checkout_unavailable(RAMSTORAGE, "hsa_tilelang", problem)


def hils(q, k, v, weights, indices, *, chunk_size):
    """Weights for each query head; without their extra landmark token in each chunk."""
    weights = weights.repeat_interleave(q.shape[2] // weights.shape[2], 2)
    dtype = str(q.dtype).removeprefix("torch.")
    attention = _from_checkout(HILS, "hils_fwd_bwd_head").HiLS_block_M_head
    trains = torch.is_grad_enabled()
    return attention(q, k, v, weights, indices, chunk_size, mask_last_token=False, dtype=dtype, is_training=trains)


def nsa_chunks(indices: torch.Tensor) -> torch.Tensor:
    """A row without any chunk takes chunk 0, which holds the token itself; NSA always selects that one."""
    first = torch.arange(indices.shape[3], device=indices.device) == 0
    return torch.where((indices < 0).all(-1, keepdim=True) & first, 0, indices)


def nsa(q, k, v, indices, *, chunk_size):
    """The selected branch of fla-core's Native Sparse Attention."""
    from fla.ops.nsa import parallel_nsa

    gate = q.new_ones(q.shape[:3])
    blocks = nsa_chunks(indices).long()
    return parallel_nsa(q, k, v, g_slc=gate, block_indices=blocks, block_counts=blocks.shape[3], block_size=chunk_size)


def nsa_oracle(q, k, v, indices, *, chunk_size):
    """One softmax over all keys of a token's chunks up to the token."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    position, blocks = torch.arange(T, device=q.device), nsa_chunks(indices)
    chosen = (blocks[..., None, :] == (position // chunk_size)[:, None]).any(-1)  # [B, T, H, T]
    seen = chosen & (position <= position[:, None])[:, None]
    k, v, seen = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2), seen.repeat_interleave(G, 2)
    s = torch.einsum("bthd,bshd->bths", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bths,bshd->bthd", s.masked_fill(~seen, -torch.inf).softmax(-1), v)


def nsa_unavailable(problem: Problem) -> str | None:
    if reason := needs_half_on_cuda(problem):
        return reason
    if problem.G < 16 or problem.G & (problem.G - 1):
        return f"fla-core's NSA needs a power of two of at least 16 query heads a key/value head, got {problem.G}"
    if importlib.util.find_spec("fla") is None:
        return "fla-core is not installed: no module fla"
    try:
        importlib.import_module("fla.ops.nsa")
    except Exception as error:
        return f"fla.ops.nsa does not import: {type(error).__name__}: {error}"
    return None
