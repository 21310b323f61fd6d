"""Launchers of the TileLang programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsa_tl.autotune import strategy
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_auxiliary import UnionIndexConfig
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.pairs import Pairs
from hsa_tl.problem import Problem

FORWARD_NEEDS_PAIRS = False
# Every problem that tilelang accepts has these; the other strategies suit fewer shapes.
BASE = ("hsa_fwd_token", "hsa_bwd_dq_token", "hsa_bwd_dkdv_chunk")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("tilelang") is not None


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    if not _installed():
        return "the package tilelang is not installed"
    if problem.device_type == "cpu":
        return None if problem.dtype == torch.float32 else "the CPU target runs float32 only"
    if problem.device_type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0) or CPU tensors"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return "on CUDA it runs bfloat16 and float16"
    for program in BASE:
        if not configs.space(program, problem):
            reason = configs.why_illegal(program, problem, configs.CONFIGS[program]())
            return f"no config of {program} suits it: {reason}"
    return None


@dataclass(frozen=True)
class Call:
    """One call as the programs take it: heads split into [H, G], contiguous; chunk_len always there."""

    problem: Problem
    q: Tensor  # [B, T, H, G, D], like do
    k: Tensor  # [B, N, S, H, D], like v
    v: Tensor
    weights: Tensor  # [B, T, H, heads_w, K]
    indices: Tensor  # [B, T, H, K]
    pairs: Pairs | None
    chunk_len: Tensor  # [N]
    scale: float
    do: Tensor | None = None

    @classmethod
    def of(cls, q, k, v, weights, indices, pairs, chunk_len, scale, do=None) -> "Call":
        problem = Problem.of(q, k, weights, indices, chunk_len)
        H = k.shape[3]
        q, weights = (x.unflatten(2, (H, x.shape[2] // H)).contiguous() for x in (q, weights))
        if chunk_len is None:
            chunk_len = torch.empty(k.shape[1], dtype=torch.int32, device=k.device)  # not read
        do = None if do is None else do.contiguous().view_as(q)
        k, v, indices = (x.contiguous() for x in (k, v, indices))
        return cls(problem, q, k, v, weights, indices, pairs, chunk_len, scale, do)

    def kernel(self, program: str, config: Config) -> Callable:
        """The program, compiled for this call's static dims."""
        from hsa_tl.kernels_tilelang import compile

        return compile.kernel(program, self.problem, config)

    def spare_chunk(self) -> Tensor:
        """[B, T, H]: a chunk that the token chose, for its empty slots to read; -1 if it chose none."""
        return torch.where(self.indices < self.problem.N, self.indices, -1).amax(-1)


# A launcher allocates a program's outputs and returns them with what runs it, which can be run again.
Launch = tuple[Callable[[], object], dict[str, Tensor]]


def fwd_token(call: Call, config: Config) -> Launch:
    kernel = call.kernel("hsa_fwd_token", config)
    out, spare = torch.empty_like(call.q), call.spare_chunk()
    arguments = call.q, call.k, call.v, call.weights, call.indices, spare, call.chunk_len, call.scale, out
    return lambda: kernel(*arguments), {"out": out}


def fwd_union(call: Call, config: Config) -> Launch:
    p = call.problem
    kernel = call.kernel("hsa_fwd_union", config)
    index = call.kernel("union_index", UnionIndexConfig(block_M=config.block_M))
    tile = config.block_M // p.G
    tiles = -(-p.T // tile)
    out, order = torch.empty_like(call.q), torch.empty_like(call.indices)
    chunks = call.indices.new_empty(p.B, tiles, p.H, tile * p.K)
    lengths = call.indices.new_empty(p.B, tiles, p.H)
    selection = call.weights, call.indices, order, chunks, lengths

    def run():
        index(call.indices, p.N, order, chunks, lengths)
        kernel(call.q, call.k, call.v, *selection, call.chunk_len, call.scale, out)

    return run, {"out": out}


def bwd_dq_token(call: Call, config: Config) -> Launch:
    kernel = call.kernel("hsa_bwd_dq_token", config)
    dq, dweights, spare = torch.empty_like(call.q), torch.empty_like(call.weights), call.spare_chunk()
    arguments = call.q, call.k, call.v, call.weights, call.indices, spare, call.chunk_len, call.do, call.scale
    return lambda: kernel(*arguments, dq, dweights), {"dq": dq, "dweights": dweights}


def bwd_dkdv_chunk(call: Call, config: Config) -> Launch:
    kernel = call.kernel("hsa_bwd_dkdv_chunk", config)
    dk, dv = torch.empty_like(call.k), torch.empty_like(call.v)
    arguments = call.q, call.k, call.v, call.weights, *call.pairs, call.chunk_len, call.do, call.scale
    return lambda: kernel(*arguments, dk, dv), {"dk": dk, "dv": dv}


LAUNCHERS = {
    "hsa_fwd_token": fwd_token,
    "hsa_fwd_union": fwd_union,
    "hsa_bwd_dq_token": bwd_dq_token,
    "hsa_bwd_dkdv_chunk": bwd_dkdv_chunk,
}


def forward(q, k, v, weights, indices, pairs, chunk_len, scale, config=None):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    call = Call.of(q, k, v, weights, indices, pairs, chunk_len, scale)
    ((program, chosen),) = strategy.programs("forward", call.problem, indices, config)
    run, outputs = LAUNCHERS[program](call, chosen)
    run()
    return outputs["out"].flatten(2, 3)


def backward(do, q, k, v, weights, indices, pairs, chunk_len, scale, config=None, deterministic=False):
    """dq, dk, dv, dweights. See hsa_tl.ops for the arguments."""
    if not q.numel():
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, weights))
    call = Call.of(q, k, v, weights, indices, pairs, chunk_len, scale, do)
    gradients = {}
    for program, chosen in strategy.programs("backward", call.problem, indices, config, deterministic):
        run, outputs = LAUNCHERS[program](call, chosen)
        run()
        gradients |= outputs
    dq, dweights = gradients["dq"].flatten(2, 3), gradients["dweights"].flatten(2, 3)
    return dq, gradients["dk"], gradients["dv"], dweights
