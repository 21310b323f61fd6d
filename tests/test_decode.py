"""Decode of both operators over a paged pool, against the float64 oracle on the sequence laid out contiguously."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from strategies import Dims, make_call, seeds

from hsa_tl import hsa_attention, hsa_decode, ops, selected_attention, selected_decode
from hsa_tl.testing import Inputs, SelectedInputs, assert_attention

S = 16
EXAMPLES = {"reference": 25, "tilelang": 6, "triton": 3}
# Few static keys, since TileLang compiles a program for each: MHA, a G that is no power of two, and the paper's G.
STATIC = (
    {"HQ": 2, "H": 2, "D": 32, "K": 2},
    {"HQ": 3, "H": 1, "D": 16, "K": 3, "per_head": True},
    {"HQ": 16, "H": 1, "D": 16, "K": 2},
)


def selected(q, k_pages, v_pages, weights, indices, page_table, **options):
    """selected_decode with hsa_decode's arguments; out and lse in one tensor."""
    out, lse = selected_decode(q, k_pages, v_pages, indices, page_table, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    return torch.cat([out.to(lse.dtype), lse[..., None]], -1)


DECODES = [(decode, impl) for decode in (hsa_decode, selected) for impl in EXAMPLES]
each_decode = pytest.mark.parametrize("decode, impl", DECODES)
each_decode_and_auto = pytest.mark.parametrize("decode, impl", [*DECODES, (hsa_decode, "auto"), (selected, "auto")])


@st.composite
def dims(draw) -> Dims:
    return Dims(
        B=draw(st.integers(3, 5)), T=draw(st.integers(1, 3)), T_kv=S * draw(st.integers(1, 5)),
        **draw(st.sampled_from(STATIC)),
    )  # fmt: skip


def make_decode(d: Dims, seed: int):
    """q, k_pages, v_pages, weights, indices, page_table: ragged sequences whose pages lie anywhere and may be shared.

    Pages that no slot names hold nan.
    """
    call = make_call(d, seed)
    g = torch.Generator().manual_seed(seed)
    held = torch.randint(0, d.N + 1, (d.B,), generator=g)
    held[0] = d.N
    indices = torch.where(call.indices < held[:, None, None, None], call.indices, -1)
    pages = d.B * d.N + 2
    table = torch.randperm(pages, generator=g)[: d.B * d.N].view(d.B, d.N).int()
    table[1:, 0] = table[0, 0]  # a prefix that all sequences share
    table = torch.where(torch.arange(d.N) < held[:, None], table, -1)
    used = torch.zeros(pages, dtype=torch.bool)
    chosen = table.gather(1, indices.flatten(1).clamp(min=0).long()).view(indices.shape)[indices >= 0]
    used[chosen.long()] = True
    k, v = (torch.randn(pages, S, d.H, d.D, generator=g) for _ in range(2))
    k[~used] = v[~used] = torch.nan
    return call.q, k, v, call.weights, indices, table


def contiguous(pages, table):
    """The pages of each sequence one after the other, [B, N * S, H, D]; 0 where there is none or it holds nan."""
    x = pages[table.clamp(min=0).long()].nan_to_num(nan=0.0)
    return torch.where((table >= 0)[..., None, None, None], x, 0.0).flatten(1, 2)


def laid_out(q, k, v, weights, indices, table) -> Inputs:
    return Inputs(q, contiguous(k, table), contiguous(v, table), weights, indices, torch.zeros_like(q))


def check(decode, impl, arguments, scale=None):
    out = decode(*arguments, scale=scale, impl=impl)
    call = laid_out(*arguments)
    empty = (call.indices < 0).all(-1).repeat_interleave(call.q.shape[2] // call.k.shape[2], 2)
    if decode is selected:
        call = SelectedInputs(*call[:3], call.indices, call.do, call.do[..., 0])
        out, lse = out[..., :-1].to(call.q.dtype), out[..., -1]
        assert_attention({"lse": lse}, call, chunk_size=S, scale=scale)
        assert (lse[empty] == -torch.inf).all()
    assert out.dtype == call.q.dtype
    assert_attention({"out": out}, call, chunk_size=S, scale=scale)
    assert (out[empty] == 0).all()
    return out


@each_decode
def test_equals_the_oracle(decode, impl):
    @hypothesis.settings(max_examples=EXAMPLES[impl])
    @hypothesis.given(dims(), seeds)
    def holds(d, seed):
        check(decode, impl, make_decode(d, seed))

    holds()


@each_decode_and_auto
def test_empty_slots_duplicates_and_scale(decode, impl):
    q, k, v, weights, indices, table = make_decode(Dims(B=4, T=2, T_kv=48), 3)
    k, v = (x.nan_to_num(nan=5.0) for x in (k, v))
    indices[0, 0] = torch.tensor([2, -1, 2])
    indices[0, 1] = torch.tensor([-1, -1, 1])
    indices[1:] = -1
    out = check(decode, impl, (q, k, v, weights, indices, table), scale=0.7)
    assert (out[1:] == 0).all() and out[0].any()


@each_decode
def test_one_row(decode, impl):
    """Several programs share its slots, some of them empty ones."""
    arguments = make_decode(Dims(B=1, T=1, T_kv=48), 3)
    for indices in ([0, 1, 2], [2, 2, -1], [-1, -1, 1], [-1, -1, -1]):
        arguments = [torch.nan_to_num(x, nan=1.0) if x.is_floating_point() else x for x in arguments]
        arguments[4] = torch.tensor([[[indices]]], dtype=torch.int32)
        check(decode, impl, arguments)


@each_decode_and_auto
@pytest.mark.parametrize("T", (1, 2))
def test_scores_far_below_zero(decode, impl, T):
    """A page whose scaled scores are all below -88: no 0 / 0."""
    q, k, v, weights, indices, table = make_decode(Dims(B=4, T=T, T_kv=48), 5)
    check(decode, impl, (q.abs() * 30, -k.abs() * 30, v, weights, indices, table))


@pytest.mark.parametrize("impl", (*EXAMPLES, "auto"))
def test_equals_selected_attention(impl):
    d = Dims(B=8, T=1, T_kv=64, HQ=6, H=2, K=3)
    call = make_call(d)
    k, v = (x.unflatten(1, (d.N, S)).flatten(0, 1) for x in (call.k, call.v))
    table = torch.arange(d.B * d.N, dtype=torch.int32).view(d.B, d.N)
    results = selected_decode(call.q, k, v, call.indices, table, impl=impl)
    for x, y in zip(results, selected_attention(*call[:3], call.indices, chunk_size=S), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", (*EXAMPLES, "auto"))
def test_equals_hsa_attention(impl):
    d = Dims(B=8, T=1, T_kv=64, HQ=6, H=2, K=3)
    call = make_call(d)
    k, v = (x.unflatten(1, (d.N, S)).flatten(0, 1) for x in (call.k, call.v))
    table = torch.arange(d.B * d.N, dtype=torch.int32).view(d.B, d.N)
    out = hsa_decode(call.q, k, v, call.weights, call.indices, table, impl=impl)
    torch.testing.assert_close(out, hsa_attention(*call[:5], chunk_size=S))


@each_decode
def test_unchecked_out_of_range_is_an_empty_slot(decode, impl, monkeypatch):
    """Where indices are not validated, a bad one must neither be read nor change anything."""
    monkeypatch.setattr(ops, "check_pages", lambda *x: None)
    q, k, v, weights, indices, table = make_decode(Dims(B=4, T=1, T_kv=48), 7)
    table[:, 0] = 1 << 30
    table[:, 1] = -7
    bad = torch.where(indices == 2, indices, torch.tensor([-9, 3, 2**31 - 1], dtype=torch.int32))
    bad[1] = torch.tensor([0, 1, 2], dtype=torch.int32)
    good = torch.where(bad == 2, bad, -1)
    good = torch.where(table[:, 2].view(-1, 1, 1, 1) >= 0, good, -1)
    k, v = (x.nan_to_num(nan=1.0) for x in (k, v))
    run = lambda i: decode(q, k, v, weights, i, table, impl=impl)  # noqa: E731
    assert torch.equal(run(bad), run(good))


@each_decode
def test_the_page_past_the_last_is_not_read(decode, impl, monkeypatch):
    """An unchecked page_table may name page num_pages, where other tensors begin."""
    monkeypatch.setattr(ops, "check_pages", lambda *x: None)
    q, k, v, weights, indices, table = make_decode(Dims(B=4, T=1, T_kv=48), 7)
    k, v = (torch.cat([x.nan_to_num(nan=1.0), torch.full_like(x[:1], torch.nan)])[:-1] for x in (k, v))
    table = table.clamp(min=0)
    table[:, 1] = len(k)
    run = lambda i: decode(q, k, v, weights, i, table, impl=impl)  # noqa: E731
    assert (indices == 1).any()
    assert torch.equal(run(indices), run(torch.where(indices == 1, -1, indices)))


@pytest.mark.parametrize("decode", (hsa_decode, selected))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_types(decode, dtype):
    arguments = make_decode(Dims(B=8, T=2, T_kv=48), 9)
    arguments = [x.to(dtype) if i < 3 else x for i, x in enumerate(arguments)]
    if dtype == torch.float64:
        arguments[3] = arguments[3].double()
    check(decode, "auto", arguments)


@pytest.mark.parametrize("decode", (hsa_decode, selected))
def test_blocks_of_tokens_change_nothing(decode, monkeypatch):
    from hsa_tl.impl import reference_decode

    arguments = make_decode(Dims(B=5, T=3, T_kv=48), 11)
    whole = decode(*arguments)
    monkeypatch.setitem(reference_decode._BLOCK_ELEMENTS, "cpu", 1)
    torch.testing.assert_close(decode(*arguments), whole)


@each_decode
def test_pages_beyond_2_to_the_31_elements(decode, impl):
    """9 GB of addresses, of which the system maps only the pages that are touched."""
    pages = 2**31 // (S * 16) + 3
    pools = [torch.from_numpy(np.zeros((pages, S, 1, 16), dtype=np.float32)) for _ in range(2)]
    q, k, v, weights, indices, _ = make_decode(Dims(B=3, T=1, T_kv=48), 15)
    k, v = k[:3].clone().normal_(), v[:3].clone().normal_()
    far = torch.tensor([pages - 1, 5, pages - 2], dtype=torch.int32).expand(3, -1)
    for pool, x in zip(pools, (k, v), strict=True):
        pool[far[0].long()] = x
    near = torch.arange(3, dtype=torch.int32).expand(3, -1)
    want = decode(q, k, v, weights, indices, near, impl=impl)
    assert torch.equal(decode(q, *pools, weights, indices, far, impl=impl), want) and want.any()


@each_decode_and_auto
def test_no_tokens(decode, impl):
    q, k, v, weights, indices, table = make_decode(Dims(B=3, T=1), 0)
    none = [x[:, :0] for x in (q, weights, indices)]
    out = decode(none[0], k, v, none[1], none[2], table, impl=impl)
    assert out.shape == (3, 0, 3, 16 if decode is hsa_decode else 17)


@pytest.mark.parametrize("decode", (hsa_decode, selected))
def test_strided_inputs(decode):
    q, k, v, weights, indices, table = make_decode(Dims(B=4, T=2, T_kv=48, HQ=4, H=2, D=32, K=2), 13)
    want = decode(q, k, v, weights, indices, table)
    strided = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in (q, k, v, weights, indices, table)]
    assert not any(x.is_contiguous() for x in strided)
    for impl in ("reference", "tilelang" if decode is hsa_decode else "auto"):
        torch.testing.assert_close(decode(*strided, impl=impl), want)


@pytest.mark.parametrize("decode", (hsa_decode, selected))
def test_compiles_to_one_graph(decode):
    torch._dynamo.reset()
    arguments = make_decode(Dims(B=3, T=1, T_kv=48), 1)
    out = torch.compile(decode, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(out, decode(*arguments))


def test_is_not_differentiable():
    arguments = make_decode(Dims(B=3, T=1, T_kv=48), 1)
    arguments[0].requires_grad_()
    for decode, name in ((hsa_decode, "hsa_decode"), (selected, "selected_decode")):
        with pytest.raises(NotImplementedError, match=rf"^{name} is for inference and has no gradient"):
            decode(*arguments).sum().backward()


def _bad(decode, **changes):
    names = ("q", "k_pages", "v_pages", "weights", "indices", "page_table")
    arguments = dict(zip(names, make_decode(Dims(B=3, T=1, T_kv=48, HQ=4, H=2, K=2), 0), strict=True))
    arguments["indices"] = torch.zeros_like(arguments["indices"])
    return decode(**(arguments | changes))


def int32(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"q": torch.zeros(3, 4, 16)}, r"q must have 4 dimensions"),
        ({"k_pages": torch.zeros(0, S, 2, 16)}, r"k_pages must have shape \[num_pages >= 1, S, H >= 1, 16\]"),
        ({"k_pages": torch.zeros(4, 24, 2, 16)}, r"k_pages must have pages of 16, 32, 64 or 128 keys"),
        ({"v_pages": torch.zeros(4, S, 2, 16)}, r"v_pages must have shape .* like k_pages"),
        ({"q": torch.zeros(3, 1, 5, 16)}, r"q must have a multiple of k_pages's 2 heads, got 5 heads"),
        ({"weights": torch.zeros(3, 1, 3, 2)}, r"weights must have shape \[3, 1, 2 or 4, 2\]"),
        ({"weights": torch.zeros(3, 1, 2, 2).bfloat16()}, r"weights must have dtype torch.float32"),
        ({"indices": int32(3, 1, 4, 2)}, r"indices must have shape \[3, 1, 2, K >= 1\]"),
        ({"indices": int32(3, 1, 2, 2).long()}, r"indices must have dtype int32"),
        ({"page_table": int32(2, 3)}, r"page_table must have shape \[3, max_chunks >= 1\]"),
        ({"page_table": int32(3, 0)}, r"page_table must have shape"),
        ({"page_table": int32(3, 3).long()}, r"page_table must have dtype int32"),
        ({"page_table": int32(3, 3).to("meta")}, r"page_table must be on cpu"),
        ({"indices": int32(3, 1, 2, 2, value=3)}, r"indices must lie in \[-1, 3\).*got 3 at \[0, 0, 0, 0\]"),
        ({"indices": int32(3, 1, 2, 2, value=-2)}, r"indices must lie in \[-1, 3\)"),
        ({"page_table": int32(3, 3, value=-1)}, r"page_table must lie in \[0, 11\) .*got -1 at \[0, 0\]"),
        ({"page_table": int32(3, 3, value=11)}, r"page_table must lie in \[0, 11\) .*got 11"),
        ({"scale": float("nan")}, r"scale must be finite"),
        ({"impl": "cuda"}, r"impl must be one of"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(ValueError, match=words):
        _bad(hsa_decode, **changes)
    if "weights" not in changes:
        with pytest.raises(ValueError, match=words):
            _bad(selected, **changes)


@pytest.mark.parametrize("impl", ("tilelang", "triton"))
def test_an_implementation_that_cannot_run_says_so(impl):
    arguments = make_decode(Dims(B=3, T=1, T_kv=48), 1)
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}' cannot run"):
        hsa_decode(*(x.double() if x.is_floating_point() else x for x in arguments), impl=impl)
    with pytest.raises(NotImplementedError, match=rf"impl='{impl}' cannot run .*; use 'auto' or 'reference'"):
        selected(*(x.double() if x.is_floating_point() else x for x in arguments), impl=impl)
