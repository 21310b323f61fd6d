"""How training may run the model: compiled, checkpointed, in bfloat16, twice."""

import dataclasses

import pytest
import torch
from tiers import prove, tiered

from hsa_tl.model import Model, preset

TINY = preset("tiny")


def step(model, x, labels, run=None, logits_to_keep=None):
    """Loss and gradients."""
    model.zero_grad()
    out = (model if run is None else run)(x, labels=labels, logits_to_keep=logits_to_keep)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    """Up to rounding, which a large cancelling sum makes large beside a small gradient."""
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        assert (actual[name] - g).norm() <= 1e-4 * g.norm() + 1e-7, name


@pytest.fixture
def batch():
    x = torch.randint(TINY.vocab_size, (2, 96))
    return x, torch.where(torch.rand(x.shape) < 0.5, x, -100)


COMPILED = (("hsa", None), ("hsa", 0), ("swa", None), ("full", None), ("selected", None))


@pytest.mark.parametrize("attention, keep", tiered(COMPILED, quick=COMPILED[:1], rows=True))
def test_compiled_training_step(batch, attention, keep):
    """fullgraph: no break anywhere, operators included."""
    model = Model(dataclasses.replace(TINY, attention=attention, topk=2))  # fewer than there are
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, gradients = step(model, *batch, logits_to_keep=keep)
    other, others = step(model, *batch, compiled, keep)
    torch.testing.assert_close(other.loss, out.loss)
    if keep is None:
        torch.testing.assert_close(other.logits, out.logits, atol=2e-5, rtol=1e-4)
    assert_same_gradients(others, gradients)


@prove
def test_inductor_compiles_the_whole_forward(batch):
    """Without the backward pass, whose kernels take the compiler a minute."""
    model = Model(TINY)
    with torch.no_grad():
        out, other = model(*batch), torch.compile(model, fullgraph=True)(*batch)
    torch.testing.assert_close(other.loss, out.loss)
    torch.testing.assert_close(other.logits, out.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ("hsa", "nsa"))
def test_activation_checkpointing_changes_memory_only(batch, attention):
    model = Model(dataclasses.replace(TINY, attention=attention))
    thrifty = Model(dataclasses.replace(model.config, activation_checkpointing=True))
    thrifty.load_state_dict(model.state_dict())
    kept = {}
    for name, m in (("all", model), ("some", thrifty)):
        sizes = {}  # of what lives for the backward, by storage
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.__setitem__(x.untyped_storage().data_ptr(), x.nbytes), x)[1], lambda x: x
        ):
            loss = m(*batch).loss
        kept[name] = sum(sizes.values())
        loss.backward()
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters()} for m in (thrifty, model)))
    assert kept["some"] < 0.7 * kept["all"]


@pytest.mark.parametrize(
    "options",
    ({}, {"fusion": "joint"}, {"attention": "nsa"}, {"attention": "moba"}, {"attention": "selected", "sinks": 4},
     {"experts": 4, "expert_dim": 32}),
    ids=str,
)  # fmt: skip
def test_bfloat16_autocast_is_near_float32(batch, options):
    model = Model(dataclasses.replace(TINY, topk="all", **options))
    expected = model(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = step(model, *batch)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected.loss, rtol=2e-2, atol=0)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("attention", ("hsa", "selected"))
def test_a_model_of_bfloat16_parameters_runs(batch, attention):
    out, gradients = step(Model(dataclasses.replace(TINY, attention=attention)).bfloat16(), *batch)
    assert out.logits.dtype == torch.bfloat16 and all(torch.isfinite(g).all() for g in gradients.values())


def test_a_seed_determines_everything(batch):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = Model(TINY)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            step(model, *batch)
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
