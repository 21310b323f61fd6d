"""Every option of the configuration does what it says."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hsa_tl import fusion_weights, transforms
from hsa_tl.model import Model, ModelConfig, baseline, chunk_memory, preset
from hsa_tl.model.chunk_memory import ChunkMemory
from hsa_tl.model.config import PRESETS, UNLEARNED
from hsa_tl.model.hsa import ChunkEncoder, HSALayer
from hsa_tl.model.longcontext import LongReader

SMALL = ModelConfig(
    vocab_size=50, dim=32, layers=4, groups=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=48, window=20, topk=2,
    retrieval_dim=16, encoder_mlp_dim=32,
)  # fmt: skip
T = 150
OPTIONS = (
    *({"fusion": x} for x in ("softmax", "softmax1", "stick_breaking", "joint")),
    *({"fusion": x, "topk": k} for x in ("mass", "uniform", "detached", "one_softmax") for k in (3, "all")),
    {"attention": "full", "log_length": 64, "score_scale": 1.5},
    *({"chunk_size": x} for x in (16, 32, 64)),
    *({"topk": x} for x in (3, 40, "all")),
    *({"topk": x, "topp": 0.6} for x in (3, "all")),
    *({"window": x} for x in (1, 16, 33, 500)),
    {"exclude_window": True},
    {"hsa_window": 5, "hsa_window_rope": False},
    *({"retrieval_heads": x} for x in (1, 2)),
    *({"value_residual": x} for x in ("none", "resformer", "svformer")),
    *({"rope": x} for x in ((), ("swa",), ("swa", "hsa"))),
    *({"attention": "nsa", "topk": 3, "rope": x} for x in ((), ("swa", "nsa"))),
    *({"attention": "moba", "rope": x} for x in ((), ("swa", "moba"))),
    *({"linear": True, "rope": x} for x in ((), ("linear",), ("swa", "linear"))),
    {"linear": True, "attention": "full", "biases": ("q", "k", "v", "out"), "qk_norm": False},
    *({"attention": "linear", "value_residual": x} for x in ("none", "resformer", "svformer")),
    *({"conv": x} for x in (0, 1, 3)),
    {"tied": True},
    *({"heads": x, "kv_heads": 1, "retrieval_heads": 1} for x in (1, 2, 4, 8, 16, 32)),
    {"heads": 4, "kv_heads": 4, "retrieval_heads": 2},
    {"groups": 1}, {"layers": 5, "groups": 3}, {"encoder_layers": 2},
    {"fusion": "joint", "retrieval_heads": 1, "exclude_window": True, "topk": "all"},
    {"experts": 4, "experts_per_token": 2, "expert_dim": 8},
    *({"recency": 4, "topk": x} for x in (2, "all")),
    *({"encoder_overlap": x} for x in (1, 5)), {"fusion": "mass", "mass_power": 2.5},
    *({"attention": "selected", "rope": ("selected",), "sinks": 4, "topk": x} for x in (2, "all")),
    {"attention": "selected", "selection": "mean", "heads": 6, "biases": ("q", "k", "v", "out")},
    {"attention": "selected", "topk": 0, "sinks": 2}, {"qk_norm": False, "norm_eps": 1e-5},
)  # fmt: skip


def model_and_tokens(**options):
    config = dataclasses.replace(SMALL, **options)
    return Model(config), torch.randint(config.vocab_size, (2, T))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option_trains_and_stays_causal(options):
    model, x = model_and_tokens(**options)
    out = model(x, labels=x)
    out.loss.backward()
    taught = options.get("fusion") not in UNLEARNED
    for name, p in model.named_parameters():
        if not taught and ("slc" in name or "landmark" in name):
            assert p.grad is None or not p.grad.any(), name
            continue
        one_key = options.get("window") == 1 and (".q" in name or ".k" in name)  # its weight is 1
        assert p.grad is not None and torch.isfinite(p.grad).all() and (p.grad.any() or one_key), name
    changed = x.clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % 50
    model.eval()
    torch.testing.assert_close(model(changed).logits[:, :70], model(x).logits[:, :70])
    torch.testing.assert_close(model(x, logits_to_keep=9).logits, model(x).logits[:, -9:])


@pytest.mark.parametrize("attention", ("hsa", "nsa", "moba", "swa", "full", "linear", "selected"))
def test_sequences_of_a_batch_do_not_see_each_other(attention):
    model, x = model_and_tokens(attention=attention, topk=3)
    both = model(x).logits
    torch.testing.assert_close(torch.cat([model(y[None]).logits for y in x]), both)
    torch.testing.assert_close(model(x.flip(0)).logits, both.flip(0))


def test_options_that_shape_no_parameter():
    """A checkpoint goes from stage to stage."""
    state = Model(SMALL).state_dict()
    for change in (
        {"window": 64}, {"topk": "all"}, {"topp": 0.5}, {"exclude_window": True}, {"fusion": "joint"}, {"rope": ()},
        {"activation_checkpointing": True}, {"impl": "reference"}, {"rope_theta": 500.0}, {"norm_eps": 0.1},
        {"rope_frequencies": (0.5,) * 8},
    ):  # fmt: skip
        Model(dataclasses.replace(SMALL, **change)).load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    (
        {"window": 21}, {"hsa_window": 19}, {"hsa_window_rope": False}, {"topk": 1}, {"topp": 0.5},
        {"exclude_window": True}, {"fusion": "softmax1"}, {"fusion": "stick_breaking"},
        {"fusion": "joint"}, {"rope": ()}, {"rope": ("swa", "hsa")}, {"rope_theta": 100.0}, {"attention": "swa"},
        {"rope_frequencies": (0.5,) * 8},
    ),
    ids=str,
)  # fmt: skip
def test_option_changes_the_output(change):
    model, x = model_and_tokens()
    other = Model(dataclasses.replace(SMALL, **change))
    other.load_state_dict(model.state_dict(), strict="attention" not in change)
    difference = (other(x).logits - model(x).logits).abs().amax((0, 2))
    assert difference.max() > 1e-4
    if not any("rope" in name or (name.endswith("window") and name != "exclude_window") for name in change):
        torch.testing.assert_close(difference[:16], torch.zeros(16), atol=1e-5, rtol=0)  # before any whole chunk


SELECTED = {"attention": "selected", "sinks": 4, "topk": 3, "rope": ("selected",), "conv": 0}
FAR = {"selection": "mean", "recency": 2, "far_positions": 20}
OTHER = (("sinks", 0), ("topk", 0), ("topk", 2), *FAR.items(), ("window", 21), ("rope", ()))


@pytest.mark.parametrize("name, value", OTHER)
def test_option_of_selected_attention_changes_the_output(name, value):
    """Behind the first token whose window does not reach the first one; a position, everywhere."""
    model, x = model_and_tokens(**SELECTED)
    other = Model(dataclasses.replace(model.config, **{name: value}))
    other.load_state_dict(model.state_dict())
    difference = (other(x).logits - model(x).logits).abs().amax((0, 2))
    assert difference.max() > 1e-4
    if name != "rope":
        torch.testing.assert_close(difference[:20], torch.zeros(20), atol=1e-5, rtol=0)


def test_biases_and_norms_are_where_they_are_named():
    model = Model(dataclasses.replace(SMALL, biases=("q", "out"), qk_norm=False, norm_eps=0.25))
    names = {name for name, _ in model.layers[0].attention.named_parameters()}
    assert names == {"norm.weight", "q.weight", "q.bias", "k.weight", "v.weight", "out.weight", "out.bias"}
    layer = model.layers[3]
    assert [x.eps for x in (model.norm, layer.mlp_norm, layer.attention.norm)] == [0.25] * 3


def test_kinds_of_layers():
    assert SMALL.kinds == ("swa", "swa", "hsa", "hsa")
    assert dataclasses.replace(SMALL, layers=9, groups=2).kinds == ("swa",) * 4 + ("hsa", "swa", "hsa", "swa", "swa")
    assert baseline(SMALL, "full").kinds == ("full",) * 4
    assert baseline(dataclasses.replace(SMALL, topk=3), "nsa").kinds[2] == "nsa"


def test_a_full_window_of_swa_is_full_attention():
    """BaseLM and a window over everything are the same function."""
    full, x = model_and_tokens(attention="full")
    wide = Model(dataclasses.replace(SMALL, attention="swa", window=T))
    wide.load_state_dict(full.state_dict())
    torch.testing.assert_close(wide(x).logits, full(x).logits)


def test_without_positions_a_window_is_blind_to_order():
    """HyPE's setting, rope=("swa",), gives positions to windows only; rope=() to nothing."""
    for rope, same in (((), True), (("swa",), False)):
        model, x = model_and_tokens(attention="swa", rope=rope, conv=0, layers=2, groups=1, window=T)
        shuffled = torch.cat([x[:, torch.randperm(T - 1)], x[:, -1:]], 1)
        # A second layer would see causal states of the first, which depend on order.
        first, second = (model.lower(model.embed(y))[0][:, -1] for y in (x, shuffled))
        assert torch.allclose(first, second, atol=1e-5) is same


def test_svformer_has_the_values_of_the_first_layer_only():
    model, x = model_and_tokens(value_residual="svformer")
    assert [hasattr(layer.attention, "v") for layer in model.layers] == [True, False, False, False]
    mixed, _ = model_and_tokens(value_residual="resformer")
    assert [hasattr(layer.attention, "value_mix") for layer in mixed.layers] == [False, True, True, True]
    plain, _ = model_and_tokens()
    with torch.no_grad():  # resformer without the first layer's share is the plain model
        for layer in mixed.layers[1:]:
            layer.attention.value_mix.copy_(torch.tensor([0.0, 1.0]))
    plain.load_state_dict({k: v for k, v in mixed.state_dict().items() if "value_mix" not in k})
    torch.testing.assert_close(mixed(x).logits, plain(x).logits)


def test_exclude_window_retrieves_only_what_the_window_does_not_cover():
    """A change of a chunk that every later window covers reaches nothing through HSA."""
    layer = HSALayer(32, 4, 2, 16, 16, topk="all", exclude_window=64)
    encoder = ChunkEncoder(32, 2, 16, 16, 16)
    x = torch.randn(1, T, 32)
    before = layer(x, encoder(x))
    assert (before[:, :64] == 0).all() and (before[:, 64:] != 0).any(-1).all()
    memory = x.clone()
    memory[:, 16:] = torch.randn(1, T - 16, 32)  # at positions below 80 only chunk 0 is outside the window
    torch.testing.assert_close(layer(x, encoder(memory))[:, :80], before[:, :80])


def test_retrieval_starts_where_the_query_resembles_the_chunk():
    model, _ = model_and_tokens()
    for layer in model.layers[2:]:
        assert torch.equal(layer.hsa.q_slc.weight, model.encoder.landmark.weight)


def test_joint_weights_of_window_and_chunks_sum_to_one():
    layer, encoder = HSALayer(32, 4, 2, 16, 16, topk=3, fusion="joint"), ChunkEncoder(32, 2, 16, 16, 16)
    x, lse = torch.randn(1, T, 32), torch.randn(1, T, 4)
    memory = encoder(x)
    _, window = layer.mix(x, memory, 0, lse)
    scores, _ = memory.retrieve(layer.queries(x)[1], 0, 3)
    weights, expected = fusion_weights(scores, "joint", lse)
    torch.testing.assert_close(weights.sum(-1) + window, torch.ones(1, T, 4))
    torch.testing.assert_close(window, expected)
    assert (window[:, :16] == 1).all()


def test_hsa_with_a_part_taken_out():
    """Uniform and detached weights, and one softmax over all chosen keys, by hand."""
    encoder, x = ChunkEncoder(32, 2, 16, 16, 16), torch.randn(1, T, 32)
    layers = {f: HSALayer(32, 4, 2, 16, 16, topk=3, fusion=f) for f in ("softmax", *UNLEARNED)}
    for layer in layers.values():
        layer.load_state_dict(layers["softmax"].state_dict())
    memory, chosen = encoder(x), layers["softmax"]
    q, q_slc = chosen.queries(x)
    _, indices = memory.retrieve(q_slc, 0, 3)
    count = (indices >= 0).sum(-1, keepdim=True).clamp(min=1)
    uniform = memory.attend(q, (indices >= 0) / count, indices)
    torch.testing.assert_close(layers["uniform"](x, memory), chosen.out(uniform.flatten(2)))
    torch.testing.assert_close(layers["detached"](x, memory), chosen(x, memory))
    seen = (indices[..., None] == torch.arange(160) // 16).any(-2).repeat_interleave(2, 2).transpose(1, 2)
    k, v = (y.repeat_interleave(2, 2).transpose(1, 2) for y in (memory.k, memory.v))
    full = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen).nan_to_num(0)
    torch.testing.assert_close(layers["one_softmax"](x, memory), chosen.out(full.transpose(1, 2).flatten(2)))


class Exact(ChunkMemory):
    """Its retrieval scores are the chunks' true log-sum-exps, of the queries in `q`."""

    def scores(self, q_slc, start, *, exclude_window=0):
        N, S = self.landmarks.shape[1], self.chunk_size
        score = torch.einsum("btad,bpad->btap", self.q, self.k) / self.q.shape[-1] ** 0.5
        lse = score.unflatten(-1, (N, S)).logsumexp(-1)
        hidden = torch.arange(N) >= torch.arange(self.q.shape[1])[:, None] // S
        return lse.masked_fill(hidden[:, None], -torch.inf)


def test_all_chunks_with_exact_weights_are_full_attention_over_chunks():
    """OPERATOR, identity 1, through the layer and its encoder."""
    layer, encoder = HSALayer(32, 2, 2, 16, 16, topk="all"), ChunkEncoder(32, 2, 16, 16, 16)
    x = torch.randn(1, 96, 32)
    q = layer.queries(x)[0]
    memory = Exact(*encoder(x))
    memory.q = q
    seen = torch.arange(96) // 16 < torch.arange(96)[:, None] // 16
    k, v = memory.k.transpose(1, 2), memory.v.transpose(1, 2)
    full = F.scaled_dot_product_attention(q.transpose(1, 2)[:, :, 16:], k, v, attn_mask=seen[16:])
    torch.testing.assert_close(layer(x, memory)[:, 16:], layer.out(full.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name, attention, millions", (("dense-0.5b", "hsa", 537.7), ("dense-0.5b", "full", 519.6)))
def test_dense_sizes_are_the_papers(name, attention, millions):
    with torch.device("meta"):
        total = Model(baseline(preset(name), attention)).num_parameters()
    assert abs(total / millions / 1e6 - 1) < 0.01


def test_moe_sizes_are_the_papers():
    """8B parameters, of which a token uses 1B besides the tables of the vocabulary."""
    with torch.device("meta"):
        model = Model(preset("moe-8b-a1b"))
    c = model.config
    assert (c.experts, c.experts_per_token, c.shared_experts, c.expert_dim, c.dense_layers) == (64, 4, 1, 512, 1)
    tables = 2 * c.vocab_size * c.dim
    assert abs(model.num_parameters() / 8e9 - 1) < 0.03
    assert abs((model.num_parameters(active=True) - tables) / 1e9 - 1) < 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_head_ratio_of_presets(name):
    c = preset(name)
    assert c.heads == (4 if name == "tiny" else 16) * c.kv_heads


@pytest.mark.parametrize("attention", ("hsa", "nsa"))
def test_all_chunks_need_no_selection(attention, monkeypatch):
    """What retrieval would choose of every chunk, in every memory, and retrieval is never asked."""
    every, x = model_and_tokens(attention=attention, topk="all", retrieval_heads=1, exclude_window=True)
    many = Model(dataclasses.replace(every.config, topk=T))
    many.load_state_dict(every.state_dict())

    @torch.no_grad()
    def results(model):
        found = [model.train()(x).logits, LongReader(model.eval()).read(x[0].numpy().astype("uint16"), 40)]
        cache = model.new_cache(2, **({"capacity": 1} if attention == "hsa" else {}))
        parts = [
            model(part, cache=cache, lengths=[part.shape[1], 1]).logits[:, :1] for part in x.split((1, 1, 90, 58), 1)
        ]
        return [*found, torch.cat(parts, 1)]

    want = results(many)
    for name in ("retrieve", "retrieve_decode"):
        monkeypatch.setattr(transforms, name, lambda *_: pytest.fail("there is nothing to select"))
    for got, wanted in zip(results(every), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_impl_reaches_retrieval(monkeypatch):
    asked = []
    for name in ("retrieve", "retrieve_decode"):
        run = getattr(transforms, name)
        monkeypatch.setattr(transforms, name, lambda *x, run=run: asked.append(x[-2]) or run(*x))
    model, x = model_and_tokens(impl="reference")
    with torch.no_grad():
        model(x)
        cache = model.eval().new_cache(2)
        for part in x.split((149, 1), 1):
            model(part, cache=cache)
    assert len(asked) > 2 and set(asked) == {"reference"}


def test_an_impl_that_cannot_retrieve_is_named():
    """No other takes its place."""
    model, x = model_and_tokens(impl="tilelang")
    with pytest.raises(NotImplementedError, match="impl='tilelang' cannot retrieve by bounds"):
        model.eval()(x[:, :1], cache=model.new_cache(2, two_level=True))
    with pytest.raises(ValueError, match='impl must not be "dense" unless topk is "all"'):
        HSALayer(32, 4, 2, 16, 16, topk=3, impl="dense")


def test_distractors_are_chunks_of_other_sequences_before_the_own():
    """In training only; as if their tokens stood before the sequence's, for HSA alone; with gradients."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, distractors=2, topk="all")
    model = Model(config)
    ids = torch.randint(0, 50, (3, 64))
    x = model.embedding(ids).detach().requires_grad_()
    h, first_v = model.lower(model.embed(x))
    own = model.encode(h)
    before = [ChunkMemory(*(torch.cat([y[b - 2], y[b - 1], y[b]])[None] for y in own)) for b in range(3)]
    want = [model.upper(h[b : b + 1], m, first_v[b : b + 1], start=128) for b, m in enumerate(before)]
    got = model.hidden(x)
    torch.testing.assert_close(got, torch.cat(want))
    (gradient,) = torch.autograd.grad(got[0, 5].square().sum(), x)
    assert gradient[1].any() and gradient[2].any(), "token 5 sees no whole chunk of its own"
    plain = Model(dataclasses.replace(SMALL, topk="all"))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    with pytest.raises(ValueError, match=r"distractors must be below the batch's 2 sequences, got 2"):
        model.train()(ids[:2])
    with pytest.raises(ValueError, match='distractors must be 0 where "hsa" is in rope, got 2'):
        dataclasses.replace(config, rope=("swa", "hsa"))


def test_the_layer_says_what_overlap_it_expects(monkeypatch):
    """In a forward over a ChunkMemory and in a prefill over pages; a share, or the config is refused."""
    asked = []
    run = chunk_memory.hsa_attention
    monkeypatch.setattr(chunk_memory, "hsa_attention", lambda *x, **y: asked.append(y["config"]) or run(*x, **y))
    model = Model(dataclasses.replace(SMALL, selection_overlap=0.4)).eval()
    ids = torch.randint(50, (1, T))
    with torch.no_grad():
        model(ids)
        assert asked == [{"overlap": 0.4}] * 2  # layers
        model(ids, cache=model.new_cache(1))
    assert asked == [{"overlap": 0.4}] * 4
    with pytest.raises(ValueError, match=r"selection_overlap must lie in \[0, 1\], got 1.5"):
        dataclasses.replace(SMALL, selection_overlap=1.5)


def test_recency_is_learned_by_each_retrieval_head():
    """4 at first; only where the option is on has the model parameters of it."""
    plain, x = model_and_tokens(retrieval_heads=2)
    model = Model(dataclasses.replace(plain.config, recency=4))
    names = {"layers.2.hsa.recency_R", "layers.3.hsa.recency_R"}
    assert set(model.state_dict()) - set(plain.state_dict()) == names
    model.load_state_dict(plain.state_dict() | {n: model.state_dict()[n] for n in names})
    recency = F.softplus(model.layers[2].hsa.recency_R)
    torch.testing.assert_close(recency, torch.tensor([4.0, 4.0]))
    near = (model(x).logits - plain(x).logits).abs().amax()
    with torch.no_grad():
        for n in names:
            model.get_parameter(n).fill_(-100.0)
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    with torch.no_grad():
        for n in names:
            model.get_parameter(n).fill_(100.0)
    assert 0 < near < (model(x).logits - plain(x).logits).abs().amax()


@pytest.mark.parametrize("fusion", ("softmax", "joint"))
def test_recency_of_all_chunks_is_that_of_many(fusion):
    """topk="all", which scores by itself, and as many chunks as there are."""
    model, x = model_and_tokens(recency=4, topk="all", fusion=fusion)
    many = Model(dataclasses.replace(model.config, topk=40))
    with torch.no_grad():
        for layer in model.layers[2:]:
            layer.hsa.recency_R.fill_(3.0)
    many.load_state_dict(model.state_dict())
    torch.testing.assert_close(many(x).logits, model(x).logits)


@pytest.mark.parametrize("value", (1, 0, 2.0, True))
def test_recency_must_be_a_span(value):
    with pytest.raises(ValueError, match=f"recency must be an int above 1, got {value}"):
        dataclasses.replace(SMALL, recency=value)
