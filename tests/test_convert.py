"""hsa-tl convert: what transformers computes within the window, every weight accounted for, a run like any other."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hsa_tl.cli import app
from hsa_tl.model import load
from hsa_tl.model.convert import config_of, convert
from hsa_tl.model.data import ByteTokenizer
from hsa_tl.model.landmarks import find_landmarks
from hsa_tl.model.train import reconfigure

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 257, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-3, "eos_token_id": 256,
    "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SOURCES = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with biases": (
        "LlamaForCausalLM", {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                         "rope_theta": 1e4}}),
    "llama 3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 96, "head_dim": 12}),
}  # fmt: skip
T = 90


def source(folder, name="llama", dtype=torch.float32, **options):
    """A random model of a family in a folder, with weights large enough that every one of them counts."""
    kind, more = SOURCES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**SIZES | more))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.data.add_(
            torch.randn_like(parameter) * 0.3
        )
    model.to(dtype).eval().save_pretrained(folder, **options)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ByteTokenizer().fast(), eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(folder)
    return model


EVERY = {"window": 16, "sinks": 3, "chunk_size": 16, "topk": "all", "far_positions": T}


@pytest.mark.parametrize("options", ({"window": 96}, EVERY))
@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_transformers(name, options, tmp_path):
    """Within the window; and beyond it, of all chunks where they stood in training."""
    model = source(tmp_path / "source", name)
    (tmp_path / "run").mkdir()
    config = convert(tmp_path / "source", tmp_path / "run", **options)
    ours = load(tmp_path / "run")
    assert ours.config == config and config.heads // config.kv_heads == 3 and not ours.training
    ids = torch.randint(257, (2, T))
    with torch.no_grad():
        want, got = model(ids).logits, ours(ids).logits
        assert want.std() > 0.5
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        cache = ours.new_cache(2)
        parts = [ours(x, cache=cache).logits for x in ids.split([60, 1, 9, 20], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    assert [ours.config.tied, len(ours.config.biases)] == [
        model.config.tie_word_embeddings, {"llama with biases": 4, "qwen2": 3}.get(name, 0)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source in shards, and its run with a window far below the prompts of these tests."""
    folder = tmp_path_factory.mktemp("small")
    source(folder / "source", "qwen2", torch.bfloat16, max_shard_size="30KB")
    assert len(list((folder / "source").glob("*.safetensors"))) > 2
    convert(folder / "source", folder / "run", window=16, sinks=2, chunk_size=16, topk=1)
    return folder


def test_shards_of_another_type(small):
    model = transformers.AutoModelForCausalLM.from_pretrained(small / "source", dtype=torch.float32)
    ids = torch.randint(257, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(load(small / "run")(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_options_reach_the_model(small, tmp_path):
    """Beyond the window they differ: what is chosen counts."""
    ids = torch.randint(257, (1, T), generator=torch.Generator().manual_seed(0))
    options = {"window": 16, "sinks": 2, "chunk_size": 16}
    logits = [load(small / "run")(ids).logits]
    others = {"topk": "all"}, {"topk": 0}, {"topk": 1, "selection": "mean"}, {"sinks": 0, "topk": 1}
    for i, more in enumerate((*others, {"topk": 1, "hsa_layers": 2}, {"topk": "all", "far_positions": 20})):
        config = convert(small / "source", tmp_path / str(i), **options | more)
        assert {k: getattr(config, k) for k in options | more} == options | more
        logits.append(load(tmp_path / str(i))(ids).logits)
    for a in range(len(logits)):
        for b in range(a):
            assert (logits[a] - logits[b]).abs().max() > 1e-2, (a, b)


def test_so_many_layers_choose_chunks(small, tmp_path):
    """Evenly spread, the last one among them; of the others nothing but window and sinks counts."""
    options = ("--window", 16, "--chunk-size", 16, "--far-positions", 20, "--hsa-layers", 2)
    assert load(small / "run").config.recency == 128 // 16  # as many chunks as it was trained to
    run("convert", small / "source", tmp_path / "plain", "--recency", 0)
    assert load(tmp_path / "plain").config.recency is None
    run("convert", small / "source", tmp_path / "run", *options)
    model = load(tmp_path / "run")
    rules = [layer.attention.rule for layer in model.layers]
    assert [(rule.topk, rule.far_positions) for rule in rules] == [(0, 20), (16, 20), (16, 20)]
    for layers, chosen in ((0, range(30)), (1, [29]), (2, [14, 29]), (30, range(30))):
        config = dataclasses.replace(model.config, layers=30, hsa_layers=layers)
        assert [i for i in range(30) if config.chooses(i)] == list(chosen)
    ids = torch.randint(257, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache, whole = model.new_cache(2), model(ids).logits
        parts = torch.cat([model(x, cache=cache).logits for x in ids.split([60, 1, 9, 20], 1)], 1)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)
        reconfigure(model, dataclasses.replace(model.config, topk=0, hsa_layers=0))
        assert (model(ids).logits - whole).abs().max() > 1e-2


WEIGHT = "model.layers.1.mlp.gate_proj.weight"
DAMAGES = {
    "missing": (lambda w: w.pop(WEIGHT), rf"must hold {WEIGHT} of shape \(40, 48\) and no other .*, got shape none"),
    "superfluous": (
        lambda w: w.update({"model.layers.3.x": torch.zeros(2)}), r"model.layers.3.x of shape none .*, got shape \(2,\)"
    ),
    "misshaped": (
        lambda w: w.update({WEIGHT: torch.zeros(48, 40)}), rf"{WEIGHT} of shape \(40, 48\) .*, got shape \(48, 40\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_weight_is_accounted_for(damage, tmp_path):
    source(tmp_path / "source")
    change, message = DAMAGES[damage]
    weights = load_file(tmp_path / "source/model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_old_files_hold_is_no_weight(tmp_path):
    source(tmp_path / "source")
    weights = load_file(tmp_path / "source/model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "source/model.safetensors", {"format": "pt"})
    assert convert(tmp_path / "source", tmp_path / "run").tied


def test_a_head_of_its_own_is_not_tied(tmp_path):
    source(tmp_path / "source")
    weights = load_file(tmp_path / "source/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head.weight equal to model.embed_tokens.weight, as tie"):
        convert(tmp_path / "source", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    (
        ({"model_type": "gpt2"}, "model_type of the source must be one of llama, qwen2, qwen3, mistral, got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act of the source must be silu, got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias of the source must be False, got True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type of the source must be one of default, linear, llama3, got 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config of the source must"),
    ),
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_is_not_supported_is_named(change, message, tmp_path):
    source(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ("Mistral3", "Qwen2_5_VL", "Mamba"))
def test_a_family_whose_config_has_no_length_of_its_own_is_named(family):
    with pytest.raises(ValueError, match="model_type of the source must be one of llama, qwen2, qwen3, mistral, got"):
        config_of(getattr(transformers, f"{family}Config")())


def test_a_window_wider_than_the_sources_is_refused(tmp_path):
    source(tmp_path / "source", "mistral")
    with pytest.raises(ValueError, match="sliding_window of the source must be at least --window = 97, got 96"):
        convert(tmp_path / "source", tmp_path / "run", window=97)


def test_sources_and_runs_that_are_none(tmp_path, small):
    with pytest.raises(ValueError, match=r"source must be a .gguf file or a folder with config.json, got"):
        convert(tmp_path, tmp_path / "run")
    for run in (small / "run", small / "source/config.json"):
        with pytest.raises(ValueError, match="run must be new or empty, got"):
            convert(small / "source", run)
    source(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors must be a whole safetensors file, got"):
        convert(tmp_path / "source", tmp_path / "run")
    file.unlink()
    with pytest.raises(ValueError, match="source must hold its weights as safetensors, got no"):
        convert(tmp_path / "source", tmp_path / "run")


def test_a_gguf_file_is_read_by_transformers(tmp_path, monkeypatch):
    """Whose reader is stood in for by that of a folder: it needs a package that CI does not have; make llm has it."""
    folder = tmp_path / "source"
    model, missing = source(folder, "llama 3"), set()
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(transformers, name)
        read = kind.from_pretrained

        def stand_in(where, *, gguf_file=None, output_loading_info=False, read=read, **options):
            assert gguf_file in (None, "model.gguf")  # None: transformers, of itself
            found = read(where, **options)
            return (found, {"missing_keys": missing, "unexpected_keys": set()}) if output_loading_info else found

        monkeypatch.setattr(kind, "from_pretrained", stand_in)
    (folder / "model.gguf").touch()
    convert(folder / "model.gguf", tmp_path / "run")
    ours, ids = load(tmp_path / "run"), torch.randint(257, (1, T))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert ours.tokenizer.end == 256
    missing.add("lm_head.weight")
    with pytest.raises(ValueError, match=r"must hold all weights and no others, got missing_keys: lm_head.weight"):
        convert(folder / "model.gguf", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_prompt_begins_as_the_source_does(tmp_path):
    """With the token that its tokenizer puts before every text, and ends at its end token."""
    from tokenizers.processors import TemplateProcessing

    from hsa_tl.model.data import FileTokenizer

    fast = ByteTokenizer().fast()
    fast.add_special_tokens(["<s>", "<stop>"])
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="<stop>")
    made.save_pretrained(tmp_path)
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert [*tokenizer.begin, *tokenizer.encode("ab")] == made("ab")["input_ids"] == [257, 97, 98]
    assert tokenizer.end == 258
    (tmp_path / "tokenizer_config.json").unlink()
    other = FileTokenizer(tmp_path / "tokenizer.json")
    assert other.end == 256 and other.begin == ()


def run(*arguments, code=0) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_command(small, tmp_path):
    """A run that generates and exports as others do; the chat template comes along."""
    made = tmp_path / "run"
    options = ("--window", 16, "--sinks", 2, "--chunk-size", 16)
    output = run("convert", small / "source", made, *options, "--topk", "all", "--selection", "mean")
    assert "3 layers that see 2 first tokens, a window of 16 and all chunks of 16 by mean" in output
    assert load(made).config.topk == "all" and load(made).config.selection == "mean"
    text = run("generate", made, "hello, what is it that is here?", "--max-new-tokens", 5, "--threads", 1)
    run("export", made, tmp_path / "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "n1"}], tokenize=False) == "n1!"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    ids = tokenizer("hello, what is it that is here?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, load(made)(ids).logits)
        assert torch.equal(theirs.generate(ids, max_new_tokens=5, do_sample=False), load(made).generate(ids, 5))
    assert text


def test_landmarks(small, tmp_path):
    """Found in one text and judged in another; the run keeps them, and they choose better than mean keys do."""
    made, text = tmp_path / "run", tmp_path / "text.txt"
    run("convert", small / "source", made, "--window", 16, "--sinks", 2, "--chunk-size", 16, "--topk", 2)
    before = load(made)
    generator = torch.Generator().manual_seed(0)
    text.write_bytes(bytes((97 + torch.randint(26, (900,), generator=generator)).tolist()))
    output = run("landmarks", made, text, "--length", 300, "--anchors", 8, "--contexts", 2, "--threads", 1)
    assert "layer mass landmark mean" in output
    assert re.search(r"\d of 6 key/value heads choose by 8 anchors, \d by the exact mass", output)
    after = load(made)
    assert after.config == dataclasses.replace(
        before.config, selection="landmark", anchors=8, exact_heads=after.config.exact_heads
    )
    tokens = before.tokenizer.encode(text.read_bytes())
    texts = [tokens[:300], tokens[300:600]], [tokens[600:]]
    recalls = find_landmarks(before, *texts, anchors=256, tolerance=1.0)
    mass, landmark, mean = (torch.tensor(recalls[name]) for name in ("mass", "landmark", "mean"))
    assert mass.shape == (3, 2) and (mass <= 1).all() and before.config.exact_heads == ()
    assert mean.mean() < landmark.mean() <= mass.mean() + 0.01  # with as many anchors as these know queries
    with torch.no_grad():
        exact = load(tmp_path / "run")
        reconfigure(exact, dataclasses.replace(exact.config, selection="mass"))
        ids = torch.tensor([tokens[300:600]])
        assert not torch.equal(before(ids).logits, exact(ids).logits)
        assert find_landmarks(before, *texts, anchors=4, tolerance=0.0)["mass"] == recalls["mass"]
        assert before.config.exact_heads == (0, 1, 2, 3, 4, 5) and before.config.anchors == 4
        assert torch.equal(before(ids).logits, exact(ids).logits)
    with torch.no_grad():
        ids = torch.tensor([tokens[:300]])
        cache = after.new_cache(1)
        parts = [after(x, cache=cache).logits for x in ids.split([120, 1, 9, 170], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), after(ids).logits, atol=1e-4, rtol=0)


def test_landmarks_of_some_layers(small, tmp_path):
    """What is printed is of the layers that choose, and a cache keeps landmarks for no others."""
    made, text = tmp_path / "run", tmp_path / "text.txt"
    options = ("--window", 16, "--sinks", 2, "--chunk-size", 16, "--topk", 2, "--hsa-layers", 2)
    run("convert", small / "source", made, *options)
    generator = torch.Generator().manual_seed(0)
    text.write_bytes(bytes((97 + torch.randint(26, (450,), generator=generator)).tolist()))
    output = run("landmarks", made, text, "--length", 150, "--anchors", 8, "--threads", 1)
    assert re.search(r"\d of 4 key/value heads choose by 8 anchors, \d by the exact mass", output)
    assert " 0.0 " not in output
    model = load(made)
    cache, ids = model.new_cache(1), torch.randint(257, (1, 90), generator=generator)
    with torch.no_grad():
        parts = [model(x, cache=cache).logits for x in ids.split([60, 1, 9, 20], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, atol=1e-4, rtol=0)
    assert [own.landmarks is None for own in cache.layers] == [True, False, False]


def test_what_landmarks_need_is_told(small, tmp_path):
    made, text = tmp_path / "run", tmp_path / "text.txt"
    options = ("--window", 16, "--sinks", 2, "--chunk-size", 16)
    run("convert", small / "source", made, *options, "--topk", "all")
    text.write_text("x" * 1000)
    assert "with a topk, got selected and topk all" in run("landmarks", made, text, "--length", 200, code=2)
    run("convert", small / "source", tmp_path / "other", *options)
    for more, message in (
        ((), "text must hold 3 times length = 4096 tokens, got 1000"),
        (("--length", 100), "held_out must be of more than 289 tokens, got 100"),
        (("--length", 300, "--contexts", 1, "--anchors", 4096), "at least anchors = 4096 queries, got 768"),
    ):
        assert message in run("landmarks", tmp_path / "other", text, *more, code=2)
    assert load(tmp_path / "other").config.selection == "mass"
    with pytest.raises(ValueError, match="must be 0, hsa-tl landmarks finds them in a run, got 4"):
        convert(small / "source", tmp_path / "third", selection="landmark", anchors=4)


@pytest.mark.parametrize(
    "options, message",
    (
        (("--topk", "some"), "topk must be a number of chunks from 0 on or all, got 'some'"),
        (("--selection", "best"), "selection must be one of mass, mean, landmark, got 'best'"),
        (("--hsa-layers", 4), "hsa_layers must be at most layers = 3, got 4"),
        (("--chunk-size", 17), "chunk_size must be 16, 32, 64 or 128, got 17"),
    ),
)
def test_what_is_wrong_is_one_line(options, message, small, tmp_path):
    assert message in run("convert", small / "source", tmp_path / "run", *options, code=2)
    assert not (tmp_path / "run").exists()
