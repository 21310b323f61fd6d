"""The whole model: causal, trainable at every parameter, its loss and its stages."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hsa_tl.model import Model, ModelConfig, preset

SMALL = dataclasses.replace(
    preset("tiny"), dim=32, heads=4, kv_heads=2, head_dim=16, mlp_dim=48, retrieval_dim=16, layers=4, groups=2,
    vocab_size=50, encoder_mlp_dim=32, window=20, topk=3,
)  # fmt: skip
T = 75


def tokens(B=2, n=T, config=SMALL):
    return torch.randint(config.vocab_size, (B, n))


@pytest.mark.parametrize("attention", ("hsa", "swa", "full"))
def test_a_later_token_changes_no_earlier_logit(attention):
    model = Model(dataclasses.replace(SMALL, attention=attention)).eval()
    x = tokens()
    before = model(x).logits
    for p in (1, 15, 16, 17, 32, 40, T - 1):
        changed = x.clone()
        changed[:, p:] = (changed[:, p:] + 1 + torch.randint(48, (2, T - p))) % 50
        after = model(changed).logits
        torch.testing.assert_close(after[:, :p], before[:, :p])
        assert not torch.isclose(after[:, p:], before[:, p:]).all(-1).any()


@pytest.mark.parametrize("attention", ("hsa", "swa", "full"))
def test_every_parameter_gets_a_gradient(attention):
    model = Model(dataclasses.replace(SMALL, attention=attention))
    x = tokens()
    model(x, labels=x).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_loss_is_the_shifted_cross_entropy_of_labelled_positions():
    model, x = Model(SMALL), tokens()
    labels = torch.where(torch.rand(x.shape) < 0.3, x, -100)
    out = model(x, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    alone = model(x, labels=labels, logits_to_keep=0)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, expected)
    last = model(x, labels=labels, logits_to_keep=3)
    torch.testing.assert_close(last.logits, out.logits[:, -3:])
    torch.testing.assert_close(last.loss, expected)
    labels[:, :50] = -100
    expected = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
    torch.testing.assert_close(model(x, labels=labels, logits_to_keep=0).loss, expected)


def test_stages_make_up_the_forward():
    model, x = Model(SMALL), tokens()
    h, values = model.lower(model.embed(x))
    h = model.upper(h, model.encode(h), values)
    torch.testing.assert_close(model.head(h), model(x).logits, rtol=0, atol=0)


def test_config_errors_name_the_field():
    for change, message in (
        ({"heads": 3}, "heads must be a multiple of kv_heads = 2, got 3"),
        ({"topk": 0}, 'topk must be a positive int or "all", or 0 for "selected", got 0'),
        ({"dim": 0}, "dim must be an int of at least 1, got 0"),
        ({"attention": "dense"}, "attention must be one of hsa, nsa, moba, swa, full, linear, selected, got 'dense'"),
        ({"attention": "selected", "topk": -1}, 'topk must be a positive int or "all", or 0 for "selected", got -1'),
        ({"selection": "best"}, "selection must be one of mass, mean, landmark, got 'best'"),
        ({"sinks": -1}, "sinks must be an int of at least 0, got -1"),
        ({"biases": ("up",)}, r"biases must hold q, k, v or out, got \('up',\)"),
        ({"rope_frequencies": (1.0,)}, r"rope_frequencies must hold \d+ or none, got \(1.0,\)"),
        ({"norm_eps": 1.0}, r"norm_eps must lie in \[0, 1\), got 1.0"),
        ({"chunk_size": 20}, "chunk_size must be 16, 32, 64 or 128, got 20"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="preset must be one of tiny"):
        preset("huge")


@pytest.mark.parametrize("name, millions", (("tiny", 0.602), ("small", 50.0)))
def test_the_scale_of_a_preset(name, millions):
    assert preset("tiny") == ModelConfig()
    with torch.device("meta"):
        assert Model(preset(name)).num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)
