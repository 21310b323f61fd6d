"""Launchers of the TileLang retrieval programs: on Hopper, and on the CPU through TileLang's C target (float32)."""

import torch

from hsa_tl.impl import tilelang as launchers
from hsa_tl.kernels_tilelang import config as configs
from hsa_tl.kernels_tilelang.config_base import MAX_TOPK
from hsa_tl.pairs import Pairs
from hsa_tl.problem import Retrieval
from hsa_tl.retrieval import empty_slots


def _chunks(number: int) -> int:
    """Within what a program's int32 can add to: 2^30 chunks are more than there are."""
    return max(-(1 << 30), min(number, 1 << 30))


def unavailable(problem: Retrieval, program: str = "retrieve_topk") -> str | None:
    """Why the program cannot run this retrieval here, or None."""
    if problem.K > MAX_TOPK:
        return f"topk must be at most {MAX_TOPK}, got {problem.K}"
    return launchers.unavailable(problem, (program,))


def decode_unavailable(problem: Retrieval) -> str | None:
    """As `unavailable`, for `retrieve_decode`."""
    return unavailable(problem, "retrieve_split")


def _slots(q_slc, topk):
    """scores and indices [B, T, R, topk], of which a program writes every slot."""
    scores = q_slc.new_empty(*q_slc.shape[:3], topk, dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int32)


def retrieve(q_slc, landmarks, topk, chunk_size, q_start, exclude_window, scale):
    """scores, indices [B, T, R, topk] of sequences that begin together; see hsa_tl.api.retrieve_chunks."""
    if not (N := landmarks.shape[1]):
        return empty_slots(q_slc, topk)
    problem, slots = launchers.targeted(Retrieval.of(q_slc, N, topk)), _slots(q_slc, topk)
    # A chunk is seen if it ends before the token and begins no later than the last token left of its window.
    past, outside = divmod(q_start, chunk_size), divmod(q_start - exclude_window, chunk_size)
    bounds = _chunks(past[0]), past[1], _chunks(outside[0] + 1), outside[1]
    kernel = launchers.compiled("retrieve_topk", problem)
    kernel(q_slc.contiguous(), landmarks.contiguous(), scale, chunk_size, *bounds, *slots)
    return slots


def retrieve_decode(q_slc, landmarks, lengths, chunks, topk, chunk_size, exclude_window, scale):
    """scores, indices [B, T, R, topk] of a few tokens of each sequence; see hsa_tl.api.retrieve_decode."""
    if not (N := landmarks.shape[1]):
        return empty_slots(q_slc, topk)
    problem, slots = launchers.targeted(Retrieval.of(q_slc, N, topk)), _slots(q_slc, topk)
    config = configs.default("retrieve_split", problem)
    splits = -(-N // config.block_N)
    best = q_slc.new_empty(*q_slc.shape[:3], splits, config.places(topk), dtype=torch.int64)
    chunks = torch.full_like(lengths, N) if chunks is None else chunks
    launchers.compiled("retrieve_split", problem, config)(
        q_slc.contiguous(), landmarks.contiguous(), lengths.contiguous(), chunks.contiguous(), scale, chunk_size,
        min(exclude_window, 2**31 - 1), best,
    )  # fmt: skip
    launchers.compiled("retrieve_combine", problem)(best, *slots)
    return slots


def dlandmarks(dscores, pairs: Pairs, q_slc, num_chunks, scale):
    """The gradient of landmarks [B, num_chunks, R, D_r], in q_slc's dtype."""
    B, R, D_r = q_slc.shape[0], *q_slc.shape[2:]
    out = q_slc.new_zeros(B, num_chunks, R, D_r)
    if dscores.numel() and num_chunks:
        problem = launchers.targeted(Retrieval.of(q_slc, num_chunks, dscores.shape[3]))
        kernel = launchers.compiled("retrieve_dlandmarks", problem)
        kernel(dscores.contiguous(), q_slc.contiguous(), *pairs, scale, out)
    return out
