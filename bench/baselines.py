"""Attention by others, each a function of the tensors that `Provider.uses` names, and why it cannot run.

Dense causal attention takes q [B, T, HQ, D], k and v [B, T, H, D]. Of published sparse attentions none of the code is
here: fla-core is a package, and MoBA's and the two HSA kernels are scripts: an environment variable names a checkout of
each.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_tl.problem import Problem

RAMSTORAGE = "HSA_TL_RAMSTORAGE"  # a checkout of github.com/RamstorageAI/long-context-modeling
HILS = "HSA_TL_HILS"  # a checkout of github.com/Tencent-Hunyuan/HiLS-Attention
MOBA = "HSA_TL_MOBA"  # a checkout of github.com/MoonshotAI/MoBA


def needs_half_on_cuda(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"needs CUDA tensors, the problem is on {problem.device_type}"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, the problem is in {problem.dtype_name}"
    return None


def not_installed(package: str, module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{package} is not installed: no module {module}"


def import_error(what: str, load: Callable[[], object]) -> str | None:
    """Why what `load` loads does not import, or None."""
    try:
        load()
    except Exception as error:
        return f"{what} does not import: {type(error).__name__}: {error}"
    return None


def masked_attention(q, k, v, seen):
    """Softmax attention as the equation has it, all scores held; seen: which of them count, [B, H, G, T, T_kv]."""
    q_BTHGD = q.unflatten(2, (k.shape[2], -1))
    s = torch.einsum("bthgd,bshd->bhgts", q_BTHGD, k) * q.shape[3] ** -0.5
    return torch.einsum("bhgts,bshd->bthgd", s.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(2, 3)


def dense_oracle(q, k, v, *, chunk_size):
    """Causal attention over all keys; the last query sees the last key."""
    T, T_kv = q.shape[1], k.shape[1]
    return masked_attention(q, k, v, torch.ones(T, T_kv, dtype=torch.bool, device=q.device).tril(T_kv - T))


def sdpa(q, k, v, *, chunk_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = q.shape[2] > 1  # PyTorch's mask would let one query see the first key only
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def sdpa_expanded(q, k, v, *, chunk_size):
    """Keys and values copied to every query head first: on a CPU faster than letting SDPA group the heads."""
    G = q.shape[2] // k.shape[2]
    return sdpa(q, *(x.repeat_interleave(G, 2) for x in (k, v)), chunk_size=chunk_size)


def sdpa_by(backend: SDPBackend, q, k, v, *, chunk_size):
    with sdpa_kernel(backend):
        return sdpa(q, k, v, chunk_size=chunk_size)


cudnn = functools.partial(sdpa_by, SDPBackend.CUDNN_ATTENTION)
flash2 = functools.partial(sdpa_by, SDPBackend.FLASH_ATTENTION)


def flash3(q, k, v, *, chunk_size):
    from flash_attn_interface import flash_attn_func

    splits = {"num_splits": 0} if q.shape[1] == 1 and flash3_splits() else {}  # 0: its heuristic; by default 1
    out = flash_attn_func(q, k, v, causal=True, **splits)
    return out[0] if isinstance(out, tuple) else out


def flash3_splits() -> bool:
    """Whether it can share the keys of one query out among the SMs."""
    from flash_attn_interface import flash_attn_func

    return "num_splits" in inspect.signature(flash_attn_func).parameters


def flash3_unavailable(problem: Problem) -> str | None:
    if reason := needs_half_on_cuda(problem) or not_installed("FlashAttention-3", "flash_attn_interface"):
        return reason
    if torch.cuda.get_device_capability()[0] != 9:
        return f"FlashAttention-3 needs a Hopper GPU, got {torch.cuda.get_device_name()}"
    return None


@functools.cache
def _flex(device: str, T: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, T, T, device=device)
    return torch.compile(flex_attention, dynamic=False), mask


def flex(q, k, v, *, chunk_size):
    function, mask = _flex(str(q.device), q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def flex_unavailable(problem: Problem) -> str | None:
    if problem.device_type != "cuda":
        return f"FlexAttention has a backward on CUDA only, the problem is on {problem.device_type}"
    return None


@functools.cache
def _load(root: str, folder: str, module: str) -> ModuleType:
    """root/<folder>/<module>.py, imported by the folder, as they import each other, and forgotten by sys.modules."""
    ours = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == folder}
    sys.path.insert(0, root)
    try:
        return importlib.import_module(f"{folder}.{module}")
    finally:
        sys.path.remove(root)
        for n in [n for n in sys.modules if n.split(".")[0] == folder]:
            del sys.modules[n]
        sys.modules.update(ours)


class Script(NamedTuple):
    """<folder>/<module>.py of the checkout that an environment variable names."""

    variable: str
    module: str
    folder: str = "ops"

    def load(self) -> ModuleType:
        return _load(os.environ[self.variable], self.folder, self.module)

    def unavailable(self, problem: Problem) -> str | None:
        """Why it cannot run the problem, or None."""
        root = os.environ.get(self.variable)
        if not root:
            return f"the environment variable {self.variable} names no checkout"
        file = Path(root) / self.folder / f"{self.module}.py"
        if not file.is_file():
            return f"{self.variable} must name a checkout with {self.folder}/{self.module}.py, got {root}"
        if reason := needs_half_on_cuda(problem):
            return reason
        if problem.masked:
            return "needs lengths that are multiples of the chunk size"
        return import_error(str(file), self.load)


RAMSTORAGE_TRITON, RAMSTORAGE_TILELANG = Script(RAMSTORAGE, "hsa_triton"), Script(RAMSTORAGE, "hsa_tilelang")
HILS_SCRIPT = Script(HILS, "hils_fwd_bwd_head")
MOBA_SCRIPT = Script(MOBA, "moba_efficient", "moba")


def ramstorage_triton(q, k, v, weights, indices, *, chunk_size):
    """For rows that hold every visible chunk in ascending order when they have an empty slot: these name later chunks,
    at weight 0, since the kernel takes no -1, and a repeated chunk costs it dk."""
    slots = torch.arange(indices.shape[3], dtype=indices.dtype, device=indices.device)
    filled = torch.where(indices < 0, slots, indices).contiguous()
    weights = torch.where(indices < 0, 0.0, weights)  # so that an empty slot has no gradient either
    # Their softmax with nothing added to its sum, and no regularisation of the scores.
    return RAMSTORAGE_TRITON.load().HSA(q, k, v, weights, filled, 0.0, chunk_size, q.shape[3] ** -0.5, 0.0, 0.0)


def ramstorage_tilelang(q, k, v, weights, indices, *, chunk_size):
    """Forward only; weights in bfloat16."""
    (B, T, HQ, D), H = q.shape, k.shape[2]
    kernel = _ramstorage_kernel(B, HQ, T, k.shape[1], D, chunk_size, HQ // H, indices.shape[3])
    return kernel(q, k, v, weights.to(q.dtype), indices)


@functools.cache
def _ramstorage_kernel(B, HQ, T, T_kv, D, S, G, K) -> Callable:
    build = RAMSTORAGE_TILELANG.load().hierarchical_sparse_attention
    return build(B, HQ, T, T_kv, D, block_size=S, groups=G, selected_blocks=K)


def ramstorage_tilelang_unavailable(problem: Problem) -> str | None:
    if problem.device_type == "cuda" and problem.dtype != torch.bfloat16:
        return f"needs bfloat16, the problem is in {problem.dtype_name}"
    return RAMSTORAGE_TILELANG.unavailable(problem)


def hils(q, k, v, weights, indices, *, chunk_size):
    """Weights for each query head; without their extra landmark token in each chunk."""
    weights = weights.repeat_interleave(q.shape[2] // weights.shape[2], 2)
    dtype = str(q.dtype).removeprefix("torch.")
    attention = HILS_SCRIPT.load().HiLS_block_M_head
    trains = torch.is_grad_enabled()
    return attention(q, k, v, weights, indices, chunk_size, mask_last_token=False, dtype=dtype, is_training=trains)


def moba(q, k, v, indices, *, chunk_size):
    """It chooses as many past chunks as `indices` has slots, and the current one; each query head has its keys."""
    (B, T), device = q.shape[:2], q.device
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    starts = torch.arange(B + 1, dtype=torch.int32, device=device) * T
    attention, topk = MOBA_SCRIPT.load().moba_attn_varlen, indices.shape[3] + 1
    return attention(*(x.flatten(0, 1) for x in (q, k, v)), starts, T, chunk_size, topk).view_as(q)


def moba_oracle(q, k, v, indices, *, chunk_size):
    """One softmax over the current chunk and the past ones whose mean key fits best, up to the token."""
    (B, T, HQ, _), S = q.shape, chunk_size
    k, v = (x.repeat_interleave(HQ // k.shape[2], 2) for x in (k, v))
    position, N = torch.arange(T, device=q.device), T // S
    means = k[:, : N * S].unflatten(1, (N, S)).mean(2)
    fit = torch.einsum("bthd,bnhd->bhtn", q, means)
    fit = fit.masked_fill(torch.arange(N, device=q.device) >= position[:, None] // S, -torch.inf)
    best, chunk = fit.topk(min(N, indices.shape[3]), -1)
    chosen = torch.zeros(B, HQ, T, -(-T // S), dtype=torch.bool, device=q.device)
    chosen.scatter_(-1, chunk, best > -torch.inf)
    seen = chosen.repeat_interleave(S, -1)[..., :T] | (position // S == position[:, None] // S)
    return masked_attention(q, k, v, (seen & (position <= position[:, None]))[:, :, None])


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
    position, blocks = torch.arange(q.shape[1], device=q.device), nsa_chunks(indices)
    chosen = (blocks[..., None, :] == (position // chunk_size)[:, None]).any(-1)  # [B, T, H, T]
    seen = chosen & (position <= position[:, None])[:, None]
    return masked_attention(q, k, v, seen.transpose(1, 2)[:, :, None])


def nsa_unavailable(problem: Problem) -> str | None:
    if reason := needs_half_on_cuda(problem):
        return reason
    if problem.G < 16 or problem.G & (problem.G - 1):
        return f"fla-core's NSA needs a power of two of at least 16 query heads a key/value head, got {problem.G}"
    missing = not_installed("fla-core", "fla")
    return missing or import_error("fla.ops.nsa", lambda: importlib.import_module("fla.ops.nsa"))
