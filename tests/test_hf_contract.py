"""What transformers' own tests ask of every causal model (tests/test_modeling_common.py, not in its wheel), in short.

docs/model-and-training.md names those that do not apply.
"""

import copy
import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers, the extra hf")

from test_hf import SMALL
from tiers import prove
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from hsa_tl.model.hf import HSACache, HSAConfig, HSAForCausalLM

V = SMALL.vocab_size
TIED = {"untied": {}, "tied": {"tied": True}}
each_tying = pytest.mark.parametrize("changes", TIED.values(), ids=TIED)


def build(**changes):
    return HSAForCausalLM(HSAConfig(replace(SMALL, **changes), eos_token_id=1, pad_token_id=0)).eval()


@pytest.fixture
def model():
    return build()


@pytest.fixture
def ids():
    return torch.randint(2, V, (2, 40))


# Each gives the same logits as model(ids).
def embedded(m, x):
    return m(inputs_embeds=m.get_input_embeddings()(x)).logits


def moved_to_float64_and_back(m, x):
    return m.double().float()(x).logits


ALIKE = {
    "again": lambda m, x: m(x).logits,
    "a copy": lambda m, x: copy.deepcopy(m)(x).logits,
    "inputs_embeds": embedded,
    "a tuple": lambda m, x: m(x, return_dict=False)[0],
    "int32": lambda m, x: m(x.int()).logits,
    "one at a time": lambda m, x: torch.cat([m(row[None]).logits for row in x]),
    "positions": lambda m, x: m(x, position_ids=torch.arange(40)[None]).logits,
    "chosen columns": lambda m, x: m(x, logits_to_keep=torch.arange(40)).logits,
    "columns of a last count": lambda m, x: torch.cat([m(x).logits[:, :30], m(x, logits_to_keep=10).logits], 1),
    "all layers' states": lambda m, x: m.get_output_embeddings()(m(x, output_hidden_states=True).hidden_states[-1]),
    "float64 and back": moved_to_float64_and_back,
}
ADDITIVE = torch.full((40, 40), torch.finfo(torch.float32).min).triu(1)
MASKS = {
    "int64": torch.ones(2, 40, dtype=torch.int64),
    "bool": torch.ones(2, 40, dtype=torch.bool),
    "float": torch.ones(2, 40),
    "additive row": torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf),
    "additive square": ADDITIVE.expand(2, 1, 40, 40),
    "bool square": (ADDITIVE == 0).expand(2, 1, 40, 40),
    "additive padding": torch.zeros(2, 1, 1, 40),
    "3-D": (ADDITIVE == 0).expand(2, 40, 40),
    "each head": (ADDITIVE == 0).expand(2, 3, 40, 40),
}
HEADS = torch.stack([ADDITIVE == 0, torch.eye(40) > 0]).expand(2, 2, 40, 40)  # which differ


@pytest.mark.parametrize("run", ALIKE.values(), ids=ALIKE)
@torch.no_grad()
def test_the_same_logits_by_another_way(run, model, ids):
    torch.testing.assert_close(run(model, ids), model(ids).logits)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_masks_that_hide_nothing(mask, model, ids):
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", (torch.int8, torch.uint8, torch.int16, torch.int32))
def test_labels_of_any_integers(dtype, model, ids):
    labels = ids.clone()
    labels[0, :9] = -100 if dtype.is_signed else 3
    torch.testing.assert_close(model(ids, labels=labels.to(dtype)).loss, model(ids, labels=labels).loss)


@pytest.mark.parametrize("keep", (1, 7, torch.tensor([3])), ids=str)
def test_the_loss_is_of_all_tokens_whatever_logits_are_kept(keep, model, ids):
    out = model(ids, labels=ids, logits_to_keep=keep)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss)
    assert out.logits.shape[1] < 40


# What is refused, by the argument's name.
REFUSED = {
    "attentions": (lambda m, x: m(x, output_attentions=True), ValueError, "output_attentions must not be True"),
    "unknown": (lambda m, x: m(x, head_mask=None), TypeError, "head_mask"),
    "token out of range": (lambda m, x: m(x + V), ValueError, rf"input_ids must lie in \[0, {V}\), got"),
    "token below 0": (lambda m, x: m(x - V), ValueError, rf"input_ids must lie in \[0, {V}\), got"),
    "label out of range": (lambda m, x: m(x, labels=x + V), ValueError, rf"labels must lie in \[0, {V}\) or be -100"),
    "labels of another length": (lambda m, x: m(x, labels=x[:, 1:]), ValueError, r"labels must have shape \[2, 40\]"),
    "labels of floats": (lambda m, x: m(x, labels=x.float()), TypeError, "labels must be integers"),
    "1-D": (lambda m, x: m(x[0]), ValueError, r"input_ids must have 2 dimensions, got shape \[40\]"),
    "no tokens": (lambda m, x: m(x[:, :0]), ValueError, "input_ids must hold at least one token"),
    "floats": (lambda m, x: m(x.float()), TypeError, "input_ids must be integers"),
    "both": (lambda m, x: m(x, inputs_embeds=embedded(m, x)), ValueError, "input_ids or inputs_embeds must be given"),
    "another cache": (lambda m, x: m(x, past_key_values=((),)), TypeError, "past_key_values must be an HSACache"),
    "columns out of range": (
        lambda m, x: m(x, logits_to_keep=torch.tensor([40])), ValueError, r"logits_to_keep must lie in \[-40, 40\)",
    ),
    "columns in rows": (
        lambda m, x: m(x, logits_to_keep=torch.tensor([[1]])), ValueError,
        r"logits_to_keep must be an int or 1-D, got shape \[1, 1\]",
    ),
    "a mask for each head": (
        lambda m, x: m(x, attention_mask=HEADS), ValueError, "attention_mask must be the same for all heads",
    ),
    "a bias as mask": (lambda m, x: m(x, attention_mask=-torch.rand(2, 40)), ValueError, "attention_mask must be 0"),
    "beams": (lambda m, x: m.generate(x, num_beams=2, max_new_tokens=2), NotImplementedError, "past_key_values"),
    "static cache": (
        lambda m, x: m.generate(x, max_new_tokens=2, cache_implementation="static"), ValueError, "cache_implementation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_by_name(case, model, ids):
    call, error, message = case
    with pytest.raises(error, match=message):
        call(model, ids)


@each_tying
@pytest.mark.parametrize("size", (60, 40))
def test_resized_embeddings(changes, size, ids, tmp_path):
    model = build(**changes)
    before = model.get_input_embeddings().weight[:40].clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    new = model.get_input_embeddings().weight[50:]
    assert not len(new) or new.std().item() == pytest.approx(model.model.config.embedding_std, rel=0.2)
    model.save_pretrained(tmp_path)
    for m in (model, HSAForCausalLM.from_pretrained(tmp_path).eval()):
        embedding, head = m.get_input_embeddings(), m.get_output_embeddings()
        assert len(embedding.weight) == len(head.weight) == m.config.vocab_size == m.model.config.vocab_size == size
        assert torch.equal(embedding.weight[:40], before)
        assert (embedding.weight is head.weight) == bool(changes)
        out = m(ids % size, labels=ids % size)
        assert out.logits.shape == (2, 40, size) and out.loss.isfinite()


@each_tying
def test_parameters_are_those_of_the_state(changes, tmp_path):
    model = build(**changes)
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    assert names <= set(model.state_dict())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == bool(changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # in several files
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = HSAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    for name, x in again.state_dict().items():
        assert torch.equal(x, model.state_dict()[name].to(x.dtype)), name


def test_gradient_checkpointing_changes_no_gradient(ids):
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = build().train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing == on
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_hidden_states_keep_their_gradient(model, ids):
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == SMALL.layers + 1
    assert all(x.shape == (2, 40, SMALL.dim) for x in out.hidden_states)
    for x in out.hidden_states[:-1]:
        x.retain_grad()
    out.logits.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in out.hidden_states[:-1])


def test_every_parameter_trains(ids):
    model = build().train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("labels", ([[V]], [[1, 2]]), ids=("out of range", "another length"))
def test_a_refused_call_leaves_the_cache_as_it_was(labels, model, ids):
    with torch.no_grad():
        cache = model(ids[:1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="labels must"):
            model(ids[1:, :1], past_key_values=cache, labels=torch.tensor(labels))
        got = model(ids[1:, :1], past_key_values=cache).logits[:, -1]
        want = model(torch.cat([ids[:1], ids[1:, :1]], 1)).logits[:, -1]
    torch.testing.assert_close(got, want)


def test_fields_of_the_config_are_set_read_and_misspelt(model, tmp_path):
    config = HSAConfig(SMALL)
    config.topk, config.num_hidden_layers = 5, 4
    assert config.topk == config.model_config.topk == 5 and HSAForCausalLM(config).model.config.layers == 4
    model.save_pretrained(tmp_path)
    assert HSAForCausalLM.from_pretrained(tmp_path, topk=3).model.config.topk == 3
    with pytest.raises(ValueError, match="windw must be a field of ModelConfig or PretrainedConfig, such as window"):
        HSAConfig(SMALL, windw=8)
    with pytest.raises(TypeError, match=r"memory_options must be among undo, offload, .*got ofload"):
        HSACache(ofload=True)


def test_config_has_what_other_libraries_ask_for():
    config = HSAConfig(hidden_size=64, num_hidden_layers=3, vocab_size=99, num_attention_heads=8)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 3, 99)
    config.vocab_size = 77
    assert config.model_config.vocab_size == config.get_text_config().vocab_size == 77
    assert config.to_dict()["hidden_size"] == 64
    again = HSAConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() and copy.deepcopy(config).to_dict() == config.to_dict()
    assert HSAConfig().model_config.dim == HSAConfig().hidden_size  # without arguments
    forward = list(inspect.signature(HSAForCausalLM.forward).parameters)
    assert forward[1:3] == ["input_ids", "attention_mask"]


def byte_tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {chr(97 + i): i + 2 for i in range(26)} | {" ": 28}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=" "))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def test_generation_config_and_tokenizer_are_saved_beside(model, tmp_path):
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, max_new_tokens=4)
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (1, 0)
    assert (again.config.eos_token_id, again.config.pad_token_id) == (1, 0)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = write(["a sentence of some length", "b"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert [x[0]["generated_text"][0] for x in texts] == ["a", "b"]
    state = write("abc", max_new_tokens=3, do_sample=False, return_full_text=False)
    assert len(state) == 1


def test_auto_classes_without_an_import(model, tmp_path):
    """auto_map names a module that lies beside the weights."""
    model.save_pretrained(tmp_path)
    code = f"""if True:
        import sys
        from transformers import AutoModelForCausalLM
        m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
        print(type(m).__name__, "hsa_tl.model.hf" in sys.modules)
    """
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == ["HSAForCausalLM", "True"], result.stderr


def test_a_cache_with_disk_and_offload(model, ids, tmp_path):
    """The options reach the chunk memory, and change no token."""
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    for options in (
        {"directory": str(tmp_path / "new" / "kv")},
        {"offload": True, "cache_pages": 4},
        {"two_level": True},
        {"budget": 2},  # as many chunks as there are
    ):
        cache = HSACache(capacity=64, **options)
        model(ids[:1].flip(1), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.lengths(2) == [0, 0]
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache), want)
        assert cache.state.memory.held == [2, 2]


@prove
def test_trainer(model, tmp_path):
    """A few steps of transformers' own loop, with accumulation and checkpointing, resumed from what it saved."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": x, "labels": x} for x in torch.randint(2, V, (16, 24))]
    options = {
        "output_dir": tmp_path, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [],
        "save_steps": 2, "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing": True,
    }  # fmt: skip
    first = Trainer(model, TrainingArguments(max_steps=4, **options), train_dataset=data)
    first.train()
    second = Trainer(build(), TrainingArguments(max_steps=4, **options), train_dataset=data)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_lora(model, ids):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q", "v"], lora_alpha=4)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    torch.testing.assert_close(tuned(ids).logits, model(ids).logits)  # B begins as 0
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 1.0)
    tuned(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.allclose(tuned(ids).logits, model(ids).logits)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, HSAForCausalLM) and merged(ids).logits.isfinite().all()
