"""Launcher of the TileLang decode programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import functools

import torch
from torch import Tensor

from hsa_tl.autotune import cost
from hsa_tl.impl import tilelang as launchers
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    return launchers.unavailable(problem, ("hsa_decode_split",))


@functools.lru_cache(maxsize=1024)
def chosen_config(problem: Problem, program: str) -> Config:
    """The first of the space, with as many ranges of slots as fill the problem's GPU."""
    config = configs.default(program, problem)
    if problem.device_type == "cpu":
        return config
    return config.filling(problem, cost.device_here(problem.device_index).sms)


def split_and_combine(operator: str, q, k_pages, v_pages, weights, indices, page_table, scale) -> tuple[Tensor, ...]:
    """What <operator>_split and, for several ranges of slots, <operator>_combine give: out, without weights lse too."""
    outputs = ((q.shape, q.dtype),) if weights is not None else ((q.shape, q.dtype), (q.shape[:3], torch.float32))
    H, (split, combine) = k_pages.shape[2], (f"{operator}_split", f"{operator}_combine")
    outputs = [q.new_empty(shape, dtype=dtype).unflatten(2, (H, -1)) for shape, dtype in outputs]
    problem = launchers.targeted(Problem.of(q, k_pages, weights, indices, page_table=page_table))
    config = chosen_config(problem, split)
    splits = config.num_splits
    q, weights = (x if x is None else x.contiguous().unflatten(2, (H, -1)) for x in (q, weights))
    inputs = [x.contiguous() for x in (q, k_pages, v_pages, weights, indices, page_table) if x is not None]
    partial = [x.unsqueeze(3) for x in outputs]
    if splits > 1:
        partial = [x.new_empty(*x.shape[:3], splits, *x.shape[3:], dtype=torch.float32) for x in outputs]
    launchers.compiled(split, problem, config)(*inputs, scale, *partial)
    if splits > 1:
        launchers.compiled(combine, problem, configs.config_of(combine)(splits))(*partial, *outputs)
    return tuple(x.flatten(2, 3) for x in outputs)


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    return split_and_combine("hsa_decode", q, k_pages, v_pages, weights, indices, page_table, scale)[0]
