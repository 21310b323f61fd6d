"""Which parameter moves by which rule, and what a step of Muon is."""

import re
from dataclasses import replace

import pytest
import torch

from hsa_tl.model import Model, preset
from hsa_tl.model.distributed import Ranks
from hsa_tl.model.optimizers import Muon, make_optimizers
from hsa_tl.model.recipe import OPTIMIZERS, Recipe, Stage
from hsa_tl.model.sources import make_source
from hsa_tl.model.train import train_step


def recipe_of(optimizer: str, weight_decay: float) -> Recipe:
    return Recipe(
        "toy", "tiny", (Stage(1, 64, 8, {"kind": "needles"}),), 1e-3, optimizer=optimizer, weight_decay=weight_decay
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_has_one_optimizer(optimizer):
    """Vectors do not decay. Muon has the weights of linear layers but the last, tied or not."""
    for tied in (False, True):
        model = Model(replace(preset("tiny"), tied=tied))
        found = make_optimizers(model, recipe_of(optimizer, 0.5))
        groups = [(type(o).__name__, g) for o in found for g in o.param_groups]
        held = {id(p): (name, g["weight_decay"]) for name, g in groups for p in g["params"]}
        assert sum(len(g["params"]) for _, g in groups) == len(held) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            inner = optimizer == "muon" and p.ndim == 2 and not re.match("embedding|output|conv|.*position", name)
            assert held[id(p)] == ("Muon" if inner else "AdamW", 0.5 if p.ndim > 1 else 0.0), name


def test_a_muon_step_is_orthogonal_and_as_large_as_adamw_s():
    """Singular values of a step near each other, its mean square 0.2 of the learning rate's."""
    torch.manual_seed(0)
    model, recipe = Model(preset("tiny")), recipe_of("muon", 0.0)
    weight = model.layers[0].attention.q.weight
    before = weight.detach().clone()
    batch = make_source({"kind": "needles", "tasks": [{}]}, 64, 0).batch(0, 8)
    train_step(model, make_optimizers(model, recipe), recipe, [batch], 1e-3, Ranks("cpu"))
    step = (weight.detach() - before) / 1e-3
    values = torch.linalg.svdvals(step)
    assert values[: len(values) // 2].min() > 0.5 * values[0]
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_muon_step_on_a_cpu_is_exact():
    """Where bfloat16's three digits would be 1e-2 off, and slow on most."""
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.zeros(64, 128)), torch.randn(64, 128, dtype=torch.float64)
    weight.grad = x.float()
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    a, b, c = optimizer.param_groups[0]["ns_coefficients"]
    x = x / x.norm()
    for _ in range(optimizer.param_groups[0]["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(weight.detach(), (-0.2 * 128**0.5 * x).float(), rtol=0, atol=1e-5)
