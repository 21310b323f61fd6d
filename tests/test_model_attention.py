"""Sliding-window attention against a dense mask in float64: blocks, past keys, log-sum-exp, memory, RoPE."""

import math
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_all_accurate

from hsa_tl.accuracy import expect
from hsa_tl.model import attention, distributed
from hsa_tl.model.attention import SelfAttention, positions, rotate, windowed


def dense(q, k, v, window, past=None):
    """out and log-sum-exp with the whole [T, P] mask."""
    T, P, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, 2) for x in (k, v))
    t, p = torch.arange(T)[:, None] + P - T, torch.arange(P)
    seen = (p <= t) & (p > t - (P if window is None else window))
    if past is not None:
        seen = seen & (p >= P - T - past[:, None])[:, None, None]
    score = torch.einsum("btad,bpad->batp", q, k) / math.sqrt(q.shape[-1])
    score = score.masked_fill(~seen, -torch.inf)
    return torch.einsum("batp,bpad->btad", score.softmax(-1), v), score.logsumexp(-1).transpose(1, 2)


def inputs(T, P, A=4, H=2, D=8, B=2):
    q, k, v = (torch.randn(B, n, h, D, requires_grad=True) for n, h in ((T, A), (P, H), (P, H)))
    return q, k, v, torch.randn(B, T, A, D), torch.randn(B, T, A)


def check(run, T, P, window, past=None, with_lse=True, heads=(4, 2), gradients=True):
    torch.manual_seed(T + P)
    q, k, v, do, dlse = inputs(T, P, *heads)

    def results(attend, q, k, v, do, dlse):
        leaves = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
        out, lse = attend(*leaves)
        found = {"out": out, "lse": lse} if with_lse else {"out": out}
        if gradients:
            loss = (out * do).sum() + ((lse * dlse).sum() if with_lse else 0)
            found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True))
        return found

    wanted = expect(lambda *x: results(lambda *leaves: dense(*leaves, window, past), *x), q, k, v, do, dlse)
    assert_all_accurate(results(run, q, k, v, do, dlse), wanted)


@given(
    st.integers(2, 70), st.integers(0, 40), st.sampled_from((2, 3, 7, 16, 32, 100, None)), st.booleans(),
    st.sampled_from(((1, 1), (4, 4), (4, 2), (6, 1))),
)  # fmt: skip
def test_it_equals_dense_attention_with_a_band_mask(T, before, window, with_lse, heads):
    run = lambda q, k, v: windowed(q, k, v, window, None, with_lse)  # noqa: E731
    check(run, T, T + before, window, None, with_lse, heads)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_scores_of_few_bits_tell_keys_apart_that_have_much_in_common(dtype):
    """As a bias of the keys gives them: the products are large, and float16 would not even hold them."""
    q, k = (40 + torch.randn(1, 20, heads, 64).to(dtype) for heads in (4, 2))
    want = attention.scores(q.double(), k.double())
    torch.testing.assert_close(attention.scores(q, k).double(), want, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention.scores(q, k).double(), want, rtol=1e-6, atol=0)


def test_float64_stays_float64():
    q, k, v = (x.detach().double() for x in inputs(20, 23)[:3])
    for mine, other in zip(windowed(q, k, v, 7, None, True), dense(q, k, v, 7), strict=True):
        torch.testing.assert_close(mine, other)


def test_a_window_of_one_sees_the_token_itself():
    q, k, v, *_ = inputs(20, 23)
    expected = v[:, 3:].repeat_interleave(2, 2)
    torch.testing.assert_close(windowed(q, k, v, 1)[0], expected)


@pytest.mark.parametrize("T, before, window", ((1, 5, 8), (10, 7, 4), (20, 7, 8), (3, 12, None)))
@pytest.mark.parametrize("with_lse", (False, True))
def test_sequences_with_less_past_see_only_what_is_real(T, before, window, with_lse):
    past = torch.tensor([0, min(before, 3)], dtype=torch.int32)
    check(lambda q, k, v: windowed(q, k, v, window, past, with_lse), T, T + before, window, past, with_lse)


def test_memory_is_linear_in_tokens():
    """The largest tensor of forward and backward: 8 times the tokens, about 8 times the size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    def largest(T):
        q, k, v, *_ = inputs(T, T)
        with Largest() as mode:
            out, lse = windowed(q, k, v, 16, None, True)
            (out.sum() + lse.sum()).backward()
        return mode.size

    assert largest(8 * 256) <= 9 * largest(256)


def test_rope_depends_on_distance_only_and_turns_by_position():
    q, k = torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    score = [torch.einsum("btad,bpad->batp", *(rotate(x, positions(s, x), 100.0) for x in (q, k))) for s in (0, 1000)]
    torch.testing.assert_close(score[0], score[1], atol=2e-3, rtol=0)
    x = torch.zeros(1, 3, 1, 4)
    x[..., 0] = 1
    turned = rotate(x, positions(2, x), 100.0)[0, :, 0]
    angle = torch.tensor([2.0, 3.0, 4.0])
    torch.testing.assert_close(turned, torch.stack([angle.cos(), angle * 0, angle.sin(), angle * 0], -1))
    both = rotate(x.expand(2, -1, -1, -1), positions(torch.tensor([2, 5], dtype=torch.int32), x), 100.0)
    torch.testing.assert_close(both[0, :, 0], turned)


def test_qk_norm_makes_scores_blind_to_the_scale_of_projections():
    layer = SelfAttention(16, 4, 2, 8, window=5)
    x = torch.randn(1, 12, 16)
    before = layer.attend(x)[0]
    with torch.no_grad():
        layer.q.weight *= 7
        layer.k.weight *= 0.3
    torch.testing.assert_close(layer.attend(x)[0], before)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("T, P, window", ((200, 200, 37), (300, 450, 128), (130, 300, None)))
def test_flex_attention_sees_the_window(T, P, window):
    """What CUDA runs compiled, here eager: mask, log-sum-exp; and the blocks that it would visit."""
    check(lambda q, k, v: attention.flex(q, k, v, window, True), T, P, window, gradients=False)
    blocks = attention.block_mask(T, P, P if window is None else window, torch.device("cpu")).to_dense()[0, 0]
    t, p = torch.arange(T)[:, None] + P - T, torch.arange(P)
    seen = (p <= t) & (p > t - (P if window is None else window))
    seen = torch.nn.functional.pad(seen, (0, -P % 128, 0, -T % 128))
    assert torch.equal(blocks.bool(), seen.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1))


@pytest.mark.parametrize("window", (5, None))
def test_flash_attn_is_asked_for_the_window(monkeypatch, window):
    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        return dense(q, k, v, window_size[0] + 1 if window_size[0] >= 0 else None)[0]

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v, *_ = inputs(6, 9)
    torch.testing.assert_close(attention.flash(q, k, v, window), dense(q, k, v, window)[0])


@pytest.mark.parametrize("window", (None, 1, 5, 12, 100))
def test_a_rank_has_the_keys_that_its_window_reaches(window, monkeypatch):
    """Without processes: what each rank would send is at hand."""
    ranks, T = 3, 8
    keys, values = torch.randn(2, 2, ranks * T, 2, 4)
    parts = torch.stack([keys, values], 2).split(T, 1)
    monkeypatch.setattr(
        distributed, "gather", lambda x, mesh: torch.cat([part[:, T - x.shape[1] :] for part in parts], 1)
    )
    for rank in range(ranks):
        mesh = types.SimpleNamespace(get_local_rank=lambda rank=rank: rank)
        k, v, past = distributed.Neighbours(mesh, window).extend(*parts[rank].unbind(2))
        first = 0 if window is None else max(0, rank * T - window + 1)
        assert past is None and torch.equal(k, keys[:, first : (rank + 1) * T])
        assert torch.equal(v, values[:, first : (rank + 1) * T])
