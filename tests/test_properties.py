"""The identities of the operator (OPERATOR.md, section 4) as hypothesis properties, on every implementation."""

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from strategies import (
    EXAMPLES,
    QUICK_EXAMPLES,
    STRATEGIES,
    assert_all_accurate,
    attend,
    calls,
    check,
    dims,
    exact_calls,
    make_call,
    property_of_each_impl,
    run,
    seeds,
)

from hsa_tl import fusion_weights, retrieve_chunks
from hsa_tl.accuracy import expect
from hsa_tl.oracle import attention_oracle, retrieve_oracle, selected_oracle
from hsa_tl.testing import Inputs, assert_attention, run_with_gradients

S = 16
EXACT = 0.25  # the scale of exact calls
scales = st.sampled_from((None, 0.0, 1.5))
exact_or_generic = st.tuples(st.just(EXACT), exact_calls) | st.tuples(st.none(), calls)


@property_of_each_impl(
    EXAMPLES, QUICK_EXAMPLES | {"triton": 2} | dict.fromkeys(STRATEGIES, 3), call=calls, scale=scales
)
def test_equals_the_oracle(impl, call, scale):
    check(impl, call, scale=scale)


def _distinct(d, seed):
    """Indices [B, T, H, K] of min(K, N) different chunks in any order, -1 in the other slots."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(d.B, d.T, d.H, max(d.N, d.K), generator=g).argsort(-1)[..., : d.K]
    return torch.where(order < d.N, order, -1).int()


def _ordinary_attention(q, k, v, weights, indices, chunk_size):
    """Softmax attention over the keys of the chosen chunks, whatever the weights."""
    return selected_oracle(q, k, v, indices, chunk_size=chunk_size)[0] + 0 * weights.sum()


def _weights_from_chunks(q, k, indices):
    """softmax over the slots of log-sum-exp over each slot's chunk: [B, T, HQ, K]."""
    G = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(G, 2)) / math.sqrt(q.shape[3])
    lse = torch.stack([x.logsumexp(-1) for x in s.split(S, -1)], -1)
    indices = indices.repeat_interleave(G, 2)
    return fusion_weights(lse.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, -torch.inf))


@property_of_each_impl(d=dims(), seed=seeds)
def test_log_sum_exp_weights_give_ordinary_attention(impl, d, seed):
    """Out and the whole gradient, that through the weights included: so dweights is right as well."""
    call = make_call(d._replace(per_head=True), seed)._replace(indices=_distinct(d, seed))

    def chunked(attention, **options):
        def f(q, k, v, weights, indices, chunk_size):
            weights = weights * 0 + _weights_from_chunks(q, k, indices)
            return attention(q, k, v, weights, indices, chunk_size=chunk_size, **options)

        return f

    actual = run_with_gradients(chunked(attend(impl)), call, chunk_size=S)
    # The roundings are those of its own equations, the values ordinary attention's.
    wanted = expect(lambda *x: run_with_gradients(chunked(attention_oracle), Inputs(*x), chunk_size=S), *call)
    high = run_with_gradients(
        _ordinary_attention, Inputs(*(x.double() if x.is_floating_point() else x for x in call)), chunk_size=S
    )
    for result in (actual, high):
        assert (result.pop("dweights") == 0).all()  # of the argument, which the function replaces
    assert_all_accurate(actual, {name: replace(wanted[name], value=x) for name, x in high.items()})


@property_of_each_impl(call=exact_calls, seed=seeds)
def test_linear_in_weights(impl, call, seed):
    """In exact arithmetic, so bitwise; dk is 0 as q is."""
    other = torch.randint(-4, 5, call.weights.shape, generator=torch.Generator().manual_seed(seed)).float()
    one, two, both = (
        run(impl, call._replace(weights=w), scale=EXACT) for w in (call.weights, other, 2 * call.weights - 3 * other)
    )
    for name in ("out", "dq", "dv"):
        assert torch.equal(both[name], 2 * one[name] - 3 * two[name]), name
    assert torch.equal(both["dweights"], one["dweights"])


@property_of_each_impl(case=exact_or_generic, seed=seeds)
def test_order_of_slots_does_not_matter(impl, case, seed):
    scale, call = case
    order = torch.randperm(call.indices.shape[3], generator=torch.Generator().manual_seed(seed))
    moved = call._replace(weights=call.weights[..., order], indices=call.indices[..., order])
    actual = run(impl, moved, scale=scale)
    actual["dweights"] = actual["dweights"][..., order.argsort()]
    if scale == EXACT:
        still = run(impl, call, scale=scale)
        assert all(torch.equal(actual[name], still[name]) for name in still)
    else:
        assert_attention(actual, call, chunk_size=S)


@property_of_each_impl(case=exact_or_generic, seed=seeds)
def test_weight_zero_equals_empty_slot(impl, case, seed):
    scale, call = case
    off = torch.rand(call.indices.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    of_weights = off.repeat_interleave(call.weights.shape[2] // off.shape[2], 2)
    zero = run(impl, call._replace(weights=call.weights.masked_fill(of_weights, 0.0)), scale=scale)
    del zero["dweights"]  # the gradient of a weight that is 0 is not 0, that of an empty slot is
    empty = call._replace(indices=call.indices.masked_fill(off, -1))
    if scale == EXACT:
        other = run(impl, empty, scale=scale)
        assert (other["dweights"][of_weights] == 0).all()
        assert all(torch.equal(zero[name], other[name]) for name in zero)
    else:
        assert_attention(zero, empty, chunk_size=S)


def _block(x, retrieve, attention, topk=3, **options):
    """A layer in small: heads, landmarks and retrieval queries all come from the same tokens x [B, T, D]."""
    _, T, _ = x.shape
    N = -(-T // S)
    heads = torch.stack([x, -x, x.roll(1, -1)], 2)  # [B, T, 3, D]
    padded = torch.nn.functional.pad(x, (0, 0, 0, N * S - T)).unflatten(1, (N, S))
    landmarks = padded.sum(2)[:, :, None]
    scores, indices = retrieve(x.flip(-1)[:, :, None].contiguous(), landmarks, topk, chunk_size=S)
    kv = x[:, :, None].contiguous()
    out = attention(heads, kv, kv.roll(3, -1), fusion_weights(scores), indices, chunk_size=S, **options)
    return out, indices


@property_of_each_impl(T=st.integers(17, 50), seed=seeds, data=st.data())
def test_causality(impl, T, seed, data):
    """Tokens at positions >= p, whatever they hold, NaN too, change no selection and no output before p."""
    p = data.draw(st.integers(1, T - 1), label="p")
    x = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(seed))
    out, indices = _block(x, retrieve_chunks, attend(impl))
    # A union tile multiplies a chunk's values for all its tokens: theirs must be finite.
    for value in (1e4,) if "union" in impl else (1e4, torch.nan):
        changed = x.clone()
        changed[:, p:] = value
        new_out, new_indices = _block(changed, retrieve_chunks, attend(impl))
        assert torch.equal(new_indices[:, :p], indices[:, :p])
        assert torch.equal(new_out[:, :p], out[:, :p]), value


@property_of_each_impl(T=st.integers(33, 50), seed=seeds)
def test_full_selection_does_not_depend_on_topk(impl, T, seed):
    """With every visible chunk selected, 3 at most, K = 3 and K = 4 agree with attention over all of them."""
    x = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(seed))

    def block(x, retrieve, attention, topk, **options):
        x = x.detach().requires_grad_()
        out, indices = _block(x, retrieve, attention, topk, **options)
        assert torch.equal((indices >= 0).sum(-1)[0, :, 0], torch.arange(T) // S)
        return {"out": out.detach(), "dx": torch.autograd.grad(out.sum(), x)[0]}

    wanted = expect(lambda y: block(y, retrieve_oracle, attention_oracle, 3), x)
    for topk in (3, 4):
        assert_all_accurate(block(x, retrieve_chunks, attend(impl), topk), wanted)


@property_of_each_impl(d=dims(({"HQ": 3, "H": 1, "D": 16, "K": 3},)), seed=seeds)
def test_heads_at_once_equal_separate_calls(impl, d, seed):
    """G query heads of a key/value head at once equal G calls with one: gradients of k and v, shared, add up."""
    call = make_call(d._replace(per_head=True), seed)
    G, H = d.HQ // d.H, d.H
    by_head = [x.unflatten(2, (H, G)) for x in (call.q, call.weights, call.do)]
    calls = [call._replace(q=q, weights=w, do=do) for q, w, do in zip(*(x.unbind(3) for x in by_head), strict=True)]
    parts = [run(impl, x) for x in calls]
    separate = {name: torch.stack([p[name] for p in parts], 3).flatten(2, 3) for name in ("out", "dq", "dweights")}
    separate |= {name: sum(p[name] for p in parts) for name in ("dk", "dv")}
    for results in (separate, run(impl, call)):
        assert_attention(results, call, chunk_size=S)
