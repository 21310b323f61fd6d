"""products.product: oneDNN's and PyTorch's own give a b^T, and a row the same bits whatever is beside it."""

import pytest
import torch
from strategies import Dims, make_call

from hsa_tl import hsa_attention, products
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.impl import reference
from hsa_tl.testing import assert_attention, run_with_gradients

onednn = pytest.mark.skipif(products._onednn is None, reason="this PyTorch has no oneDNN")
each_library = pytest.mark.parametrize("library", (pytest.param("onednn", marks=onednn), "own"))


@pytest.fixture
def use(library, monkeypatch):
    if library == "own":
        monkeypatch.setattr(products, "_onednn", None)


@each_library
@pytest.mark.parametrize("K, N", ((64, 64), (128, 16), (5, 7), (32, 1)))
def test_a_row_does_not_depend_on_its_company(use, K, N):
    a, b = torch.randn(1024, K), torch.randn(N, K)
    out = products.product(a, b)
    assert_accurate("product", out, expect(lambda a, b: a @ b.T, a, b))
    for rows in (16, 32, 128, 512):
        assert torch.equal(products.product(a[:rows], b), out[:rows]), rows


@each_library
def test_attention(use, monkeypatch):
    monkeypatch.setattr(reference, "_LEAST_MATRIX", 0)
    call = make_call(Dims(T=40, T_kv=41))
    assert_attention(run_with_gradients(hsa_attention, call, chunk_size=16), call, chunk_size=16)


@each_library
@pytest.mark.parametrize("G", (1, 3))
def test_a_token_does_not_depend_on_later_ones(use, G):
    """Nor its bits on whether others chose its chunk: products of one row are summed in another order."""
    call = make_call(Dims(T=40, T_kv=256, HQ=G, D=64, S=64, K=2))
    whole = hsa_attention(*call[:5], chunk_size=64)
    for T in (1, 2, 7, 20):
        q, weights, indices = (x[:, :T] for x in (call.q, call.weights, call.indices))
        assert torch.equal(hsa_attention(q, call.k, call.v, weights, indices, chunk_size=64), whole[:, :T]), T


def test_attention_multiplies_by_contiguous_matrices(monkeypatch):
    """Keys and values of one projection are views; by such a matrix oneDNN multiplies a thousand times as slowly."""

    def product(a, b):
        assert b.is_contiguous() or b.T.is_contiguous()
        return products.product(a, b)

    monkeypatch.setattr(reference, "product", product)
    monkeypatch.setattr(reference, "_LEAST_MATRIX", 0)
    call = make_call(Dims(T=40, T_kv=48))
    k, v = torch.stack([call.k, call.v], 2).unbind(2)
    run_with_gradients(hsa_attention, call._replace(k=k, v=v), chunk_size=16)
