"""Against the reference functions that others publish, where they are: fla-core installed, or a checkout named."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from strategies import Dims, assert_all_accurate, attend, make_call, without_weights

from hsa_tl import merge_attention, selected_attention
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.bench import baselines
from hsa_tl.model.moba import MixtureOfBlockAttention
from hsa_tl.oracle import expect_selected

S, K, T = 16, 3, 150
each_impl = pytest.mark.parametrize("impl", ("reference", "tilelang", "triton"))


def published(variable: str, path: str):
    """A module of the checkout that the environment variable names; it imports torch alone."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"the environment variable {variable} names no checkout")
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(root) / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_all(equation, *implementations, H):
    """Out and gradients of functions of q [2, T, 6, 16], k and v [2, T, H, 16], each against the equation."""
    q, k, v, do = (torch.randn(2, T, h, 16) for h in (6, H, H, 6))

    def results(attention, q, k, v, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, do)), strict=True))

    expected = expect(lambda *x: results(equation, *x), q, k, v, do)
    for attention in implementations:
        assert_all_accurate(results(attention, q, k, v, do), expected)


@each_impl
def test_nsa_of_flash_linear_attention(impl):
    """Its PyTorch function for the selection branch of NSA: whole chunks in the past, sixteen heads for each of k."""
    naive = pytest.importorskip("fla.ops.nsa.naive", reason="fla-core is not installed").naive_nsa_selection
    call = without_weights(make_call(Dims(T=70, T_kv=70, HQ=16, K=2)))
    score = torch.rand(1, 70, 1, 4, generator=torch.Generator().manual_seed(0))
    score[0, :, 0][torch.arange(4) >= torch.arange(70)[:, None] // S] = -1
    chosen = score.topk(2, -1)
    indices = torch.where(chosen.values >= 0, chosen.indices, -1).int()
    ours, _ = attend(impl, selected_attention)(*call[:3], indices, chunk_size=S)
    theirs = naive(*call[:3], indices.long(), block_size=S)
    theirs[:, :S] = 0  # a token without chunks is NaN there
    expected = expect_selected(*call._replace(indices=indices), chunk_size=S)["out"]
    for out in (ours, theirs):
        assert_accurate("out", out, expected)


@each_impl
def test_hils_with_its_own_selection(impl):
    """Its block-sparse attention in PyTorch: chunks chosen by their mass, beside a window that begins with a chunk."""
    naive = published(baselines.HILS, "models/NaiveBSA/naive_bsa_ref.py").naive_bsa_attention
    H, options = 2, {"chunk_size": S, "window_size": 24, "topk": K}

    def choice(q, k, v):
        """indices [B, T, H, K] and, of the window, which keys a token sees [T, T]."""
        _, found = naive(q, k, v, **options, return_aux=True)
        chunk = found["chunk_indices"].unflatten(1, (H, -1))[:, :, 0]
        empty = found["score_pool"].gather(-1, chunk) == -torch.inf
        t = torch.arange(T)
        return chunk.masked_fill(empty, -1).transpose(1, 2).int(), (t <= t[:, None]) & (t >= found["l_left"][:, None])

    def ours(q, k, v):
        indices, window = choice(q, k, v)
        assert (indices < 0).any() and (indices >= 0).all(-1).any()
        far = attend(impl, selected_attention)(q, k, v, indices.contiguous(), chunk_size=S)
        scores = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(q.shape[2] // H, 2)) / math.sqrt(q.shape[3])
        near = baselines.masked_attention(q, k, v, window), scores.masked_fill(~window[:, None], -torch.inf)
        return merge_attention(far, (near[0], near[1].logsumexp(-1)))[0]

    def equation(q, k, v):
        indices, window = choice(q, k, v)
        chosen = (indices[..., None, :] == (torch.arange(T) // S)[:, None]).any(-1).transpose(1, 2)  # [B, H, T, T]
        return baselines.masked_attention(q, k, v, (chosen | window)[:, :, None])

    check_all(equation, ours, lambda q, k, v: naive(q, k, v, **options), H=H)


def test_moba_with_its_own_selection():
    """Its clean version in PyTorch, the reference of the benchmark, and the model's layer."""
    naive = published(baselines.MOBA, "moba/moba_naive.py").moba_attn_varlen_naive
    starts, slots = torch.arange(3, dtype=torch.int32) * T, torch.zeros(1, 1, 1, K)

    def theirs(q, k, v):
        return naive(*(x.flatten(0, 1) for x in (q, k, v)), starts, T, S, K + 1).view_as(q)

    def oracle(q, k, v):
        return baselines.moba_oracle(q, k, v, slots, chunk_size=S)

    layer = MixtureOfBlockAttention(8, 6, 6, 16, chunk_size=S, topk=K)
    check_all(oracle, oracle, theirs, lambda q, k, v: layer.over(q, k, v)[0], H=6)
