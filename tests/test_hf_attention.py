"""attn_implementation="hsa": a model of transformers in place computes what its converted run does, or says why not."""

import pytest
import torch
from test_convert import SOURCES, source

from hsa_tl.model import load
from hsa_tl.model.convert import convert

transformers = pytest.importorskip("transformers")
hf_attention = pytest.importorskip("hsa_tl.model.hf_attention")

OPTIONS = {"window": 16, "sinks": 3, "chunk_size": 16, "topk": 2, "hsa_layers": 2}


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "mistral"])
def test_it_is_the_converted_model(name, tmp_path):
    model = source(tmp_path / "source", name)
    convert(tmp_path / "source", tmp_path / "run", **OPTIONS)
    ours, ids = load(tmp_path / "run"), torch.randint(257, (2, 100))
    model.config.hsa = OPTIONS
    dense = model(ids).logits
    model.set_attn_implementation("hsa")
    got = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, ours(ids).logits, atol=1e-4, rtol=0)
    assert (got - dense).abs().max() > 1e-2
    with torch.no_grad():
        first = model(ids[:, :70])
        rest = model(ids[:, 70:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, got[:, 70:], atol=1e-4, rtol=0)
        model.generation_config.eos_token_id = None  # behind which transformers would pad a row
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), ours.generate(ids, 4))


def test_it_trains(tmp_path):
    model, ids = source(tmp_path / "source"), torch.randint(257, (1, 80))
    model.config.hsa = OPTIONS
    model.set_attn_implementation("hsa")
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in model.parameters())


def test_what_it_does_not_have_is_named(tmp_path):
    model, ids = source(tmp_path / "source"), torch.randint(257, (2, 20))
    model.set_attn_implementation("hsa")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for arguments, message in (
        ({"attention_mask": mask}, "attention_mask must hide nothing, .* for attn_implementation='hsa'"),
        ({"position_ids": torch.arange(20)[None] % 10}, "(position_ids|attention_mask) must"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 20])}, "cu_seq_lens_q must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    with pytest.raises(ValueError, match=r"(position_ids|attention_mask) must"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout must be 0"):
        model.train()(ids)
    for size, message in ((17, "chunk_size must be 16"), (0, "chunk_size must be an int of at least 1")):
        model.eval().config.hsa = {"chunk_size": size}
        with pytest.raises(ValueError, match=message):
            model(ids)
    mistral = source(tmp_path / "mistral", "mistral")
    mistral.config.hsa = OPTIONS
    mistral.set_attn_implementation("hsa")
    with pytest.raises(ValueError, match="sliding_window must be None"):
        mistral(ids)
