"""Launchers of the TileLang programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import functools
import importlib.util

import torch

from hsa_tl.autotune import table
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.pairs import Pairs
from hsa_tl.problem import Problem

FORWARD_NEEDS_PAIRS = False
SORT_BLOCKS = 4096  # CTAs of the pairs' counting sort at most
SORT_TOKENS = 16  # of a CTA at least


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    if not installed():
        return "the package tilelang is not installed"
    if problem.device_type == "cpu":
        return None if problem.dtype == torch.float32 else "the CPU target runs float32 only"
    if problem.device_type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0) or CPU tensors"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "on CUDA it runs bfloat16 and float16"
    for program in configs.TUNED:
        if not configs.space(program, problem):
            reason = configs.why_illegal(program, problem, configs.CONFIGS[program]())
            return f"no config of {program} suits it: {reason}"
    return None


def _kernel(program: str, problem: Problem, config: dict | None):
    from hsa_tl.kernels_tilelang import compile

    return compile.kernel(program, problem, table.resolve(program, problem, config))


def arguments(q, k, v, weights, indices, chunk_len):
    """What every program takes: heads split into [H, G], contiguous; chunk_len always there."""
    H = k.shape[3]
    q, weights = (x.unflatten(2, (H, x.shape[2] // H)).contiguous() for x in (q, weights))
    if chunk_len is None:
        chunk_len = torch.empty(k.shape[1], dtype=torch.int32, device=k.device)  # not read
    return q, k.contiguous(), v.contiguous(), weights, indices.contiguous(), chunk_len


def spare_chunk(indices, num_chunks: int):
    """[B, T, H]: a chunk that the token chose, for its empty slots to read; -1 if it chose none."""
    return torch.where(indices < num_chunks, indices, -1).amax(-1)


def sort_pairs(indices: torch.Tensor, num_chunks: int) -> Pairs:
    """As hsa_tl.pairs.sort_pairs, by a counting sort: O(pairs) work and memory, no host synchronisation."""
    B, T, H, K = indices.shape
    segments = B * H * (num_chunks + 1)  # the last B * H hold the empty slots
    # Few enough blocks of tokens that their counts take less memory than the pairs.
    blocks = max(1, min(indices.numel() // (4 * max(1, segments)), SORT_BLOCKS // max(1, B * H), T // SORT_TOKENS))
    counts = torch.zeros(segments, blocks, dtype=torch.int32, device=indices.device)
    cursor = torch.zeros(segments * blocks + 1, dtype=torch.int64, device=indices.device)
    pair = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    if indices.numel():
        device = indices.device.type
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        # Only K matters to these programs.
        problem = Problem(B, T, num_chunks, H, H, 64, 64, K, dtype=dtype, device_type=device)
        indices, tokens = indices.contiguous(), -(-T // blocks)
        _kernel("pairs_count", problem, None)(indices, num_chunks, tokens, counts)
        torch.cumsum(counts.flatten(), 0, dtype=torch.int64, out=cursor[1:])
    offsets = cursor[: B * H * num_chunks * blocks + 1 : blocks].clone()
    if indices.numel():
        _kernel("pairs_place", problem, None)(indices, num_chunks, tokens, cursor[:-1].view_as(counts), pair)
    return Pairs(pair, offsets)


def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config=None):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    problem = Problem.of(q, k, weights, indices, chunk_len)
    kernel = _kernel("hsa_fwd_token", problem, config)
    q, k, v, weights, indices, chunk_len = arguments(q, k, v, weights, indices, chunk_len)
    out = torch.empty_like(q)
    if q.numel():
        kernel(q, k, v, weights, indices, spare_chunk(indices, problem.N), chunk_len, scale, out)
    return out.flatten(2, 3)


def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config=None, deterministic=False):
    """dq, dk, dv, dweights; every program here is deterministic. See hsa_tl.ops for the arguments."""
    problem = Problem.of(q, k, weights, indices, chunk_len)
    if not q.numel():
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, weights))
    dq_kernel = _kernel("hsa_bwd_dq_token", problem, config)
    dkdv_kernel = _kernel("hsa_bwd_dkdv_chunk", problem, config)
    q, k, v, weights, indices, chunk_len = arguments(q, k, v, weights, indices, chunk_len)
    do = do.contiguous().view_as(q)
    dq, dk, dv, dweights = (torch.empty_like(x) for x in (q, k, v, weights))
    spare = spare_chunk(indices, problem.N)
    dq_kernel(q, k, v, weights, indices, spare, chunk_len, do, scale, dq, dweights)
    dkdv_kernel(q, k, v, weights, pairs.pair, pairs.offsets, chunk_len, do, scale, dk, dv)
    return dq.flatten(2, 3), dk, dv, dweights.flatten(2, 3)
