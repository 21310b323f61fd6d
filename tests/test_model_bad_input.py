"""Bad input to the model and its layers: one line that names the argument. Empty batches go through."""

import pytest
import torch

from hsa_tl.model import ChunkEncoder, HSALayer, Model, baseline, preset

V = preset("tiny").vocab_size
IDS = torch.zeros(2, 40, dtype=torch.int64)
H = torch.zeros(2, 40, 32)


@pytest.fixture(scope="module")
def model():
    return Model(preset("tiny")).eval()


MODEL = [  # arguments, the error and what it says
    ({"input_ids": IDS + V}, ValueError, r"input_ids must lie in \[0, 320\), got 320 at \[0, 0\]"),
    ({"input_ids": IDS - 1}, ValueError, r"input_ids must lie in \[0, 320\), got -1"),
    ({"input_ids": IDS[0]}, ValueError, r"input_ids must have 2 dimensions, got shape \[40\]"),
    ({"input_ids": IDS[:, :0]}, ValueError, "input_ids must hold at least one token"),
    ({"input_ids": IDS.float()}, TypeError, "input_ids must be integers, got torch.float32"),
    ({"input_ids": IDS > 0}, TypeError, "input_ids must be integers, got torch.bool"),
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a torch.Tensor, got list"),
    ({"input_ids": torch.zeros(2, 40, 64)}, ValueError, r"input_ids must have shape \[B, T, 128\] as embeddings"),
    ({"labels": IDS[:, 1:]}, ValueError, r"labels must have shape \[2, 40\] like input_ids, got shape \[2, 39\]"),
    ({"labels": IDS + V}, ValueError, r"labels must lie in \[0, 320\) or be -100, got 320"),
    ({"labels": IDS.float()}, TypeError, "labels must be integers, got torch.float32"),
    ({"labels": IDS.tolist()}, TypeError, "labels must be a torch.Tensor, got list"),
    ({"logits_to_keep": -1}, ValueError, "logits_to_keep must be at least 0, got -1"),
]
ENCODER = {"dim": 32, "kv_heads": 1, "head_dim": 16, "retrieval_dim": 8, "chunk_size": 16}
LAYER = {"dim": 32, "heads": 4, "kv_heads": 1, "head_dim": 16, "retrieval_dim": 8}
LAYERS = [
    (lambda: ChunkEncoder(**ENCODER | {"chunk_size": 17}), "chunk_size must be 16, 32, 64 or 128, got 17"),
    (lambda: ChunkEncoder(**ENCODER | {"heads": 3}), "dim must be a multiple of heads = 3, got 32"),
    (lambda: ChunkEncoder(**ENCODER | {"kv_heads": 0}), "kv_heads must be at least 1, got 0"),
    (lambda: ChunkEncoder(**ENCODER)(H[0]), r"x_BTC must have 3 dimensions, got shape \[40, 32\]"),
    (lambda: ChunkEncoder(**ENCODER)(H[..., :31]), r"x_BTC must have shape \[B, T >= 1, 32\] as hidden states"),
    (lambda: ChunkEncoder(**ENCODER, overlap=-1), "overlap must be at least 0, got -1"),
    (lambda: ChunkEncoder(**ENCODER, overlap=2)(H, past_BPC=H[:, :1]), r"past_BPC must have shape \[2, 2, 32\]"),
    (lambda: ChunkEncoder(**ENCODER)(H, past_BPC=H[:, :1]), r"past_BPC must have shape \[2, 0, 32\]"),
    (lambda: HSALayer(**LAYER | {"kv_heads": 3}), "heads must be a multiple of kv_heads = 3, got 4"),
    (lambda: HSALayer(**LAYER, retrieval_heads=2), "retrieval_heads must divide"),
    (lambda: HSALayer(**LAYER, topk=0), "topk must be at least 1, got 0"),
    (lambda: HSALayer(**LAYER, recency=1), "recency must be at least 2, got 1"),
    (lambda: HSALayer(**LAYER, mass_power=2), 'mass_power must be 1 without fusion "mass", got 2'),
    (lambda: HSALayer(**LAYER, fusion="mass", mass_power=0), "mass_power must be positive, got 0"),
    (lambda: HSALayer(**LAYER, fusion="x"), "fusion must be one of softmax, .*, got 'x'"),
    (lambda: HSALayer(**LAYER, fusion="joint")(H, None), 'fusion must not be "joint" without the window of a Model'),
    (lambda: HSALayer(**LAYER)(H[:, :0], ChunkEncoder(**ENCODER)(H)), r"x_BTC must have shape \[B, T >= 1, 32\]"),
]


@pytest.mark.parametrize("arguments, error, message", MODEL, ids=[x[2][:40] for x in MODEL])
def test_model(arguments, error, message, model):
    with pytest.raises(error, match=message):
        model(**{"input_ids": IDS} | arguments)


@pytest.mark.parametrize("call, message", LAYERS, ids=[x[1][:40] for x in LAYERS])
def test_layers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32))
def test_tokens_and_labels_of_any_integers(dtype, model):
    ids = torch.randint(100, (2, 40))
    torch.testing.assert_close(model(ids.to(dtype), labels=ids.to(dtype)), model(ids, labels=ids))


def test_an_empty_batch_goes_through(model):
    assert model(IDS[:0]).logits.shape == (0, 40, V)
    for attention in ("full", "swa", "linear", "nsa", "moba"):
        assert Model(baseline(preset("tiny"), attention))(IDS[:0]).logits.shape == (0, 40, V)
    x = H[:0].clone().requires_grad_()
    HSALayer(**LAYER)(x, ChunkEncoder(**ENCODER)(x)).sum().backward()
    assert x.grad.shape == (0, 40, 32)
