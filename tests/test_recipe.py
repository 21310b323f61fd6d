"""Recipes: what YAML files say, the paper's stages, learning rates, and errors that name the field."""

from dataclasses import asdict, replace

import pytest
from test_train import STAGES, toy

from hsa_tl.model import Model
from hsa_tl.model.recipe import Recipe, Stage, load_recipe, recipe_names, recipe_of
from hsa_tl.model.sources import make_source


def test_learning_rate():
    data = {"kind": "needles", "tasks": [{}]}
    recipe = Recipe("x", "tiny", (Stage(100, 32, 1, data),), 1.0, warmup=10, decay=0.5, final=0.1)
    rates = [recipe.lr_at(i) for i in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=2e-3)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert replace(recipe, decay=0).lr_at(99) == 1.0


@pytest.mark.parametrize("name", [x for x in recipe_names() if x.startswith("needle")])
def test_a_recipes_needles_fit(name):
    for stage in load_recipe(name).stages:
        batch = make_source(stage.data, stage.length, 0).batch(0, 2)
        assert batch.input_ids.shape == (2, stage.length) and (batch.labels != -100).any(1).all()


def test_a_recipe_like_another():
    text, base = load_recipe("text-tiny"), load_recipe("text-tiny-baselm")
    assert (base.config().attention, base.config().layers, base.config().window) == ("full", 4, text.config().window)
    assert (base.stages, base.lr, base.decay) == (text.stages, text.lr, text.decay)
    sizes = [Model(r.config()).num_parameters() for r in (text, base)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.06


def test_the_papers_stages():
    found = {name: load_recipe(name) for name in STAGES}
    at = {n: (r.stages[0].length, *(r.config(r.stages[0]).__getattribute__(x) for x in ("window", "topk")))
          for n, r in found.items()}  # fmt: skip
    assert at["warmup-short-window"] == (16384, 512, "all")
    assert at["warmup-self-copy"] == at["pretrain"] == (16384, 4096, 64)
    assert at["mid-train"] == at["anneal"] == (32768, 4096, "all") and at["sft"][0] == 8192
    for r in found.values():
        assert (r.weight_decay, r.betas, r.clip) == (0.01, (0.9, 0.95), 1.0)
        c = r.config()
        assert c == found["pretrain"].config(), "what is asked after any stage"
        assert (c.window, c.hsa_window, c.hsa_window_rope, c.topk * c.chunk_size) == (4096, 512, False, 4096)
    for name in ("warmup-short-window", "warmup-self-copy", "pretrain", "mid-train", "anneal"):
        assert found[name].stages[0].data["needles"] == 0.01


@pytest.mark.parametrize(
    "changes, words",
    (
        ({"stages": ()}, "stages must name at least one stage"),
        ({"source": "elsewhere"}, "stages must name .* none beside a source"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"clip": True}, "clip must be a number, got True"),
        ({"betas": 0.9}, "betas must be two numbers in .*, got 0.9"),
        ({"betas": ["a", "b"]}, "betas must be two numbers in .*, got .'a', 'b'."),
        ({"stages": {"steps": 1}}, "stages must be a list of mappings, got {'steps': 1}"),
        ({"stages": [1]}, "stages must be a list of mappings, got .1."),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16"),
        ({"warmup": 0.5}, "warmup must be an int"),
        ({"nonsense": 1}, "a recipe must have the fields name, preset, .* source, got 'nonsense'"),
        ({"stages": [{"steps": 1, "lenght": 2}]}, "a stage must have the fields steps, length, .*, got 'lenght'"),
        (
            {"stages": [{"steps": 1, "length": 2}]},
            "a stage must have the fields steps, length, batch, data, got no batch",
        ),
        ({"seed": 1 << 63}, "seed must be below"),
        ({"model": {"widow": 1}}, "changes of a model must have the fields vocab_size, dim, .*, got 'widow'"),
        ({"reading": {"topk": 0}}, "topk must be a positive int"),
        ({"preset": "huge"}, "preset must be one of"),
        ({"name": 2026}, "name must be a text, got 2026"),
        ({"model": None}, "model must be a mapping of fields, got None"),
        ({"reading": [1]}, "reading must be a mapping of fields, got .1."),
        ({"start": 5}, "start must be a folder, got 5"),
        (
            {"stages": [{"steps": 1, "length": 2, "batch": 1, "data": {}, "model": None}]},
            "model must be a mapping of fields, got None",
        ),
    ),
)
def test_a_wrong_recipe_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(asdict(toy()) | changes)


@pytest.mark.parametrize("number", ("1e6", "1e-5", "2.5e-2", "1.5e3", "+1E+2", "0.5"))
def test_numbers_of_a_file(number, tmp_path):
    """YAML 1.1 takes some of them for words."""
    file = tmp_path / "x.yaml"
    file.write_text(
        f"preset: tiny\nlr: {number}\nmodel: {{rope_theta: {number}, norm_eps: 1e-5}}\n"
        "stages: [{steps: 1, length: 32, batch: 1, data: {kind: needles, tasks: [{}]}}]\n"
    )
    recipe = load_recipe(file)
    assert recipe.lr == recipe.config().rope_theta == float(number) and recipe.config().norm_eps == 1e-5
    assert recipe.name == "x" and type(recipe.stages[0].steps) is int


def test_a_recipe_like_itself_is_named(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"like: {two}\n")
    two.write_text(f"like: {one}\n")
    with pytest.raises(ValueError, match=r"like must name a recipe that is not like this one, got .*one.yaml"):
        load_recipe(one)


@pytest.mark.parametrize(
    "text, words",
    (
        ("like: 5", "recipe must be a .yaml file or one of .*, got '5'"),
        ("like: needle-tiny\nmodel:", "model must be a mapping of fields, got None"),
    ),
)
def test_a_file_with_values_of_other_types_is_named(text, words, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_recipe(tmp_path / "x.yaml")
