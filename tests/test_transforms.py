"""torch.func: reverse mode and vmap give eager's numbers; what has no formula raises by name, never 0 in silence."""

import pytest
import torch
from strategies import Dims, make_call
from torch.autograd import forward_ad

from hsa_tl import (
    hsa_attention,
    hsa_decode,
    merge_attention,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
)
from hsa_tl.testing import run_with_gradients

S = 16


def attention_case():
    call = make_call(Dims(T=20, T_kv=40, HQ=4, H=2))
    return call, lambda *x: hsa_attention(*x, call.indices, chunk_size=S)


def joined(out, lse):
    """Both outputs in one tensor, finite."""
    return torch.cat([out, lse.nan_to_num(neginf=0.0)[..., None]], -1)


def selected_case():
    call = make_call(Dims(T=20, T_kv=40, HQ=4, H=2))
    return call[:3], lambda *x: joined(*selected_attention(*x, call.indices, chunk_size=S))


def selected_decode_case():
    (q, k, v, _), _ = decode_case()
    indices, table = torch.tensor([[[[0, 2], [1, 1]]]], dtype=torch.int32), torch.tensor([[2, 0, 1]]).int()
    return (q, k, v), lambda *x: joined(*selected_decode(*x, indices, table))


def retrieval_case():
    inputs = torch.randn(1, 70, 2, 8), torch.randn(1, 4, 2, 8), torch.rand(2)
    return inputs, lambda q, m, r: retrieve_chunks(q, m, 2, chunk_size=S, recency=r)[0].nan_to_num(neginf=0)


def decode_case():
    pages, table = torch.randn(3, S, 2, 16), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    indices = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    inputs = torch.randn(1, 1, 4, 16), pages, pages.clone(), torch.rand(1, 1, 2, 2)
    return inputs, lambda *x: hsa_decode(*x, indices, table)


def retrieve_decode_case():
    lengths = torch.tensor([40], dtype=torch.int32)
    inputs = torch.randn(1, 1, 2, 8), torch.randn(1, 3, 2, 8)
    return inputs, lambda *x: retrieve_decode(*x, lengths, 2, chunk_size=S)[0].nan_to_num(neginf=0)


def leaves_of(inputs):
    return tuple(x.detach() for x in inputs[: 4 if len(inputs) > 2 else 2])


CASES = {
    "hsa_attention": attention_case, "retrieve_chunks": retrieval_case, "hsa_decode": decode_case,
    "retrieve_decode": retrieve_decode_case, "selected_attention": selected_case,
    "selected_decode": selected_decode_case,
}  # fmt: skip
FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, x, tuple(map(torch.ones_like, x))),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda y: f(y, *x[1:]).sum((1, 2, 3)))(x[0]),
    "jvp of vmap": lambda f, x: torch.func.jvp(lambda y: torch.vmap(lambda z: f(z, *x[1:]))(y[None]), (x[0],), (x[0],)),
    "vmap of jvp": lambda f, x: torch.vmap(
        lambda z: torch.func.jvp(lambda y: f(y, *x[1:]), (z,), (torch.ones_like(z),))[1]
    )(x[0][None]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_raises_by_name(name, transform):
    inputs, f = CASES[name]()
    with pytest.raises(NotImplementedError, match=f"^{name} has no forward-mode derivative .*: use reverse mode"):
        FORWARD[transform](f, leaves_of(inputs))


@pytest.mark.parametrize("name", CASES)
def test_dual_numbers_raise_by_name(name):
    """And a level that no input takes part in changes nothing."""
    inputs, f = CASES[name]()
    x = leaves_of(inputs)
    want = f(*x)
    with forward_ad.dual_level():
        assert torch.equal(f(*x), want)
        with pytest.raises(NotImplementedError, match=f"^{name} has no forward-mode derivative"):
            f(*x[:-1], forward_ad.make_dual(x[-1], torch.ones_like(x[-1])))


@pytest.mark.parametrize("name", ("hsa_attention", "retrieve_chunks", "selected_attention"))
def test_reverse_mode_equals_eager(name):
    inputs, f = CASES[name]()
    x = leaves_of(inputs)
    eager = [y.clone().requires_grad_() for y in x]
    out = f(*eager)
    do = torch.randn_like(out)
    want = torch.autograd.grad(out, eager, do)
    got = torch.func.grad(lambda *y: (f(*y) * do).sum(), argnums=tuple(range(len(x))))(*x)
    value, vjp = torch.func.vjp(f, *x)
    assert torch.equal(value, out)
    for a, b, c in zip(got, vjp(do), want, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
    rows = torch.func.jacrev(lambda y: (f(y, *x[1:]) * do).sum((0, 2, 3))[-2:])(x[0])
    whole = torch.func.grad(lambda y: (f(y, *x[1:]) * do).sum((0, 2, 3))[-2:].sum())(x[0])
    torch.testing.assert_close(rows.sum(0), whole)


@pytest.mark.parametrize("order", ("vmap of grad", "grad of vmap"))
def test_gradients_of_each_sample(order):
    calls = [make_call(Dims(T=20, T_kv=40, HQ=4, H=2)) for _ in range(3)]
    q, k, v, weights, indices, do = (torch.stack(x) for x in zip(*calls, strict=True))

    def loss(q, k, v, weights, indices, do):
        return (hsa_attention(q, k, v, weights, indices, chunk_size=S) * do).sum()

    everything = (q, k, v, weights, indices, do)
    if order == "vmap of grad":
        got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*everything)
    else:
        got = torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), argnums=(0, 1, 2, 3))(*everything)
    for i, call in enumerate(calls):
        want = run_with_gradients(hsa_attention, call, chunk_size=S)
        for a, b in zip(got, list(want.values())[1:], strict=True):
            torch.testing.assert_close(a[i], b)


def test_vmap_equals_a_loop():
    calls = [make_call(Dims(T=20, T_kv=40, HQ=4, H=2)) for _ in range(3)]
    stacked = [torch.stack(x) for x in list(zip(*calls, strict=True))[:5]]
    got = torch.vmap(lambda *x: hsa_attention(*x, chunk_size=S))(*stacked)
    assert all(torch.equal(a, hsa_attention(*c[:5], chunk_size=S)) for a, c in zip(got, calls, strict=True))


@pytest.mark.parametrize("name", ("hsa_attention", "retrieve_chunks", "selected_attention"))
def test_second_derivatives_raise_by_name(name):
    inputs, f = CASES[name]()
    x = leaves_of(inputs)
    square = lambda *y: f(*y).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=f"^{name} has no second derivative"):
        torch.func.grad(lambda y: torch.func.grad(square)(y, *x[1:]).square().sum())(x[0])
    with pytest.raises(NotImplementedError, match=f"^{name} has no (second|forward-mode) derivative"):
        torch.func.hessian(lambda y: square(y, *x[1:]))(x[0])


INSTEAD = {
    "hsa_decode": "hsa_attention", "retrieve_decode": "retrieve_chunks", "selected_decode": "selected_attention",
}  # fmt: skip


@pytest.mark.parametrize("name, instead", INSTEAD.items())
def test_gradients_of_inference_raise_by_name(name, instead):
    inputs, f = CASES[name]()
    x = leaves_of(inputs)
    with pytest.raises(NotImplementedError, match=f"^{name} is for inference and has no gradient: use {instead}"):
        torch.func.grad(lambda y: f(y, *x[1:]).sum())(x[0])


def test_selected_under_vmap():
    """Values, and gradients of each sample, through the merge with another part too."""
    calls = [make_call(Dims(T=20, T_kv=40, HQ=4, H=2)) for _ in range(3)]
    q, k, v, indices, do = (torch.stack([getattr(c, name) for c in calls]) for name in ("q", "k", "v", "indices", "do"))

    def loss(q, k, v, indices, do):
        part = selected_attention(q, k, v, indices, chunk_size=S)
        out, lse = merge_attention(part, (do, do[..., 0]))
        return (out * do).sum() + lse.sum()

    values = torch.vmap(lambda *x: joined(*selected_attention(*x, chunk_size=S)))(q, k, v, indices)
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, indices, do)
    for i, call in enumerate(calls):
        leaves = [x.clone().requires_grad_() for x in call[:3]]
        want = torch.autograd.grad(loss(*leaves, call.indices, call.do), leaves)
        assert torch.equal(values[i], joined(*selected_attention(*call[:3], call.indices, chunk_size=S)))
        assert all(torch.equal(x[i], y) for x, y in zip(gradients, want, strict=True))
