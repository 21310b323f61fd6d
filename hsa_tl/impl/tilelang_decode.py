"""Launcher of the TileLang decode programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import torch

from hsa_tl.autotune import table
from hsa_tl.impl import tilelang as launchers
from hsa_tl.kernels_tilelang.config_decode import DecodeCombineConfig, DecodeSplitConfig, preferred_splits
from hsa_tl.problem import Problem

PROGRAM = "hsa_decode_split"


def unavailable(problem: Problem) -> str | None:
    """Why the TileLang programs cannot run this problem here, or None."""
    return launchers.unavailable(problem, (PROGRAM,))


def chosen_config(problem: Problem) -> DecodeSplitConfig:
    """Of the table or the heuristic, with as many ranges of slots as fill this GPU: a row of another B fits as well."""
    config = table.resolve(PROGRAM, problem)
    if problem.device_type == "cpu":
        return config
    return DecodeSplitConfig(config.threads, config.num_stages, preferred_splits(problem))


def decode(q, k_pages, v_pages, weights, indices, page_table, scale):
    """out [B, T, HQ, D]; see hsa_tl.ops for the arguments."""
    if not q.numel():
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    problem = launchers.targeted(Problem.of_decode(q, k_pages, weights, indices, page_table))
    config = chosen_config(problem)
    splits, H = config.num_splits, k_pages.shape[2]
    q, weights = (x.unflatten(2, (H, x.shape[2] // H)).contiguous() for x in (q, weights))
    k_pages, v_pages, indices, page_table = (x.contiguous() for x in (k_pages, v_pages, indices, page_table))
    out = torch.empty_like(q)
    B, T, _, G, D = q.shape
    partial = out.unsqueeze(3) if splits == 1 else q.new_empty(B, T, H, splits, G, D, dtype=torch.float32)
    launchers.compiled(PROGRAM, problem, config)(q, k_pages, v_pages, weights, indices, page_table, scale, partial)
    if splits > 1:
        launchers.compiled("hsa_decode_combine", problem, DecodeCombineConfig(splits))(partial, out)
    return out.flatten(2, 3)
