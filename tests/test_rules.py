"""Every rule of a configuration and of a recipe: the values at its edge pass, those just beyond are told by name."""

from dataclasses import replace

import pytest

from hsa_tl.model import config, preset, recipe
from hsa_tl.model.recipe import Recipe, Stage

NSA, FULL, SELECTED = ({"attention": x} for x in ("nsa", "full", "selected"))
CONFIG = [  # a field, values at its edge, values beyond it, what stands beside it
    ("heads", (2, 4), (3,), {"kv_heads": 2}),
    ("head_dim", (2, 34), (33,), {}),
    ("dim", (128,), (130,), {}),
    ("layers", (2,), (1,), {}),
    ("groups", (2,), (3,), {"layers": 3}),
    ("attention", ("swa",), ("dense",), {}),
    ("hsa_window", (0, 32), (33,), {}),
    ("encoder_overlap", (0, 1, 15), (16, -1), {}),
    ("rope", ((), ("swa", "hsa"), ["full"]), (("up",), "swa", {"swa"}), {}),
    ("rope_frequencies", ((), (0.5,) * 16), ((0.5,) * 15, (0.5,) * 17), {}),
    ("rope_theta", (1e-9, 1), (0, -1.0), {}),
    ("norm_eps", (0.0, 0.99), (-0.01, 1.0), {}),
    ("biases", (("q", "k", "v", "out"),), (("up",), "q"), {}),
    ("selection", ("mean",), ("best",), {}),
    ("hsa_layers", (0, 1, 2), (3, -1), SELECTED),
    ("anchors", (1,), (0,), {"selection": "landmark"}),
    ("exact_heads", ((), (0, 3)), ((4,), (-1,), {1}), {"kv_heads": 2}),
    ("linear", (True,), (), {}),
    ("linear", (False,), (True,), SELECTED),
    ("score_scale", (1.0,), (2.0,), {}),
    ("score_scale", (0.5, 2.0), (), FULL),
    ("log_length", (0, 2), (1,), FULL),
    ("log_length", (0,), (2,), {}),
    ("value_residual", ("svformer",), ("both",), {}),
    ("fusion", ("joint",), ("sum",), {}),
    ("chunk_size", (16, 32, 64, 128), (17, 256), {}),
    ("topk", (1, "all"), (0, -1, "every", True, 1.5), {}),
    ("topk", (0, 1), (-1,), SELECTED),
    ("topk", (3, "all"), (1, 2), NSA),
    ("topp", (0.01, 1), (0, 1.01), {}),
    ("mass_power", (0.01, 8), (0, -1), {"fusion": "mass"}),
    ("mass_power", (1,), (1.01, 0.5), {}),
    ("distractors", (0,), (1,), {"rope": ("hsa",)}),
    ("retrieval_heads", (1, 2, 4), (3,), {"kv_heads": 4}),
    ("impl", ("dense",), (), {"topk": "all"}),
    ("impl", ("triton", "auto"), ("dense", "cuda"), {}),
    ("recency", (None, 2), (1, 2.0), {}),
    ("selection_overlap", (0, 1), (-0.01, 1.01), {}),
    ("experts_per_token", (2,), (3,), {"experts": 2}),
]
STAGES = (Stage(1, 8, 1, {"kind": "needles", "tasks": []}),)
RECIPE = [
    ("name", ("5",), (5, None), {}),
    ("model", ({},), (None, [1]), {}),
    ("reading", ({},), (None, [1]), {}),
    ("start", (None, "a run"), (5,), {}),
    ("stages", (), ((),), {}),
    ("stages", ((),), (), {"source": "a model"}),
    ("seed", (0, (1 << 63) - 1), (1 << 63,), {}),
    ("lr", (1e-9, 1e9), (0.0, float("inf")), {}),
    ("weight_decay", (0.0, 1e9), (-1e-9, float("inf")), {}),
    ("betas", ((0.0, 0.99), [0.5, 0.5]), ((0.5,), (0.5, 1.0), (-0.1, 0.5), (0.1, 0.1, 0.1)), {}),
    ("decay", (0, 1), (-0.01, 1.01), {}),
    ("final", (0, 1), (-0.01, 1.01), {}),
    ("clip", (1e-9, float("inf")), (0, -1.0), {}),
    ("optimizer", ("muon",), ("sgd",), {}),
    ("dtype", ("bfloat16",), ("int8",), {}),
]


@pytest.mark.parametrize(
    "module, made, edges",
    ((config, preset("tiny"), CONFIG), (recipe, Recipe("toy", "tiny", STAGES, 1e-3), RECIPE)),
    ids=("config", "recipe"),
)
def test_every_rule_holds_up_to_its_edge(module, made, edges, monkeypatch):
    rules, told = set(), set()
    check = module.require_rules

    def record(values, *given):
        if type(values) is type(made):
            rules.update(name for name, _, _ in given)
        check(values, *given)

    monkeypatch.setattr(module, "require_rules", record)
    for name, within, beyond, beside in edges:
        for value in within:
            replace(made, **beside, **{name: value})
        for value in beyond:
            with pytest.raises(ValueError, match=f"^{name} must "):
                replace(made, **beside, **{name: value})
            told.add(name)
    assert told == rules


@pytest.mark.parametrize(
    "name, value", (("tied", "no"), ("linear", 1), ("rope_theta", "1e4"), ("topp", None), ("score_scale", float("inf")))
)
def test_a_value_of_another_type_is_told_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
        replace(preset("tiny"), **{name: value})
