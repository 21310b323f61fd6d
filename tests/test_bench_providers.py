"""Adapters of others' code: each says precisely why it cannot run; a checkout is found, called and left alone."""

import dataclasses
import sys

import pytest
import torch

from hsa_tl import cases
from hsa_tl.bench import attention, baselines, providers
from hsa_tl.bench.providers import provider
from hsa_tl.model.moba import MixtureOfBlockAttention

CUDA = cases.at_length(cases.case("k16-d64").problem, 128, HQ=16, D=16, S=16, K=4)
CPU = cases.on_cpu(CUDA)


@pytest.mark.parametrize(
    "name, words",
    [
        ("dense-cudnn", "needs CUDA tensors, the problem is on cpu"),
        ("dense-flash", "needs CUDA tensors, the problem is on cpu"),
        ("dense-flex", "FlexAttention has a backward on CUDA only, the problem is on cpu"),
        ("dense-fa3", "needs CUDA tensors, the problem is on cpu"),
        ("nsa-fla", "needs CUDA tensors, the problem is on cpu"),
        ("ramstorage-triton", "the environment variable HSA_TL_RAMSTORAGE names no checkout"),
        ("ramstorage-tilelang", "the environment variable HSA_TL_RAMSTORAGE names no checkout"),
        ("hils", "the environment variable HSA_TL_HILS names no checkout"),
        ("moba", "the environment variable HSA_TL_MOBA names no checkout"),
    ],
)
def test_on_a_cpu(name, words, monkeypatch):
    for variable in (baselines.RAMSTORAGE, baselines.HILS, baselines.MOBA):
        monkeypatch.delenv(variable, raising=False)
    assert provider(name).unavailable(CPU) == words


@pytest.mark.parametrize("module", ["flash_attn_interface", "fla"])
def test_a_missing_package_is_named(module, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = {"flash_attn_interface": "dense-fa3", "fla": "nsa-fla"}[module]
    assert provider(name).unavailable(CUDA).endswith(f"is not installed: no module {module}")


def test_what_a_provider_needs_of_the_problem():
    single = dataclasses.replace(CUDA, dtype=torch.float32)
    for name in ("dense-cudnn", "dense-fa3", "nsa-fla"):
        assert provider(name).unavailable(single) == "needs bfloat16 or float16, the problem is in float32"
    assert "got 4" in provider("nsa-fla").unavailable(dataclasses.replace(CUDA, HQ=4))
    assert attention.Attention().unavailable("ramstorage-tilelang", CUDA, "train") != "it has no backward"


def test_a_wrong_checkout_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(baselines.HILS, str(tmp_path))
    words = f"HSA_TL_HILS must name a checkout with ops/hils_fwd_bwd_head.py, got {tmp_path}"
    assert provider("hils").unavailable(CUDA) == words
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "hils_fwd_bwd_head.py").write_text("import nothing_of_that_name")
    assert "does not import: ModuleNotFoundError: No module named 'nothing_of_that_name'" in provider(
        "hils"
    ).unavailable(CUDA)
    assert not [n for n in sys.modules if n.split(".")[0] == "ops"] and str(tmp_path) not in sys.path


FAKE_RAMSTORAGE = """
from hsa_tl.oracle import attention_oracle

def HSA(q, k, v, weights, indices, sm_n, chunk_size, sm_scale, reg_lamda=0.01, reg_C=50.0):
    assert (sm_n, reg_lamda, reg_C) == (0.0, 0.0, 0.0) and (indices >= 0).all()
    return attention_oracle(q, k, v, weights, indices, chunk_size=chunk_size, scale=sm_scale)
"""
FAKE_TILELANG = """
from hsa_tl.oracle import attention_oracle
from ops.hsa_triton import HSA

def hierarchical_sparse_attention(batch, heads, q_len, kv_len, head_dim, scale=None, block_size=64, groups=16,
                                  selected_blocks=16):
    return lambda q, k, v, w, i: attention_oracle(q, k, v, w, i, chunk_size=block_size)
"""
FAKE_HILS = """
from hsa_tl.oracle import attention_oracle

def HiLS_block_M_head(q, k, v, weights, indices, block_size=64, sm_scale=None, block_M=None, mask_last_token=True,
                      dtype="bfloat16", is_training=True):
    assert not mask_last_token and weights.shape[2] == q.shape[2]
    return attention_oracle(q, k, v, weights, indices, chunk_size=block_size)
"""


# Its sequences one after the other, and the current chunk among its topk.
FAKE_MOBA = """
import torch
from hsa_tl.bench.baselines import moba_oracle

def moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk):
    assert q.shape == k.shape and cu_seqlens.tolist() == [*range(0, len(q) + 1, max_seqlen)]
    slots = torch.zeros(1, 1, 1, moba_topk - 1)
    parts = (x.unflatten(0, (-1, max_seqlen)) for x in (q, k, v))
    return moba_oracle(*parts, slots, chunk_size=moba_chunk_size).flatten(0, 1)
"""


@pytest.fixture
def checkouts(monkeypatch, tmp_path):
    for variable, package, files in (
        (baselines.RAMSTORAGE, "ops", {"hsa_triton": FAKE_RAMSTORAGE, "hsa_tilelang": FAKE_TILELANG}),
        (baselines.HILS, "ops", {"hils_fwd_bwd_head": FAKE_HILS}),
        (baselines.MOBA, "moba", {"moba_efficient": FAKE_MOBA}),
    ):
        folder = tmp_path / variable / package
        folder.mkdir(parents=True)
        for name, source in files.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.setenv(variable, str(folder.parent))


@pytest.mark.parametrize("name", ["ramstorage-triton", "ramstorage-tilelang", "hils", "moba"])
def test_a_checkout_is_called_as_it_wants(name, checkouts):
    p = provider(name)
    assert p.unavailable(CUDA) is None
    assert p.unavailable(dataclasses.replace(CUDA, masked=True)) == "needs lengths that are multiples of the chunk size"
    suite = attention.Attention()
    assert suite.gate(name, suite.gate_problem(CPU)) == []
    reason = suite.unavailable(name, CUDA, "train")
    assert reason == ("it has no backward" if name == "ramstorage-tilelang" else None)
    assert not [n for n in sys.modules if n.split(".")[0] in ("ops", "moba")]


def test_the_reference_of_moba_is_the_models():
    """At a choice of one chunk in seven."""
    q, k, v = (torch.randn(2, 128, 4, 16, dtype=torch.float64) for _ in range(3))
    layer = MixtureOfBlockAttention(8, 4, 4, 16, chunk_size=16, topk=1)
    out = baselines.moba_oracle(q, k, v, torch.zeros(2, 128, 4, 1).int(), chunk_size=16)
    torch.testing.assert_close(layer.over(q, k, v)[0], out, atol=1e-6, rtol=0)  # whose sums are float32


def test_the_reference_of_nsa_is_joint_attention():
    tensors = attention.Attention().inputs(CPU, "full")
    q, k, v = (tensors[n].double() for n in "qkv")
    everything = torch.arange(8).int().expand(1, 128, 1, 8)
    out = baselines.nsa_oracle(q, k, v, everything, chunk_size=16)
    torch.testing.assert_close(out, baselines.dense_oracle(q, k, v, chunk_size=16))
    torch.testing.assert_close(
        baselines.nsa_oracle(q, k, v, tensors["indices"], chunk_size=16)[:, 0], v[:, 0].expand(-1, 16, -1)
    )


def test_flex_is_causal():
    tensors = attention.Attention().inputs(CPU, "random")
    q, k, v = (tensors[n] for n in "qkv")
    with torch.no_grad():
        _, mask = baselines._flex.__wrapped__("cpu", 128)
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, baselines.dense_oracle(q, k, v, chunk_size=16), rtol=1e-4, atol=1e-5)


def test_a_note_is_one_part_of_a_rows():
    assert not [p.name for p in providers.PROVIDERS.values() if "; " in p.note]


def test_every_provider_of_the_cpu_passes_its_gate():
    suite = attention.Attention()
    small = suite.gate_problem(CPU)
    for name in providers.DEFAULT_PROVIDERS["cpu"]:
        assert suite.gate(name, small) == [], name
