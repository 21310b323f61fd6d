"""Launcher of the TileLang decode programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import functools

import torch

from hsa_tl.autotune import cost
from hsa_tl.impl import tilelang as launchers
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import Config
from hsa_tl.problem import Problem

PROGRAM = "hsa_decode_split"


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    return launchers.unavailable(problem, (PROGRAM,))


@functools.lru_cache(maxsize=1024)
def chosen_config(problem: Problem) -> Config:
    """The first of the space, with as many ranges of slots as fill the problem's GPU."""
    config = configs.default(PROGRAM, problem)
    if problem.device_type == "cpu":
        return config
    return config.filling(problem, cost.device_here(problem.device_index).sms)


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    problem = launchers.targeted(Problem.of_decode(q, k_pages, weights, indices, page_table))
    config = chosen_config(problem)
    splits, H = config.num_splits, k_pages.shape[2]
    q, weights = (x.contiguous().view(*x.shape[:2], H, -1, x.shape[3]) for x in (q, weights))
    k_pages, v_pages, indices, page_table = (x.contiguous() for x in (k_pages, v_pages, indices, page_table))
    out = torch.empty_like(q)
    B, T, _, G, D = q.shape
    partial = out.unsqueeze(3) if splits == 1 else q.new_empty(B, T, H, splits, G, D, dtype=torch.float32)
    launchers.compiled(PROGRAM, problem, config)(q, k_pages, v_pages, weights, indices, page_table, scale, partial)
    if splits > 1:
        combine = configs.config_of("hsa_decode_combine")(splits)
        launchers.compiled("hsa_decode_combine", problem, combine)(partial, out)
    return out.flatten(2, 3)
