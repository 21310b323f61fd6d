"""Attention "selected" against its rule in float64, key by key: window, sinks, chosen chunks, squeezed positions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_all_accurate

from hsa_tl.accuracy import expect
from hsa_tl.model import selected as layer
from hsa_tl.model.attention import rotate
from hsa_tl.model.selected import Landmarks, Rule, chooser_of

THETA = 100.0
FREQUENCIES = (1.0, 0.3, 0.02, 0.005)


def oracle(q, k, v, start, *, window, sinks, topk, recency, far_positions, selection, theta, anchors, exact, S=16):
    """The rule, a token and a key/value head at a time; q [B, T, A, D] at start, k and v [B, P, H, D] from 0."""
    (B, T, A, D), (_, P, H, _) = q.shape, k.shape
    at = lambda x, i: x if theta is None else rotate(x, i, theta)  # noqa: E731
    out, j = torch.zeros_like(q), torch.arange(P)
    k_rope, q_rope = at(k, j), at(q, start + torch.arange(T))
    q_cap = at(q, torch.full((T,), window))
    for t in range(T):
        p, pace = start + t, 1.0 if far_positions else 0.0
        while far_positions and p * pace >= far_positions:
            pace /= 2
        k_far, q_far = at(k, j * pace), at(q, torch.full((T,), window + pace * (p - window), dtype=torch.float64))
        near = (j <= p) & (j > p - window)
        behind = j <= p - window
        N = max(0, p - window + 1 - sinks) // S
        for b in range(B):
            for h in range(H):
                heads = slice(h * A // H, (h + 1) * A // H)
                score = q_rope[b, t, heads] @ k_rope[b, :, h].T / math.sqrt(D)
                capped = q_far[b, t, heads] @ k_far[b, :, h].T / math.sqrt(D)
                seen = near | behind
                if N and topk != "all":
                    chunks = capped[:, sinks : sinks + N * S].unflatten(1, (N, S))
                    if selection == "mass" or h in exact:
                        value = chunks.logsumexp(2).amax(0)
                    else:
                        value = (q_cap[b, t, heads] @ k[b, :, h].T / math.sqrt(D))[:, sinks : sinks + N * S]
                        value = value.unflatten(1, (N, S)).mean(2).mean(0)
                    if selection == "landmark" and h not in exact:
                        anchors = anchors.to(q)
                        mass = (k[b, sinks : sinks + N * S, h] @ anchors[h].T / math.sqrt(D)).unflatten(0, (N, S))
                        alike = (q_cap[b, t, heads] @ anchors[h].T / math.sqrt(D)).softmax(-1)
                        value = value + (mass.logsumexp(1) @ alike.T).mean(1)
                    if recency is not None:
                        between = torch.arange(N - 1, -1, -1).to(q)
                        value = value - 4 * (between.log1p() / math.log(recency)).clamp(max=1)
                    seen = seen.clone()
                    chosen = torch.zeros(N, dtype=torch.bool)
                    chosen[value.topk(min(topk, N)).indices] = True
                    seen[sinks : sinks + N * S] &= chosen.repeat_interleave(S)
                score = torch.where(near, score, capped).masked_fill(~seen, -torch.inf)
                out[b, t, heads] = score.softmax(-1) @ v[b, :, h]
    return out


@settings(max_examples=25)
@given(
    st.integers(1, 40), st.integers(0, 90), st.sampled_from((1, 7, 16, 24, 200)), st.sampled_from((0, 1, 4, 20)),
    st.sampled_from((0, 1, 2, "all")), st.sampled_from(("mass", "mean", "landmark")),
    st.sampled_from((THETA, FREQUENCIES, None)), st.sampled_from(((6, 2), (3, 1), (2, 2))), st.booleans(),
    st.sampled_from((None, 2, 4)), st.sampled_from((0, 30, 200)),
)  # fmt: skip
def test_it_is_its_rule(T, before, window, sinks, topk, selection, theta, heads, blocks, recency, span):
    """Out and the gradients of queries, keys and values; in blocks of few tokens too."""
    torch.manual_seed(T)
    A, H = heads
    q, do = torch.randn(1, T, A, 8), torch.randn(1, T, A, 8)
    k, v = torch.randn(1, before + T, H, 8), torch.randn(1, before + T, H, 8)
    options = {"window": window, "sinks": sinks, "topk": topk, "theta": theta, "recency": recency}
    options["far_positions"] = span
    exact = (H - 1,) if selection == "landmark" and T % 2 else ()
    learned = Landmarks(H, 8, 5, exact)
    chooser = chooser_of(selection, learned)
    told = options | {"selection": selection, "anchors": learned.anchors.detach(), "exact": exact}

    def results(run, q, k, v, do):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        grads = torch.autograd.grad((out * do).sum(), leaves)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

    want = expect(lambda *x: results(lambda q, k, v: oracle(q, k, v, before, **told), *x), q, k, v, do)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setitem(layer.BLOCK, "cpu", 7)
            patch.setitem(layer.SCORES, "cpu", 5000)
        got = results(lambda q, k, v: Rule(**options, chunk_size=16).read_whole(q, k, v, chooser)[0], q, k, v, do)
    assert_all_accurate(got, want)


@pytest.mark.parametrize("selection", ("mass", "mean", "landmark"))
def test_float16_holds_the_products_of_large_biases(selection):
    """As the queries and keys of Qwen2 have them."""
    q, k = ((40 + torch.randn(1, 90, heads, 64)).half() for heads in (4, 2))
    learned = Landmarks(2, 64, 5)
    learned.anchors.data += 40
    out = Rule(16, 4, 16, 2, THETA, 30).read_whole(q, k, k, chooser_of(selection, learned))[0]
    assert out.isfinite().all() and learned.of(k, 16).isfinite().all()
