"""MoBA is one softmax over the current chunk and the chosen ones."""

import math

import pytest
import torch

from hsa_tl.model import moba
from hsa_tl.model.attention import rotate
from hsa_tl.model.moba import MixtureOfBlockAttention

C, A, H, D, S, T = 32, 4, 2, 8, 16, 150


def by_the_formula(m, x):
    """Of one sequence x [T, C]: heads [T, A, D] and log-sum-exps [T, A]."""
    t, x = torch.arange(T), m.norm(x)
    q, k, v = (f(x).view(T, -1, D) for f in (m.q, m.k, m.v))
    q, k = m.q_norm(q), m.k_norm(k)
    if m.rope_theta is not None:
        q, k = (rotate(y, t, m.rope_theta) for y in (q, k))
    out, lse = torch.empty(T, A, D), torch.empty(T, A)
    for a in range(A):
        keys, values = k[:, a * H // A], v[:, a * H // A]
        means = torch.stack([keys[i : i + S].mean(0) for i in range(0, T, S)])
        for p in range(T):
            past = sorted(range(p // S), key=lambda c, p=p, a=a, means=means: -(means[c] @ q[p, a]).item())
            blocks = {p // S, *(past if m.topk == "all" else past[: m.topk])}
            seen = torch.tensor([j for j in range(p + 1) if j // S in blocks])
            score = keys[seen] @ q[p, a] / math.sqrt(D)
            out[p, a], lse[p, a] = score.softmax(0) @ values[seen], score.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("topk", (2, "all"))
@pytest.mark.parametrize("theta", (None, 100.0))
def test_the_current_chunk_and_the_chosen_in_one_softmax(topk, theta):
    m, x = MixtureOfBlockAttention(C, A, H, D, chunk_size=S, topk=topk, rope_theta=theta), torch.randn(2, T, C)
    out, lse, _ = m.attend(x)
    for b in range(2):
        want, want_lse = by_the_formula(m, x[b])
        torch.testing.assert_close(out[b], want)
        torch.testing.assert_close(lse[b], want_lse)
    torch.testing.assert_close(m.attend(x, keep=21)[0], out[:, -21:])


def test_impl_reaches_both_operators(monkeypatch):
    asked = []
    for name in ("retrieve_chunks", "selected_attention"):
        run = getattr(moba, name)
        monkeypatch.setattr(moba, name, lambda *x, run=run, **y: asked.append(y["impl"]) or run(*x, **y))
    MixtureOfBlockAttention(C, A, H, D, chunk_size=S, topk=2, impl="reference").attend(torch.randn(1, T, C))
    assert asked == ["reference"] * 2
