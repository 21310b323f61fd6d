"""Linear attention is its recurrence, token by token; what its states are for, and what they refuse."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_all_accurate

from hsa_tl.accuracy import expect
from hsa_tl.model import Model, baseline, linear, preset
from hsa_tl.model.distributed import ContextParallel
from hsa_tl.model.linear import linear_attention
from hsa_tl.model.longcontext import LongReader

TINY = replace(preset("tiny"), window=4)


def recurrence(q, k, v, log_g, state):
    """The formula, a token after the other."""
    out = []
    for t in range(q.shape[1]):
        state = log_g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        out.append((q[:, t, :, None] @ state)[:, :, 0] / q.shape[-1] ** 0.5)
    return torch.stack(out, 1), state


def inputs(T, forget, B=2, A=3, D=8, dtype=torch.float32):
    """forget: how fast; "slow" is a millionth of "mixed"."""
    q, k, v = (torch.randn(B, T, A, D, dtype=dtype) for _ in range(3))
    log_g = F.logsigmoid(3 * torch.randn(B, T, A, dtype=dtype)) * {"slow": 1e-6, "mixed": 1, "fast": 20}[forget]
    log_g = log_g.clamp(min=-12)  # beyond, a gate's gradient is lost beside others', and says nothing
    return q, k, v, log_g, torch.randn(B, A, D, D, dtype=dtype)


def results(run, *leaves):
    """Outputs and gradients of a loss of both."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, state = run(*leaves)
    loss = (out * out.detach().cos()).sum() + (state * state.detach().cos()).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"out": out, "state": state, **dict(zip(("dq", "dk", "dv", "dlog_g", "dstate"), gradients, strict=True))}


@settings(max_examples=15)
@given(T=st.integers(1, 150), forget=st.sampled_from(("slow", "mixed", "fast")), block=st.sampled_from((1, 7, 64)))
def test_blocks_equal_the_recurrence(T, forget, block):
    torch.manual_seed(T)
    given = inputs(T, forget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "BLOCK", block)
        assert_all_accurate(results(linear_attention, *given), expect(lambda *x: results(recurrence, *x), *given))


@pytest.mark.parametrize("T", (1, 9))
def test_gradients(T, monkeypatch):
    monkeypatch.setattr(linear, "BLOCK", 4)
    given = [x.requires_grad_() for x in inputs(T, "mixed", B=1, A=2, D=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(linear_attention, given)


def test_a_gate_may_forget_everything():
    q, k, v, log_g, state = inputs(100, "mixed")
    found = results(linear_attention, q, k, v, log_g * 1e4, state)
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close((found["out"], found["state"]), recurrence(q, k, v, log_g * 1e4, state))


def test_a_state_goes_on():
    """Two halves are the whole, and without a state it begins at 0."""
    *given, _ = inputs(130, "mixed", dtype=torch.float64)
    out, state = linear_attention(*given)
    first, half = linear_attention(*(x[:, :71] for x in given))
    second, end = linear_attention(*(x[:, 71:] for x in given), half)
    torch.testing.assert_close((torch.cat([first, second], 1), end), (out, state))
    torch.testing.assert_close((out, state), recurrence(*given, torch.zeros_like(state)))


@pytest.mark.parametrize("T", (1, 40))
def test_fla_is_asked_for_the_same(T, monkeypatch):
    def simple_gla(name):
        def run(q, k, v, g, initial_state, output_final_state):
            assert output_final_state and name == ("fused_recurrent" if T == 1 else "chunk")
            return recurrence(q, k, v, g, initial_state)

        return run

    names = ("chunk", "fused_recurrent")
    module = types.SimpleNamespace(**{f"{name}_simple_gla": simple_gla(name) for name in names})
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    given = inputs(T, "mixed")
    torch.testing.assert_close(linear.by_fla(*given), linear_attention(*given))


def test_kinds_and_parameters():
    hybrid = replace(TINY, layers=8, groups=2, linear=True)

    assert hybrid.kinds == ("linear",) * 4 + ("hsa", "linear", "hsa", "linear")
    assert replace(TINY, layers=4, linear=True).kinds == ("linear", "linear", "hsa", "linear")  # 1:3
    assert replace(TINY, layers=3, linear=True, attention="full").kinds == ("linear", "full", "linear")
    assert baseline(TINY, "linear").kinds == baseline(hybrid, "linear").kinds[:2] == ("linear", "linear")
    with pytest.raises(ValueError, match="linear must be False with attention selected, got True"):
        replace(TINY, attention="selected", linear=True)
    hype = Model(replace(TINY, linear=True, rope=("linear",))).layers
    assert [x.attention.rope_theta for x in hype] == [TINY.rope_theta, None] and hype[1].hsa.rope_theta is None
    forgets = F.softplus(Model(hybrid).layers[0].attention.gate.bias.detach())
    torch.testing.assert_close(forgets, torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]))


@pytest.mark.parametrize("window", (1, 7, 1 << 20))
def test_a_window_bounds_what_a_state_keeps(window):
    """Of tokens whose gates would keep everything."""
    layer = linear.LinearAttention(16, 4, 2, 8, window=window)
    torch.nn.init.constant_(layer.gate.bias, -100.0)
    cache = linear.LinearState([7], 4, 8, torch.float32, "cpu")
    cache.value += 1
    with torch.no_grad():
        layer.v.weight.zero_()
        layer.attend(torch.randn(1, 7, 16), cache=cache)
    torch.testing.assert_close(cache.value, torch.full_like(cache.value, math.exp(-7 / window)))


@pytest.mark.parametrize("attention, far", (("swa", False), ("linear", True)))
def test_a_state_reaches_beyond_any_window_and_does_not_grow(attention, far):
    model = Model(replace(TINY, attention=attention, conv=0)).eval()
    x = model.embed(torch.randint(320, (1, 100))).detach().requires_grad_()
    model.hidden(x)[0, -1].square().sum().backward()
    reached = x.grad[0].abs().amax(-1) > 0
    windows = 1 + 2 * (TINY.window - 1)
    assert reached[-windows:].all() and reached[:-windows].any() == reached.all() == far
    if far:
        cache, sizes = model.new_cache(1), []
        for _ in range(2):
            model(torch.randint(320, (1, 3000)), cache=cache)
            sizes.append([layer.value.nbytes for layer in cache.layers])
        assert sizes[0] == sizes[1] == [4 * 4 * 32 * 32] * 2


@pytest.mark.parametrize("changes", ({}, {"linear": True}, {"attention": "linear"}), ids=str)
def test_the_first_token_is_remembered(changes):
    """It is also the last one, which windows of 4 tokens do not reach; no chunk is whole yet."""
    torch.manual_seed(0)
    config = replace(TINY, topk="all", impl="dense", dim=64, conv=0, hsa_window=TINY.window)
    model = Model(replace(config, window=32, **changes) if changes else config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        ids = torch.randint(2, 320, (32, 15))
        ids[:, 0] = torch.arange(32) % 2
        ids[:, -2], ids[:, -1] = 5, ids[:, 0]
        labels = torch.where(torch.arange(15) == 14, ids, -100)
        loss = model(ids, labels=labels, logits_to_keep=0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert (max(losses[-5:]) < 0.1) if changes else (min(losses[-5:]) > 0.5)


def test_a_saved_cache_goes_on(tmp_path):
    model = Model(replace(TINY, linear=True, layers=4)).eval()
    ids = torch.randint(320, (2, 90))
    cache = model.new_cache(2)
    model(ids[:, :70], cache=cache, lengths=[70, 64])
    cache.save(tmp_path / "cache")
    again = model.load_cache(tmp_path / "cache")
    for state in (cache, again):
        state.got = model(ids[:, 70:], cache=state).logits
    assert torch.equal(cache.got, again.got)
    torch.testing.assert_close(cache.got[0], model(ids[:1]).logits[0, 70:])


def test_packed_documents_have_states_of_their_own():
    hf = pytest.importorskip("hsa_tl.model.hf", reason="needs transformers, the extra hf")
    model = hf.HSAForCausalLM(hf.HSAConfig(replace(TINY, linear=True, rope=("linear",)))).eval()
    ids, lengths = torch.randint(320, (1, 70)), (17, 40, 13)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(x).logits for x in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, alone)


def test_what_a_state_cannot_do_is_named():
    model, ids = Model(replace(TINY, linear=True)).eval(), torch.zeros(1, 64, dtype=torch.int64)
    cache = model.new_cache(1)
    model(ids, cache=cache)
    for call, error, message in (
        (lambda: model.new_cache(1, undo=3), ValueError, "undo must be 0 with linear layers, got 3"),
        (lambda: cache.crop(63), ValueError, r"lengths must take back at most the last \[0\] tokens, of undo = 0"),
        (lambda: LongReader(model, retrieve=False), ValueError, "retrieve must be True unless attention is"),
    ):
        with pytest.raises(error, match=message):
            call()
    mesh = types.SimpleNamespace(size=lambda: 1, get_local_rank=lambda: 0)
    with pytest.raises(NotImplementedError, match=r"context parallelism needs .* no linear layers"):
        ContextParallel(model, mesh)(ids)
