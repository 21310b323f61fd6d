"""The mixture of experts: the same as a loop over tokens, balanced by its bias, counted."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from strategies import assert_all_accurate

from hsa_tl.accuracy import expect
from hsa_tl.model import Model, preset
from hsa_tl.model.mlp import MoE, grouped_product

C, E, K, HIDDEN = 16, 6, 2, 8


def test_experts_begin_as_linear_layers_do():
    """Uniform within one over the root of the inputs."""
    moe = MoE(64, 8, 2, 32)
    for x, inputs in ((moe.up_ECF, 64), (moe.down_EFC, 32)):
        assert 0.99 < x.abs().max() * inputs**0.5 <= 1 and abs(x.mean()) * inputs**0.5 < 0.05


def by_token(moe, x_TC):
    """The definition, a token and expert at a time."""
    out = []
    for x in x_TC:
        score = torch.sigmoid(moe.router.weight.to(x.dtype) @ x)
        chosen = (score + moe.bias_E).topk(moe.experts_per_token).indices
        y = moe.shared(x)
        for e in chosen:
            gate, up = (x @ moe.up_ECF[e]).chunk(2)
            y = y + score[e] / score[chosen].sum() * ((F.silu(gate) * up) @ moe.down_EFC[e])
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("shared", (1, 2))
def test_it_equals_a_loop_over_tokens(shared):
    moe, x = MoE(C, E, K, HIDDEN, shared), torch.randn(3, 7, C)
    moe.bias_E += torch.randn(E) * 0.3
    do = torch.randn_like(x)

    def results(forward, do):
        out = forward()
        names, parameters = zip(*moe.named_parameters(), strict=True)
        return {"out": out} | dict(zip(names, torch.autograd.grad((out * do).sum(), parameters), strict=True))

    actual = results(lambda: moe(x), do)
    moe.double()
    wanted = expect(lambda x, do: results(lambda: by_token(moe, x.flatten(0, 1)).view(x.shape), do), x, do)
    assert_all_accurate(actual, wanted)


def test_an_expert_without_tokens_gets_no_gradient_and_no_error():
    moe, x = MoE(C, E, K, HIDDEN), torch.randn(5, C)
    moe.bias_E[3] = -10
    moe(x).sum().backward()
    assert (moe.up_ECF.grad[3] == 0).all() and moe.up_ECF.grad[[0, 1, 2, 4, 5]].any()
    assert (grouped_product(x, moe.up_ECF, torch.tensor([0, 0, 5, 0, 0, 0])) == x @ moe.up_ECF[2]).all()


def test_balance_moves_towards_uniform_under_a_skewed_router():
    moe = MoE(C, E, K, HIDDEN)
    with torch.no_grad():  # tokens of positive mean, and an expert that all of them prefer
        moe.router.weight.mul_(0.5)
        moe.router.weight[0] = 0.3
        moe.router.weight[1] = -0.3
    x = torch.randn(512, C) + 0.5

    def spread():
        moe.load_E.zero_()
        moe(x)
        return (moe.load_E.float() / moe.load_E.sum() - 1 / E).abs().max().item()

    before = spread()
    for _ in range(300):
        moe(x)
        moe.update_balance(5e-3)
    assert before > 0.25 and spread() < 0.04
    assert moe.bias_E[0] < 0 < moe.bias_E[1] and not moe.bias_E.requires_grad
    moe.eval()
    moe.load_E.zero_()
    moe(x)
    assert not moe.load_E.any(), "loads are counted in training only"


def test_loads_of_batches_at_once_all_count():
    class Slow(torch.Tensor):
        def __iadd__(self, other):
            before = self.clone()
            time.sleep(0.05)
            return self.copy_(before + other)

    moe = MoE(C, E, K, HIDDEN)
    moe.load_E = moe.load_E.as_subclass(Slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(moe, torch.randn(4, 5, C)))
    assert moe.load_E.sum() == 4 * 5 * K


MIXED = dataclasses.replace(preset("tiny"), layers=4, experts=E, experts_per_token=K, expert_dim=HIDDEN, dim=32)


def test_the_model_has_mixtures_after_its_dense_layers_and_balances_them():
    model = Model(MIXED)
    assert [isinstance(layer.mlp, MoE) for layer in model.layers] == [False, True, True, True]
    x = torch.randint(320, (2, 40))
    model(x, labels=x).loss.backward()
    assert all(layer.mlp.load_E.sum() == 2 * 40 * K for layer in model.layers[1:])
    model.update_balance()
    assert all(layer.mlp.bias_E.any() and not layer.mlp.load_E.any() for layer in model.layers[1:])
    assert all("load" not in name for name in model.state_dict()) and "layers.1.mlp.bias_E" in model.state_dict()


def test_active_parameters_are_those_of_one_token():
    """As many as get a gradient from a single token, embeddings aside."""
    model = Model(dataclasses.replace(MIXED, attention="swa", conv=0))
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]]), logits_to_keep=0).loss.backward()
    idle = sum(2 * 3 * 32 * HIDDEN for layer in model.layers[1:]) * (E - K) // 2
    assert model.num_parameters() - model.num_parameters(active=True) == idle


def test_the_mixtures_baseline_has_its_size():
    """Fewer and wider experts, and full attention instead of windows, chunks and their encoder."""
    with torch.device("meta"):
        ours, theirs = Model(preset("moe-8b-a1b")), Model(preset("trm-moe"))
    c = theirs.config
    assert (c.attention, c.experts, c.experts_per_token, c.expert_dim) == ("full", 32, 2, 1024)
    assert abs(theirs.num_parameters() / ours.num_parameters() - 1) < 0.03
