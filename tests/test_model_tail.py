"""What training leaves out changes nothing: the upper decoder before the first label, the selection of all chunks."""

from dataclasses import replace

import pytest
import torch
from strategies import assert_all_accurate
from tiers import tiered

from hsa_tl.accuracy import assert_accurate, expect
from hsa_tl.model import Model, preset
from hsa_tl.model.sources import make_source

CONFIGS = (
    {},
    {"layers": 5, "groups": 2, "kv_heads": 2, "value_residual": "resformer"},
    {"fusion": "joint", "kv_heads": 4, "retrieval_heads": 2},
    {"fusion": "stick_breaking", "exclude_window": True, "rope": ("swa", "hsa")},
    {"attention": "swa", "layers": 4, "value_residual": "svformer"},
    {"attention": "full", "layers": 3},
    {"linear": True, "layers": 4, "groups": 2, "rope": ("linear",)},
)


def gradients(model, batch, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(batch.input_ids, labels=batch.labels, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }


each_config = pytest.mark.parametrize("changes", tiered(CONFIGS, quick=(CONFIGS[1], CONFIGS[2], *CONFIGS[5:])), ids=str)


@each_config
def test_the_same_loss_and_gradients(changes):
    config = replace(preset("tiny"), topk="all", **changes)
    model = Model(config)
    batch = make_source({"kind": "needles", "tasks": [{"needles": 9, "queries": 3}]}, 130, 0).batch(0, 2)
    exact = Model(config).double()
    exact.load_state_dict(model.state_dict())
    wanted = expect(lambda: gradients(exact, batch))
    for options in ({}, {"logits_to_keep": 0}):
        assert_all_accurate(gradients(model, batch, **options), wanted)
    if config.attention == "hsa":
        dense = Model(replace(config, impl="dense"))
        dense.load_state_dict(model.state_dict())
        for options in ({}, {"logits_to_keep": 0}):
            assert_all_accurate(gradients(dense, batch, **options), wanted)


@each_config
@pytest.mark.parametrize("keep", tiered((1, 40, 250), quick=(40,)))
def test_the_last_logits(changes, keep):
    model = Model(replace(preset("tiny"), **changes))
    ids = torch.randint(0, 320, (2, 250))
    exact = Model(model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        last = model(ids, logits_to_keep=keep).logits
        wanted = expect(lambda: exact(ids).logits)
    assert last.shape == (2, keep, 320)
    assert_accurate("logits", last, wanted[:, -keep:])


def test_the_upper_decoder_skips_what_no_label_needs():
    model, rows = Model(preset("tiny")), []
    model.layers[1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    batch = make_source({"kind": "needles", "tasks": [{"needles": 2, "queries": 2}]}, 250, 0).batch(0, 1)
    model(batch.input_ids, labels=batch.labels, logits_to_keep=0)
    assert rows == [5]  # of ASK key value ASK key value, from the key that predicts the first value on


def test_dense_needs_all_chunks():
    with pytest.raises(ValueError, match='impl must not be "dense" unless topk is "all", got \'dense\''):
        replace(preset("tiny"), impl="dense")
