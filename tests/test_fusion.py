"""fusion_weights: each kind against its formula, empty rows, huge scores, gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from hsa_tl import fusion_weights, top_p_chunks
from hsa_tl.accuracy import assert_accurate, expect

KINDS = ("softmax", "softmax1", "stick_breaking", "joint")


def formula(scores: torch.Tensor, kind: str, lse: torch.Tensor) -> torch.Tensor:
    """The weights of one row (and the window's, for joint), spelled out; -inf is an empty slot."""
    if kind == "stick_breaking":
        rest, weights = torch.ones_like(lse), []
        for x in scores.flip(0):
            weights.insert(0, torch.sigmoid(x) * rest)
            rest = rest * torch.sigmoid(-x)
        return torch.stack(weights)
    window = {"softmax": 0 * lse, "softmax1": 0 * lse + 1, "joint": lse.exp()}[kind]
    terms = torch.cat([scores.exp(), window[None]])
    weights = terms / (terms.sum() if terms.sum() > 0 else 1)
    return weights if kind == "joint" else weights[:-1]


def formulas(scores: torch.Tensor, kind: str, lse: torch.Tensor) -> torch.Tensor:
    rows = [formula(*x) for x in zip(scores.flatten(0, 2), [kind] * lse.numel(), lse.flatten(), strict=True)]
    return torch.stack(rows).unflatten(0, lse.shape)


def weights_of(scores, kind, lse):
    """All of a kind's weights, the window's last."""
    if kind != "joint":
        return fusion_weights(scores, kind)
    weights, window = fusion_weights(scores, kind, lse)
    return torch.cat([weights, window[..., None]], -1)


def make_scores(K, seed, dtype=torch.float32):
    """Scores [2, 5, 3, K] with -inf in many slots and, in the first row, in all."""
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, 5, 3, K, generator=g, dtype=dtype)
    scores.masked_fill_(torch.rand(scores.shape, generator=g) < 0.3, -torch.inf)
    scores[0, 0] = -torch.inf
    return scores, torch.randn(2, 5, 3, generator=g, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@given(K=st.integers(1, 6), seed=seeds)
def test_formula(kind, K, seed):
    scores, lse = make_scores(K, seed)
    wanted = expect(lambda *x: formulas(x[0], kind, x[1]), scores, lse)
    for dtype in (torch.float32, torch.float64):
        actual = weights_of(scores.to(dtype), kind, lse.to(dtype))
        assert actual.dtype == dtype
        assert (actual[..., :K][scores == -torch.inf] == 0).all()
        assert_accurate(kind, actual, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_sum_of_weights(kind):
    scores, lse = make_scores(6, 0, torch.float64)
    total = weights_of(scores, kind, lse).sum(-1)
    one = torch.ones_like(total)
    if kind in ("softmax", "joint"):
        full = scores.isfinite().any(-1) | (kind == "joint")
        torch.testing.assert_close(total, one.where(full, 0.0))
    else:
        assert (total < 1).all() and (total >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    scores, lse = make_scores(4, 0, torch.float64)
    empty = scores == -torch.inf

    def f(filled, lse):
        return weights_of(filled.masked_fill(empty, -torch.inf), kind, lse)

    inputs = (scores.masked_fill(empty, 0.0).requires_grad_(), lse.requires_grad_(kind == "joint"))
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_an_empty_slot_is_zero(kind):
    """Also straight at the scores of -inf, and in rows that have no other."""
    scores, lse = (x.requires_grad_() for x in make_scores(4, 0))
    weights = weights_of(scores, kind, lse)
    gradients = torch.autograd.grad(weights, (scores, lse), torch.randn_like(weights), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    assert (gradients[0][scores == -torch.inf] == 0).all()
    assert (weights[0, 0, :, :4] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", (1e4, 1e30))
def test_huge_scores_are_finite(kind, size):
    scores = size * torch.tensor([[[[1.0, -1.0, 1.0], [-1.0, -torch.inf, -1.0], [0.0, 1.0, -1.0]]]]).requires_grad_()
    for sign in (1, -1):
        lse = torch.full(scores.shape[:-1], sign * size, requires_grad=True)
        weights = weights_of(scores, kind, lse)
        (gradient,) = torch.autograd.grad(weights, scores, torch.randn_like(weights), retain_graph=True)
        assert torch.isfinite(weights).all() and torch.isfinite(gradient).all()
        assert (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-6).all()


def test_joint_window_of_nothing():
    """A window of log-sum-exp -inf leaves softmax; with no chunk either, all weights are 0."""
    scores, lse = make_scores(4, 0)
    weights, window = fusion_weights(scores, "joint", torch.full_like(lse, -torch.inf))
    assert torch.equal(weights, fusion_weights(scores)) and (window == 0).all()


def test_joint_window_per_query_head():
    """swa_lse [B, T, HQ] with HQ = 2 R: query heads 2r and 2r + 1 share retrieval head r."""
    scores, lse = make_scores(4, 0)
    wide = torch.stack([lse, lse + 1], -1).flatten(-2)
    weights, window = fusion_weights(scores, "joint", wide)
    for i in range(2):
        one, one_window = fusion_weights(scores, "joint", lse + i)
        assert torch.equal(weights[:, :, i::2], one) and torch.equal(window[:, :, i::2], one_window)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_scores_give_float32_weights(dtype):
    scores, _ = make_scores(4, 0)
    weights = fusion_weights(scores.to(dtype))
    assert torch.equal(weights, fusion_weights(scores.to(dtype).float())) and weights.dtype == torch.float32


INF = torch.inf
INFINITE = [  # kind, scores and for joint the window's log-sum-exp, weights: the limit of ever larger scores
    ("softmax", [INF, 0.0, -INF], [1.0, 0.0, 0.0]),
    ("softmax", [INF, INF, 1.0], [0.5, 0.5, 0.0]),
    ("softmax", [torch.finfo(torch.float32).min, -INF], [1.0, 0.0]),  # a filled slot, however low
    ("softmax1", [0.0, INF, 3e38], [0.0, 1.0, 0.0]),
    ("stick_breaking", [INF, 0.0, -INF], [0.5, 0.5, 0.0]),
    ("stick_breaking", [1e9, 0.0, -INF], [0.5, 0.5, 0.0]),
    ("stick_breaking", [0.0, INF, -INF], [0.0, 1.0, 0.0]),
    ("joint", [INF, 0.0, -INF, 0.0], [1.0, 0.0, 0.0, 0.0]),
    ("joint", [3e38, 0.0, -INF, INF], [0.0, 0.0, 0.0, 1.0]),
    ("joint", [INF, 0.0, -INF, INF], [0.5, 0.0, 0.0, 0.5]),
]


def of_row(kind, row):
    if kind != "joint":
        return fusion_weights(row[None, None, None], kind)[0, 0, 0]
    weights, window = fusion_weights(row[None, None, None, :-1], kind, row[None, None, -1:])
    return torch.cat([weights, window[..., None]], -1)[0, 0, 0]


@pytest.mark.parametrize("kind, row, want", INFINITE, ids=str)
def test_infinite_scores(kind, row, want):
    row = torch.tensor(row, requires_grad=True)
    got = of_row(kind, row)
    assert got.tolist() == want
    assert torch.autograd.grad(got.square().sum(), row)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind):
    """A score of NaN is no empty slot."""
    assert of_row(kind, torch.tensor([0.0, torch.nan, -INF, 1.0])).isnan().any()


@given(K=st.integers(1, 9), seed=seeds, p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_hold_p(K, seed, p):
    """Of every row: what stays holds p, is no lighter than what goes, and holds less without its lightest."""
    scores, _ = make_scores(K, seed, torch.float64)
    indices = torch.where(scores == -torch.inf, -1, torch.arange(K)).int()
    kept_scores, kept = top_p_chunks(scores, indices, p)
    weights, stays = fusion_weights(scores), kept >= 0
    assert torch.equal(kept[stays], indices[stays]) and torch.equal(kept_scores[stays], scores[stays])
    assert (kept_scores[~stays] == -torch.inf).all() and torch.equal(stays.any(-1), (indices >= 0).any(-1))
    held = (weights * stays).sum(-1)
    lightest = weights.masked_fill(~stays, torch.inf).amin(-1)
    filled = stays.any(-1)
    assert (held[filled] >= p - 1e-6).all() and (held - lightest)[filled].lt(p + 1e-6).all()
    assert (weights.masked_fill(stays, 0.0).amax(-1) <= lightest + 1e-12)[filled].all()


def test_top_p_of_equal_chunks_keeps_the_earlier_slots():
    indices = torch.arange(4, dtype=torch.int32)[None, None, None]
    assert top_p_chunks(torch.zeros(1, 1, 1, 4), indices, 0.5)[1].tolist() == [[[[0, 1, -1, -1]]]]
    assert top_p_chunks(torch.zeros(1, 1, 1, 4), indices, 1.0)[1].tolist() == [[[[0, 1, 2, 3]]]]


def test_gradients_reach_the_scores_that_stay():
    scores = torch.tensor([[[[0.0, 2.0, 3.0]]]], requires_grad=True)
    kept, _ = top_p_chunks(scores, torch.tensor([[[[4, 5, 6]]]]).int(), 0.8)
    (gradient,) = torch.autograd.grad(fusion_weights(kept)[..., 2].sum(), scores)
    assert gradient[..., 0] == 0 and gradient[..., 1] < 0 < gradient[..., 2]


@pytest.mark.parametrize("p", (0, -0.1, 1.5, float("nan")))
def test_top_p_out_of_range(p):
    with pytest.raises(ValueError, match=r"p must lie in \(0, 1\], got"):
        top_p_chunks(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2).int(), p)
    with pytest.raises(ValueError, match="indices must have scores' shape"):
        top_p_chunks(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 3).int(), 0.5)
