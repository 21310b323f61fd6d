"""Values and sizes at the edges: infinity, NaN, beyond int32, another default type, settings that are no settings."""

import math

import pytest
import torch

from hsa_tl import (
    fusion_weights,
    hsa_attention,
    hsa_decode,
    landmark_bounds,
    retrieve_chunks,
    retrieve_decode,
    selected_attention,
    selected_decode,
    top_p_chunks,
)
from hsa_tl.testing import Inputs, check_attention, check_retrieval

IMPLS = ("reference", "tilelang", "triton")
S, FAR = 16, 2**36


def draw(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def calls(T):
    """q, k, v, weights and indices of T tokens, all but the first chunk's of which chose chunk 0."""
    indices = torch.zeros(1, T, 1, 1, dtype=torch.int32)
    indices[:, :S] = -1
    return draw(1, T, 4, 64), draw(1, T, 1, 64, seed=1), draw(1, T, 1, 64, seed=2), (indices >= 0).float(), indices


@pytest.mark.parametrize("operator", (hsa_attention, selected_attention))
def test_an_infinite_value_is_infinite_however_many_tokens_follow(operator):
    """As many pairs chose the chunk as do not fill up the last block of them."""
    found = []
    for T in (66, 67, 96):
        q, k, v, weights, indices = calls(T)
        v[0, 3, 0, 5] = math.inf
        given = (weights,) if operator is hsa_attention else ()
        out = operator(q, k, v, *given, indices, chunk_size=S)
        found.append((out if given else out[0])[:, :66])
        if given:
            assert (
                check_attention({"out": out}, Inputs(q, k, v, weights, indices, torch.ones_like(q)), chunk_size=S) == []
            )
    assert (found[0][0, S:, :, 5] == math.inf).all()
    assert all(torch.equal(found[0], x) for x in found[1:])


@pytest.mark.parametrize("operator", (hsa_attention, selected_attention))
def test_an_infinite_gradient_is_not_lost_in_what_fills_a_block_up(operator):
    q, k, v, weights, indices = calls(81)
    v.requires_grad_()
    given = (weights,) if operator is hsa_attention else ()
    out = operator(q, k, v, *given, indices, chunk_size=S)
    do = torch.ones(1, 81, 4, 64)
    do[0, -1, 0, 5] = math.inf
    (out if given else out[0]).backward(do)
    assert (v.grad[0, :S, 0, 5] == math.inf).all() and not v.grad.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_results_may_be_changed_in_place(impl):
    """As a gate or a mask does; selected_attention keeps its own for the backward, as PyTorch's softmax does."""
    q, k, v, weights, indices = calls(40)
    weights.requires_grad_()
    scores, _ = retrieve_chunks(q[:, :, :1].requires_grad_(), k[:, :2], 2, chunk_size=S, impl=impl)
    for cu_seqlens in (None, int32(0, 40)):
        out = hsa_attention(q, k, v, weights, indices, chunk_size=S, cu_seqlens=cu_seqlens, impl=impl)
        (twice,) = torch.autograd.grad(2 * out.sum(), weights, retain_graph=True)
        (found,) = torch.autograd.grad(out.mul_(2).sum(), weights)
        assert torch.equal(found, twice) and found.any()
    for kind in ("softmax", "softmax1", "stick_breaking", "joint"):
        given = fusion_weights(scores, kind, torch.zeros(1, 40, 1) if kind == "joint" else None)
        for x in given if kind == "joint" else (given,):
            x.mul_(2)
        (given[0] if kind == "joint" else given).sum().backward(retain_graph=True)
    scores.masked_fill_(scores == -math.inf, 0.0).sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight", (math.nan, math.inf, 1e38))
def test_the_gradient_of_a_weight_does_not_depend_on_it(impl, weight):
    q, k, v, weights, indices = calls(32)
    for w in (weights, weights.where(torch.arange(32)[:, None, None] != 20, weight)):
        w = w.detach().requires_grad_()
        out = hsa_attention(q, k, v, w, indices, chunk_size=S, impl=impl)
        out.backward(torch.full_like(out, 100.0))
        found = check_attention(
            {"dweights": w.grad}, Inputs(q, k, v, w, indices, torch.full_like(out, 100.0)), chunk_size=S
        )
        assert found == [] and w.grad.isfinite().all()


def test_decode_sums_chunks_before_it_rounds():
    """Two chunks whose weighted outputs are each beyond float16's range and cancel in part."""
    k_pages, q = torch.zeros(2, S, 1, 16).half(), torch.zeros(1, 1, 1, 16).half()
    v_pages = torch.full_like(k_pages, 60000.0)
    weights, table = torch.tensor([[[[3.0, -2.5]]]]), int32(0, 1)[None]
    out = hsa_decode(q, k_pages, v_pages, weights, int32(0, 1)[None, None, None], table)
    assert (out == 30000).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_retrieval_far_beyond_int32(impl):
    q, landmarks, lengths = draw(1, 2, 1, 8), draw(1, 4, 1, 8, seed=1), int32(64)
    everything = retrieve_chunks(q, landmarks, 2, chunk_size=S, q_start=64)[1]
    assert torch.equal(retrieve_chunks(q, landmarks, 2, chunk_size=S, q_start=FAR, impl=impl)[1], everything)
    for window in (2**32, FAR):
        hidden = retrieve_chunks(q, landmarks, 2, chunk_size=S, q_start=64, exclude_window=window, impl=impl)
        decoded = retrieve_decode(q, landmarks, lengths, 2, chunk_size=S, exclude_window=window, impl=impl)
        assert (hidden[1] == -1).all() and (decoded[1] == -1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_retrieval_under_another_default_type(impl):
    q, landmarks, lengths = draw(1, 32, 1, 8), draw(1, 2, 1, 8, seed=1), int32(32)

    def run():
        far = retrieve_decode(q[:, :1], landmarks, lengths, 2, chunk_size=S, impl=impl)
        return *retrieve_chunks(q, landmarks, 2, chunk_size=S, impl=impl), *far

    wanted = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(torch.equal(x, y) for x, y in zip(run(), wanted, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_that_holds_fewer_than_no_chunks(impl):
    for chunks, wanted in ((-1, [-1] * 4), (2, [0, 1, -1, -1])):
        found = retrieve_decode(
            draw(1, 1, 1, 8), draw(1, 4, 1, 8), int32(64), 4, chunk_size=S, chunks=int32(chunks), impl=impl
        )
        assert found[1].flatten().tolist() == wanted


@pytest.mark.parametrize("nan", ("query", "landmarks"))
def test_bounds_change_no_selection_with_nan(nan):
    q, landmarks, lengths = draw(1, 1, 1, 8), draw(1, 4096, 1, 8, seed=1), int32(4096 * S)
    if nan == "query":
        q.fill_(math.nan)
    else:
        landmarks[0, [100, 1000, 2000]] = math.nan
    plain, bounded = (
        retrieve_decode(q, landmarks, lengths, 16, chunk_size=S, bounds=bounds)[1]
        for bounds in (None, landmark_bounds(landmarks))
    )
    assert torch.equal(plain, bounded)


def test_bounds_are_of_the_landmarks_type():
    q, landmarks, lengths = draw(1, 1, 1, 8), draw(1, 64, 1, 8), int32(64 * S)
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match="bounds must have"):
            retrieve_decode(q, landmarks, lengths, 2, chunk_size=S, bounds=landmark_bounds(landmarks).to(dtype))
    for shape in ((0, 64, 1, 8), (1, 64, 0, 8), (1, 0, 1, 8)):
        assert landmark_bounds(torch.zeros(shape)).shape == (shape[0], shape[1] // 64, 2, *shape[2:])
    with pytest.raises(TypeError, match=r"landmarks must be a torch\.Tensor"):
        landmark_bounds([1])
    with pytest.raises(ValueError, match="landmarks must have dtype bfloat16, "):
        landmark_bounds(torch.zeros(1, 64, 1, 8, dtype=torch.int64))


def test_a_chunk_of_many_elements_is_split_evenly():
    """128 keys of 192 numbers are three times what the backward keeps in registers."""
    T, D = 256, 192
    q, k, v = (draw(1, T, 1, D, seed=i).requires_grad_() for i in range(3))
    indices = torch.full((1, T, 1, 1), -1, dtype=torch.int32)
    indices[:, 128:] = 0
    grads = []
    for impl in ("reference", "tilelang"):
        out, _ = selected_attention(q, k, v, indices, chunk_size=128, impl=impl)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "impl, config, words",
    [
        ("auto", {1: {}}, "config must have names as keys, got 1"),
        ("tilelang", {"hsa_fwd_token": {"threads": math.nan}}, "config must hold names and finite numbers, got nan"),
        ("tilelang", {"hsa_fwd_token": 5}, "config must hold a dict for each program, got 'hsa_fwd_token': 5"),
        (
            "triton",
            {"forward_kernel": {"block_M": 64}},
            r"config\['forward_kernel'\] must have no fields but .*'block_M'",
        ),
        ("triton", {"forward_kernel": {"num_splits": 2}}, r"config\['forward_kernel'\] must have no .*'num_splits'"),
    ],
)
def test_settings_that_mean_nothing(impl, config, words):
    q, k, v, weights, indices = calls(32)
    with pytest.raises(ValueError, match=words):
        hsa_attention(q, k, v, weights, indices, chunk_size=S, impl=impl, config=config)


@pytest.mark.parametrize("name, value", (("validate", "yes"), ("validate", 1), ("deterministic", "yes")))
def test_flags_are_bools(name, value):
    q, k, v, weights, indices = calls(32)
    functions = [(hsa_attention, (q, k, v, weights, indices)), (selected_attention, (q, k, v, indices))]
    if name == "validate":
        functions.append((retrieve_chunks, (q[:, :, :1], k[:, :2], 2)))
    for function, given in functions:
        with pytest.raises(TypeError, match=f"{name} must be a bool.*, got {type(value).__name__}"):
            function(*given, chunk_size=S, **{name: value})


OFFSETS = (
    [0, 32], torch.tensor([[0, 32]]).int(), torch.tensor([0, 32]), int32(5, 32), int32(0, 9), int32(0, 20, 9, 32),
)  # fmt: skip


@pytest.mark.parametrize("validate", (None, True))
@pytest.mark.parametrize("cu_seqlens", OFFSETS)
def test_offsets_are_checked_before_they_are_used(cu_seqlens, validate):
    q, k, v, weights, indices = calls(32)
    for function, given in ((hsa_attention, (weights,)), (selected_attention, ())):
        with pytest.raises((TypeError, ValueError), match="cu_seqlens must "):
            function(q, k, v, *given, indices, chunk_size=S, cu_seqlens=cu_seqlens, validate=validate)


def test_scores_of_empty_rows_are_checked_too():
    q, landmarks = draw(1, 4, 1, 8), draw(1, 1, 1, 8)
    scores, indices = retrieve_chunks(q, landmarks, 2, chunk_size=S)
    assert check_retrieval(scores, indices, q, landmarks, chunk_size=S) == []
    assert check_retrieval(torch.zeros_like(scores), indices, q, landmarks, chunk_size=S) != []


@pytest.mark.parametrize(
    "scores, options, words",
    [
        (torch.zeros(1, 2, 1, 0), {}, "scores must have a last dimension of at least one slot"),
        (torch.zeros(3), {"kind": "joint", "swa_lse": torch.tensor(0.0)}, "scores must have heads and slots"),
        (torch.zeros(1, 2, 0, 3), {"kind": "joint", "swa_lse": torch.zeros(1, 2, 0)}, "scores must have heads and"),
        (torch.zeros(1, 2, 1, 3), {"kind": ["softmax"]}, "kind must be one of "),
        (torch.zeros(1, 2, 1, 3), {"kind": "joint", "swa_lse": torch.zeros(1, 2, 1).int()}, "swa_lse must have dtype "),
    ],
)
def test_weights_of_nothing(scores, options, words):
    with pytest.raises(ValueError, match=words):
        fusion_weights(scores, **options)


def test_top_p_takes_scores_and_indices():
    x = torch.zeros(1, 1, 1, 2)
    for scores, indices, words in (
        (x, x, "indices must have dtype int32"),
        (x.int(), x.int(), "scores must have dtype"),
        (x[..., :0], x[..., :0].int(), "scores must have a last dimension of at least one slot"),
    ):
        with pytest.raises(ValueError, match=words):
            top_p_chunks(scores, indices, 0.5)


@pytest.mark.parametrize("D, G", ((6, 1), (6, 3), (10, 3), (8, 1)))
def test_rows_that_are_no_multiple_of_four_numbers(D, G):
    q, k, v, weights, indices = calls(32)
    q, k, v = (x[..., :D].contiguous().requires_grad_() for x in (q[:, :, :G], k, v))
    for operator, given, config in (
        (hsa_attention, (weights,), {"hsa_fwd_chunk": {}, "hsa_bwd_chunk": {}}),
        (selected_attention, (), None),
    ):
        found = []
        for impl, asked in (("reference", None), ("tilelang", config)):
            out = operator(q, k, v, *given, indices, chunk_size=S, impl=impl, config=asked)
            out = out if given else out[0]
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bad", (math.inf, math.nan))
def test_a_bad_key_shows_where_decode_splits_the_slots(bad):
    pages = draw(4, S, 1, 16)
    pages[1, 3] = bad
    table, indices = torch.arange(4, dtype=torch.int32)[None], torch.arange(4, dtype=torch.int32)[None, None, None]
    for impl in IMPLS:
        out, _ = selected_decode(draw(1, 1, 2, 16), pages, draw(4, S, 1, 16, seed=1), indices, table, impl=impl)
        assert out.isnan().all()


def test_more_query_heads_than_a_tile_has_rows():
    q, k, v, weights, indices = calls(32)
    q = draw(1, 32, 65, 64)
    config = {"hsa_fwd_union": {}}
    out = hsa_attention(q, k, v, weights, indices, chunk_size=S, impl="tilelang", config=config)
    assert torch.allclose(out, hsa_attention(q, k, v, weights, indices, chunk_size=S), atol=1e-5)
