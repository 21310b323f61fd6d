"""`selected_attention`: its algebra as hypothesis properties on every implementation, merging, mean keys, retrieval."""

import functools
import math
from dataclasses import replace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import (
    TYPES,
    Dims,
    assert_all_accurate,
    attend,
    calls,
    check,
    check_selected,
    dims,
    each_end,
    hard_calls,
    make_call,
    property_of_each_impl,
    run,
    seeds,
    without_weights,
)
from test_attention import PACKED, make_packed
from tiers import tiered

from hsa_tl import chunk_means, hsa_attention, merge_attention, retrieve_chunks, selected_attention
from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.bench.baselines import dense_oracle
from hsa_tl.kernels_tilelang.config_base import ChunkConfig
from hsa_tl.model import attention
from hsa_tl.oracle import expect_selected, selected_oracle
from hsa_tl.testing import SelectedInputs, assert_attention, check_attention, run_with_gradients

S = 16
EXAMPLES = {"reference": 40, "tilelang": 4, "tilelang-selected-union": 4, "triton": 3}
property_of_each = functools.partial(property_of_each_impl, EXAMPLES, {"reference": 25, "tilelang": 2, "triton": 1})
identity_of_each = functools.partial(property_of_each_impl, EXAMPLES, {"reference": 25})
scales = st.sampled_from((None, 0.0, 1.5, 40.0))


def doubled(call: SelectedInputs) -> SelectedInputs:
    return SelectedInputs(*(x.double() if x.is_floating_point() else x for x in call))


@property_of_each(call=calls, scale=scales)
def test_equals_the_oracle(impl, call, scale):
    check(impl, without_weights(call), scale=scale)


@property_of_each(drawn=hard_calls((torch.float32,), {"HQ": 3, "D": 16, "K": 3}))
def test_hard_calls(impl, drawn):
    call, chunk_size = drawn
    check(impl, without_weights(call), chunk_size=chunk_size)


@hypothesis.settings(max_examples=300)
@hypothesis.given(hard_calls())
def test_the_reference_passes(drawn):
    """In every type; two thirds of the scores are so large that rows are shifted."""
    call, chunk_size = drawn
    check("reference", without_weights(call), chunk_size=chunk_size)


@identity_of_each(call=calls, scale=scales, seed=seeds)
def test_slots_may_be_permuted_and_repeated(impl, call, scale, seed):
    """To the bit."""
    call = without_weights(call)
    want = run(impl, call, scale=scale)
    g = torch.Generator().manual_seed(seed)
    twice = torch.cat([call.indices, call.indices, torch.full_like(call.indices[..., :1], -1)], -1)
    order = torch.rand(twice.shape, generator=g).argsort(-1)
    got = run(impl, call._replace(indices=twice.gather(-1, order)), scale=scale)
    assert all(torch.equal(got[name], want[name]) for name in want)


@each_end
@pytest.mark.parametrize("impl", tiered(tuple(EXAMPLES), quick=("reference",)))
def test_dims(impl, dims):
    """Up to 30 s of compiling for the host, or of Triton's interpreter."""
    check_selected(impl, dims)


@pytest.mark.parametrize("impl", EXAMPLES)
@pytest.mark.parametrize("bits", (200, -200))
def test_scores_whose_power_of_two_is_out_of_range(impl, bits):
    call = without_weights(make_call(Dims(T=9)))
    q, k = torch.zeros_like(call.q), call.k.round()
    q[..., 0] = 1
    k[..., 0] += bits
    check(impl, call._replace(q=q, k=k), scale=math.log(2))


def test_dq_may_be_added_atomically():
    call = without_weights(make_call(Dims()))
    actual = run("tilelang", call, config={"selected_bwd_chunk": {"reduce_add": 1}})
    assert_attention(actual, call, chunk_size=S)


def test_ctas_may_split_a_chunk(monkeypatch):
    monkeypatch.setattr(ChunkConfig, "splits", lambda config, problem: 3)
    call = without_weights(make_call(Dims()))
    assert_attention(run("tilelang", call, config={"selected_bwd_chunk": {}}), call, chunk_size=S)


def _dense(q, k, v, indices, chunk_size):
    """Causal attention to all chunks but the token's own."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bths", q, k.repeat_interleave(G, 2)) / math.sqrt(q.shape[3])
    chunk = torch.arange(T) // chunk_size
    s = s.masked_fill((chunk[:, None] <= chunk)[:, None], -torch.inf)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True,
                                         attn_mask=chunk[:, None] > chunk).transpose(1, 2)  # fmt: skip
    past = torch.arange(T) >= chunk_size  # of a row without keys PyTorch's gradients are NaN
    return torch.where(past[:, None, None], out, 0.0), s[:, chunk_size:].logsumexp(-1)


@identity_of_each(T=st.integers(17, 70), dims=st.sampled_from(({"HQ": 4, "H": 2}, {"HQ": 3})), seed=seeds)
def test_every_past_chunk_is_dense_causal_attention_outside_the_own_chunk(impl, T, dims, seed):
    call = make_call(Dims(T=T, T_kv=T, K=-(-T // S), **dims), seed)
    slots = torch.arange(call.indices.shape[3])
    indices = torch.where(slots < torch.arange(T)[:, None, None] // S, slots, -1).int().expand_as(call.indices)
    call = without_weights(call._replace(indices=indices.contiguous()))
    expected = expect_selected(*call, chunk_size=S)
    leaves = [x.requires_grad_() for x in doubled(call)[:3]]
    out, lse = _dense(*leaves, indices, S)
    gradients = torch.autograd.grad((out, lse), leaves, (call.do.double(), call.dlse[:, S:].double()))
    lse = torch.cat([torch.full_like(call.dlse[:, :S], -torch.inf), lse], 1)
    dense = dict(zip(SelectedInputs.RESULTS, (out, lse, *gradients), strict=True))
    actual = run(impl, call)
    assert_all_accurate(actual, {name: replace(expected[name], value=x.detach()) for name, x in dense.items()})


@identity_of_each(d=dims(), seed=seeds)
def test_hsa_with_weights_of_the_chunks_lse_gives_the_same_out(impl, d, seed):
    """Identity 1: each chunk's own lse is that of a selection of it alone."""
    call = make_call(d, seed)
    order = torch.rand(d.B, d.T, d.H, max(d.N, d.K), generator=torch.Generator().manual_seed(seed)).argsort(-1)
    indices = torch.where(order < d.N, order, -1)[..., : d.K].int().contiguous()
    attention = attend(impl, selected_attention)
    lses = [attention(*call[:3], indices[..., i : i + 1].contiguous(), chunk_size=S)[1] for i in range(d.K)]
    weights = merge_weights(torch.stack(lses, -1))
    out = hsa_attention(*call[:3], weights, indices, chunk_size=S, impl=impl.split("-")[0])
    call = without_weights(call)._replace(indices=indices)
    assert_attention({"out": out, "lse": torch.stack(lses, -1).logsumexp(-1)}, call, chunk_size=S)


def merge_weights(lses):
    """softmax over the last dim, 0 where nothing is finite."""
    return torch.softmax(lses, -1).nan_to_num(0.0)


@identity_of_each(call=calls, scale=st.sampled_from((None, 40.0)), seed=seeds)
def test_two_disjoint_selections_merge_to_their_union(impl, call, scale, seed):
    """Out, lse and all gradients, those through lse included."""
    call = without_weights(call)
    first = torch.rand(call.k.shape[1] // S + 1, generator=torch.Generator().manual_seed(seed)) < 0.5

    def merged(q, k, v, indices, **options):
        parts = (first[indices.long()], ~first[indices.long()])
        return merge_attention(
            *(attend(impl, selected_attention)(q, k, v, torch.where(x, indices, -1), **options) for x in parts)
        )

    results = run_with_gradients(merged, call, chunk_size=S, scale=scale)
    assert_attention(results, call, chunk_size=S, scale=scale)


@identity_of_each(call=calls)
def test_heads_at_once_equal_separate_calls(impl, call):
    call = without_weights(call)
    H = call.k.shape[2]
    split = lambda x: x.unflatten(2, (H, -1)).unbind(3)  # noqa: E731
    parts = [
        run(impl, call._replace(q=q, do=do, dlse=dlse))
        for q, do, dlse in zip(*map(split, (call.q, call.do, call.dlse)), strict=True)
    ]
    separate = {name: torch.stack([p[name] for p in parts], 3).flatten(2, 3) for name in ("out", "lse", "dq")}
    separate |= {name: sum(p[name] for p in parts) for name in ("dk", "dv")}
    assert_attention(separate, call, chunk_size=S)


@identity_of_each(T=st.integers(17, 50), seed=seeds, root=st.sampled_from((1.0, 8.0)), data=st.data())
def test_causality(impl, T, seed, root, data):
    """Tokens at positions >= p, whatever they hold, NaN too, change nothing before p, to the bit."""
    p = data.draw(st.integers(1, T - 1), label="p")
    x = root * torch.randn(1, T, 2, 16, generator=torch.Generator().manual_seed(seed))

    def layer(x):
        kv = x[:, :, :1]
        _, indices = retrieve_chunks(kv.flip(-1), chunk_means(kv, S), 2, chunk_size=S)
        return *attend(impl, selected_attention)(x, kv, kv.roll(3, -1), indices, chunk_size=S), indices

    want = layer(x)
    for value in (1e4, torch.nan):
        changed = x.clone()
        changed[:, p:] = value
        assert all(torch.equal(a[:, :p], b[:, :p]) for a, b in zip(layer(changed), want, strict=True)), value


def test_a_wrong_result_is_caught():
    """Each of these faults, in one place of one result."""
    call = without_weights(make_call(Dims(T=60, T_kv=60, HQ=4, H=2)))
    right = run("reference", call)
    assert check_attention(right, call, chunk_size=S) == []
    for name, x in right.items():
        wrong = x.clone()
        at = tuple(wrong.isfinite().nonzero()[77])
        wrong[at] += 1e-4 * (1 + wrong[at].abs())
        assert check_attention({name: wrong}, call, chunk_size=S), name
    chosen_twice = call._replace(indices=call.indices[..., :1].expand_as(call.indices).contiguous())
    as_hsa = hsa_attention(*call[:3], torch.ones(1, 60, 2, 3), chosen_twice.indices, chunk_size=S)
    assert check_attention({"out": as_hsa}, chosen_twice, chunk_size=S)
    without_lse = run("reference", call._replace(dlse=torch.zeros_like(call.dlse)))
    assert check_attention({"dk": without_lse["dk"]}, call, chunk_size=S)


# --- merge_attention -------------------------------------------------------------------------------------------------


def _parts(n, empty, dtype=torch.float32):
    """n parts of which each row is without keys with probability `empty`, its out then NaN."""
    parts = []
    for _ in range(n):
        none = torch.rand(2, 9, 3) < empty
        out, lse = torch.randn(2, 9, 3, 8).to(dtype), 50 * torch.randn(2, 9, 3)
        parts.append((out.masked_fill(none[..., None], torch.nan), lse.masked_fill(none, -torch.inf)))
    return parts


def _merged(*tensors):
    """The equations as they stand, of outs and then lses, rows without keys being 0."""
    outs, lses = (torch.stack(x, -1) for x in (tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]))
    weights = torch.softmax(lses, -1)
    return (outs.nan_to_num(nan=0.0) * weights[..., None, :]).sum(-1), lses.logsumexp(-1)


@pytest.mark.parametrize("n", (1, 2, 5))
def test_merge_equals_its_equations(n):
    """Where no row is empty in all parts."""
    parts = _parts(n, 0.3)
    parts[0] = (torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3))
    tensors = [x for kind in zip(*parts, strict=True) for x in kind]
    wanted = expect(_merged, *tensors)
    for x, y in zip(merge_attention(*parts), wanted, strict=True):
        assert_accurate("merged", x, y)


@pytest.mark.parametrize("empty", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("dtype", TYPES)
def test_merge_gives_no_nan(empty, dtype):
    """Where some or all parts are without keys: neither in results nor in gradients."""
    parts = _parts(3, empty, dtype)
    leaves = [x.requires_grad_() for part in parts for x in part]
    out, lse = merge_attention(*parts)
    none = torch.stack([lse for _, lse in parts]).isinf().all(0)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out[none] == 0).all() and torch.equal(lse == -torch.inf, none)
    for x in torch.autograd.grad((out, lse), leaves, (torch.randn(out.shape).to(dtype), torch.randn(lse.shape))):
        assert x.isfinite().all()
    assert out.isfinite().all() and not lse.isnan().any()


def test_an_infinite_part_takes_all_or_shares_it_with_another_and_has_no_nan():
    lses = torch.tensor([[torch.inf, torch.inf, 0.0], [1.0, torch.inf, 0.0]]).requires_grad_()
    outs = torch.tensor([[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]).requires_grad_()
    out, lse = merge_attention(*zip(outs[..., None], lses, strict=True))
    assert out.flatten().tolist() == [2.0, 3.0, 3.0] and lse[:2].tolist() == [torch.inf] * 2
    douts, dlses = torch.autograd.grad((out.sum(), lse.sum()), (outs, lses))
    assert douts.tolist() == [[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]]
    assert dlses.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]  # 1/2 of lse and a share in out of 2 - 3 and of 4 - 3


def test_merge_has_the_right_gradients():
    out, lse = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    lse[0, 0] = lse[1] = -torch.inf  # of one part, and of all but the last
    fixed = torch.randn(4, 5).double(), torch.randn(4).double()
    finite = lse.isfinite()

    def f(out, values):
        lses = lse.masked_scatter(finite, values)
        return merge_attention(*zip(out, lses, strict=True), fixed)

    leaves = out.requires_grad_(), lse[finite].clone().requires_grad_()
    assert torch.autograd.gradcheck(f, leaves)


def test_merge_of_one_part_and_of_none():
    part = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2)
    for x, y in zip(merge_attention(part), part, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="parts must hold at least one pair"):
        merge_attention()
    with pytest.raises(TypeError, match=r"parts\[1\] must be a pair \(out, lse\), got Tensor"):
        merge_attention(part, part[0])


def _by_flash(q, k, v):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _by_flex(q, k, v):
    return attention.flex(q, k, v, None, with_lse=True)


@pytest.mark.parametrize("own", (_by_flash, _by_flex))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_flash_and_flex_attention_return_is_a_part(own):
    """Of the last chunk's tokens that chunk, merged with all chunks before it: dense causal attention."""
    q, k, v = torch.randn(3, 1, 4 * S, 2, 16)
    last = slice(3 * S, None)
    chunks = torch.arange(3, dtype=torch.int32).expand(1, S, 2, 3).contiguous()
    far = selected_attention(q[:, last], k[:, : 3 * S], v[:, : 3 * S], chunks, chunk_size=S)
    out, _ = merge_attention(own(q[:, last], k[:, last], v[:, last]), far)
    assert_accurate("out", out, expect(lambda *x: dense_oracle(*x, chunk_size=S)[:, last], q, k, v))


# --- Mean keys, retrieval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("T", (0, 1, 16, 39))
def test_chunk_means(T, dtype):
    k = torch.randn(2, T, 3, 8).to(dtype).requires_grad_()
    means = chunk_means(k, S)
    want = [x.double().mean(1) for x in k.split(S, 1)] if T else []
    assert means.dtype == dtype and means.shape == (2, -(-T // S), 3, 8)
    for i, x in enumerate(want):
        # A float32 sum, of which a 16-bit type rounds the mean once.
        torch.testing.assert_close(means[:, i].double(), x, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    if T:
        do = torch.randn(means.shape).to(dtype)
        (gradient,) = torch.autograd.grad(means, k, do)
        length = torch.tensor([min(S, T - t // S * S) for t in range(T)])[:, None, None]
        torch.testing.assert_close(gradient, (do.repeat_interleave(S, 1)[:, :T].double() / length).to(dtype))


@pytest.mark.parametrize("by", ("group", "head"))
def test_retrieval_by_mean_key(by):
    """The queries of a group summed, R = H, or each head's own, R = HQ: a token finds the chunk that it asks for."""
    B, T, HQ, H, D = 1, 160, 4, 2, 32
    G, N = HQ // H, T // S
    topics = F.normalize(torch.randn(N, H, D), dim=-1)  # what the keys of each chunk have in common
    k = 4 * topics.repeat_interleave(S, 0)[None] + 0.1 * torch.randn(B, T, H, D)
    wanted = (torch.arange(T) // S * torch.rand(T)).long().clamp(max=N - 1)  # a past chunk, for tokens that have one
    q = 4 * topics[wanted].repeat_interleave(G, 1)[None] + 0.1 * torch.randn(B, T, HQ, D)
    means = chunk_means(k, S)
    q_slc, landmarks = (q, means.repeat_interleave(G, 2)) if by == "head" else (q.unflatten(2, (H, G)).sum(3), means)
    scores, indices = retrieve_chunks(q_slc, landmarks, 1, chunk_size=S)
    assert scores.shape[2] == (HQ if by == "head" else H)
    assert (indices[0, S:, :, 0] == wanted[S:, None]).all() and (indices[0, :S] == -1).all()
    if by == "head":  # selections are per key/value head: each query head as one of its own
        k = k.repeat_interleave(G, 2)
    out, lse = selected_attention(q, k, k, indices, chunk_size=S)
    assert F.cosine_similarity(out[0, S:], topics[wanted[S:]].repeat_interleave(G, 1), dim=-1).min() > 0.99
    assert_attention({"out": out, "lse": lse}, SelectedInputs(q, k, k, indices, out, lse), chunk_size=S)


@pytest.mark.parametrize("lengths", tiered(PACKED, quick=("lengths",)))
def test_validate_takes_what_retrieval_gives(lengths):
    """Packed too; a chunk that is not past is refused."""
    call, cu_seqlens = make_packed(lengths)
    means = torch.cat([chunk_means(x, S) for x in call.k.split(lengths, 1)], 1)
    _, indices = retrieve_chunks(call.q[:, :, :1], means, 2, chunk_size=S, cu_seqlens=cu_seqlens)
    options = {"chunk_size": S, "cu_seqlens": cu_seqlens, "validate": True}
    selected_attention(*call[:3], indices, **options)
    with pytest.raises(ValueError, match="indices must name whole chunks in the past"):
        selected_attention(*call[:3], torch.zeros_like(indices), **options)


def test_16_bit_lse_is_float32():
    call = make_call(Dims(T_kv=41))
    for dtype in (torch.bfloat16, torch.float16):
        out, lse = selected_attention(*(x.to(dtype) for x in call[:3]), call.indices, chunk_size=S)
        want = selected_oracle(*(x.to(dtype).double() for x in call[:3]), call.indices, chunk_size=S)[1]
        assert out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(lse, want.float(), rtol=1e-5, atol=1e-5)
