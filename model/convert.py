"""Pretrained models of transformers as runs whose layers see a window, sinks and chosen chunks: `hsa-tl convert`.

    convert(Path("SmolLM2-135M"), Path("out/smol"))
    model = hsa_tl.model.load(Path("out/smol"))

The families are Llama, Qwen2, Qwen3 and Mistral. Every weight stays as it is; see hsa_tl.model.selected for what a
layer computes, which within the window is what it computed before.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsa_tl.model import checkpoint
from hsa_tl.model.config import ModelConfig
from hsa_tl.model.model import Model
from hsa_tl.model.pretrained import TOKENIZER
from hsa_tl.model.recipe import Recipe
from hsa_tl.validation import require

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
ROPES = ("default", "linear", "llama3")
DEFAULTS = {
    "window": 512, "sinks": 4, "chunk_size": 64, "topk": 16, "selection": "mass", "far_positions": 512,
    "recency": None, "hsa_layers": 0,
}  # fmt: skip
OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INNER = {
    "attention.norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
    **{f"attention.{x}": (f"self_attn.{x}_proj",) for x in "qkv"}, "attention.out": ("self_attn.o_proj",),
    **{f"attention.{x}_norm": (f"self_attn.{x}_norm",) for x in "qk"},
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",),
}  # fmt: skip
Weights = dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]  # shape, and what reads it


def config_of(source, **options) -> ModelConfig:
    """The ModelConfig of a transformers config. options: see `convert`.

    ValueError: a family or a setting that is not supported, by its name there.
    """
    options = DEFAULTS | options
    get = lambda name, default=None: getattr(source, name, default)  # noqa: E731
    rope = dict(get("rope_parameters") or {})
    kind, sliding = rope.get("rope_type", "default"), get("sliding_window")
    for name, value, rule, ok in (
        ("model_type", source.model_type, f"be one of {', '.join(FAMILIES)}", source.model_type in FAMILIES),
        ("quantization_config", get("quantization_config"), "be none", get("quantization_config") is None),
        ("hidden_act", get("hidden_act"), "be silu", get("hidden_act") == "silu"),
        ("mlp_bias", get("mlp_bias"), "be False", not get("mlp_bias")),
        ("rope_type", kind, f"be one of {', '.join(ROPES)}", kind in ROPES),
        ("partial_rotary_factor", x := rope.get("partial_rotary_factor", 1.0), "be 1", x == 1),
        ("anchors", x := options.get("anchors", 0), "be 0, hsa-tl landmarks finds them in a run", x == 0),
        ("sliding_window", sliding, f"be at least --window = {options['window']}",
         sliding is None or sliding >= options["window"]),
    ):  # fmt: skip
        require(ok, f"{name} of the source", rule, repr(value))
    trained = max(2, source.max_position_embeddings // max(1, options["chunk_size"]))  # chunks
    options["recency"] = trained if options["recency"] is None else options["recency"] or None
    theta, frequencies = float(rope["rope_theta"]), ()
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies = tuple(ROPE_INIT_FUNCTIONS[kind](source, torch.device("cpu"))[0].tolist())
    qkv = source.model_type == "qwen2" or get("attention_bias", False)
    return ModelConfig(
        vocab_size=source.vocab_size, dim=source.hidden_size, layers=source.num_hidden_layers,
        heads=source.num_attention_heads, kv_heads=source.num_key_value_heads,
        head_dim=get("head_dim") or source.hidden_size // source.num_attention_heads,
        mlp_dim=source.intermediate_size, norm_eps=source.rms_norm_eps, qk_norm=source.model_type == "qwen3",
        biases=(("q", "k", "v") if qkv else ()) + (("out",) if get("attention_bias", False) else ()),
        rope=("selected",), rope_theta=theta, rope_frequencies=frequencies,
        tied=bool(source.tie_word_embeddings), attention="selected", conv=0, encoder_heads=1, **options,
    )  # fmt: skip


def names_of(ours: str) -> list[str]:
    """The source's weights that one of ours is made of, one below the other."""
    module, _, kind = ours.rpartition(".")
    if module in OUTER:
        return [f"{OUTER[module]}.{kind}"]
    _, i, inner = module.split(".", 2)
    return [f"model.layers.{i}.{name}.{kind}" for name in INNER[inner]]


def _folder_weights(folder: Path) -> Weights:
    """Of the safetensors files of a folder of transformers; nothing is read but their headers."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights: Weights = {}
    for file in (folder / name for name in files):
        require(file.exists(), "source", "hold its weights as safetensors", f"no {file}")
        try:
            opened = safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file} must be a whole safetensors file, got {error}") from None
        for name in opened.keys():  # noqa: SIM118
            shape = tuple(opened.get_slice(name).get_shape())
            weights[name] = shape, lambda opened=opened, name=name: opened.get_tensor(name)
    return weights


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """As it is: transformers would make another one of it for some families."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def _read(source: Path) -> tuple[Any, Callable[[Path], None], Callable[[], Weights]]:
    """transformers' config of a folder or GGUF file, what writes its tokenizer to a folder, what gives its weights."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ImportError("a source needs transformers: pip install 'hsa-tl[hf]'") from None
    if source.is_file() and source.suffix == ".gguf":
        where, options = str(source.parent), {"gguf_file": source.name, "local_files_only": True}

        def weights() -> Weights:
            model, found = AutoModelForCausalLM.from_pretrained(
                where, **options, dtype=torch.float32, output_loading_info=True
            )
            if wrong := [f"{kind}: {min(map(str, x))}" for kind, x in found.items() if x]:
                raise ValueError(f"{source} must hold all weights and no others, got {', '.join(wrong)}")
            return {name: (tuple(x.shape), lambda x=x: x) for name, x in model.state_dict().items()}

        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        return AutoConfig.from_pretrained(where, **options), tokenizer.save_pretrained, weights
    for name in ("config.json", "tokenizer.json"):
        require((source / name).is_file(), "source", f"be a .gguf file or a folder with {name}", source)
    config = AutoConfig.from_pretrained(str(source), local_files_only=True)
    return config, partial(_copy_tokenizer, source), partial(_folder_weights, source)


def _check(source: Path, model: Model, have: Weights) -> None:
    """ValueError: a weight that is missing, superfluous or of another shape."""
    want: dict[str, tuple[int, ...]] = {}
    for name, x in model.state_dict().items():
        parts = names_of(name)
        want |= dict.fromkeys(parts, (len(x) // len(parts), *x.shape[1:]))
    if model.config.tied and "lm_head.weight" not in have:
        del want["lm_head.weight"]
    for name in sorted(want.keys() | have.keys()):
        shape = have[name][0] if name in have else "none"
        wanted, old = want.get(name, "none"), name.endswith("rotary_emb.inv_freq")  # which old files hold
        rule = f"hold {name} of shape {wanted} and no other weights"
        require(shape == wanted or old, source, rule, f"shape {shape}")


def convert(source: Path, run: Path, **options) -> ModelConfig:
    """Writes a pretrained model as a run, for `hsa_tl.model.load`; nothing is trained.

    Args:
        source (Path): a local folder of transformers with safetensors, or a GGUF file, of a family in FAMILIES.
        run (Path): a new folder, or an empty one.
        options: of ModelConfig: window (512), sinks (4), chunk_size (64), topk (16), selection ("mass"),
            far_positions (512), recency (None: as many chunks as the source was trained to; 0 for none) and hsa_layers
            (0, all).

    Returns:
        ModelConfig: the run's.

    Raises:
        ValueError: a source of another kind, a setting or a weight of it that the model has no place for, by name; a
            run that holds something. ImportError: no transformers.
    """
    require(not run.exists() or (run.is_dir() and not any(run.iterdir())), "run", "be new or empty", run)
    described, save_tokenizer, weights = _read(source)
    config = config_of(described, **options)
    with torch.device("meta"):
        model = Model(config)
    have = weights()
    _check(source, model, have)
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        if name == "output.weight" and config.tied:
            state[name] = state["embedding.weight"]
        else:
            parts = [have[part][1]() for part in names_of(name)]
            state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    if config.tied and "lm_head.weight" in have:
        rule = "hold lm_head.weight equal to model.embed_tokens.weight, as tie_word_embeddings has it"
        require(torch.equal(have["lm_head.weight"][1](), state["embedding.weight"]), source, rule, "another one")
    model.load_state_dict(state, assign=True)
    save_tokenizer(run / TOKENIZER)
    write(run, model, source.name.removesuffix(".gguf"), str(source))
    return config


def write(run: Path, model: Model, name: str, source: str) -> None:
    """The run's checkpoint: of a model as it is configured, which was not trained."""
    changed = {k: v for k, v in asdict(model.config).items() if v != asdict(ModelConfig())[k]}
    recipe = Recipe(name, "tiny", (), lr=1e-5, model=changed, source=source)
    checkpoint.save(run, 0, asdict(recipe), model, (), {}, keep=1)
