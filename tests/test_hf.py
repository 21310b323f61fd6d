"""The model in transformers: generate equals ours, left padding is taken out, checkpoints are whole or refused."""

from dataclasses import replace

import pytest
import torch
from tiers import tiered

pytest.importorskip("transformers", reason="needs transformers, the extra hf")

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hsa_tl.model import Model, hf, preset
from hsa_tl.model.data import ByteTokenizer
from hsa_tl.model.hf import HSACache, HSAConfig, HSAForCausalLM

SMALL = replace(
    preset("tiny"), dim=32, heads=4, kv_heads=2, head_dim=16, mlp_dim=48, retrieval_dim=16, vocab_size=50,
    encoder_mlp_dim=32, window=12, topk=3, rope=("swa",),
)  # fmt: skip
LENGTHS = (70, 3, 33)


@pytest.fixture
def model():
    return HSAForCausalLM(HSAConfig(SMALL)).eval()


def left_padded():
    rows = [torch.randint(50, (n,)) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7, padding_side="left")
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(LENGTHS)[:, None]
    return rows, {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("segment", tiered((9, 4096), quick=(9,)))
@pytest.mark.parametrize("options", ({}, {"prefill_chunk_size": 13}, {"use_cache": False}), ids=str)
def test_generate_equals_ours(model, segment, options, monkeypatch):
    monkeypatch.setattr(hf, "SEGMENT", segment)
    rows, batch = left_padded()
    want = torch.stack([x[-8:] for x in model.model.generate(rows, 8)])
    got = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=7, **options)
    assert torch.equal(got[:, 70:], want) and torch.equal(got[:, :70], batch["input_ids"])


@pytest.mark.parametrize("keep", (1, 2, 3))
def test_a_long_prompt_keeps_the_logits_asked_for(model, keep, monkeypatch):
    monkeypatch.setattr(hf, "SEGMENT", 9)
    ids = torch.randint(50, (1, 40))
    with torch.no_grad():
        got = model(ids, use_cache=True, logits_to_keep=keep).logits
        torch.testing.assert_close(got, model.model(ids, logits_to_keep=keep).logits)


def test_sampling_runs_and_a_cache_can_be_continued(model):
    ids = torch.randint(50, (1, 40))
    torch.manual_seed(0)
    model.generate(ids, max_new_tokens=5, do_sample=True, top_p=0.9, pad_token_id=7)
    want = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=7)
    several = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3, pad_token_id=7)
    assert several.shape == (3, 45)
    first = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=7, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, HSACache) and cache.state.lengths == [43]
    more = model.generate(first.sequences, max_new_tokens=5, do_sample=False, pad_token_id=7, past_key_values=cache)
    assert torch.equal(more, want) and cache.state.lengths == [48]  # nothing is read twice
    with pytest.raises(NotImplementedError, match="only grow"):
        model.generate(ids, max_new_tokens=3, num_beams=2, pad_token_id=7)


def test_padding_on_either_side_changes_no_logits_and_no_loss(model):
    rows, batch = left_padded()
    right = {k: torch.stack([x[b].roll(n) for b, n in enumerate(LENGTHS)]) for k, x in batch.items()}
    for inputs, left in ((batch, True), (right, False)):
        out = model(**inputs, labels=inputs["input_ids"])
        total = 0
        for b, row in enumerate(rows):
            want = model.model(row[None], labels=row[None])
            got = out.logits[b, -len(row) :] if left else out.logits[b, : len(row)]
            torch.testing.assert_close(got, want.logits[0])
            total += want.loss * (len(row) - 1)
        torch.testing.assert_close(out.loss, total / (sum(LENGTHS) - 3))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_by_a_mask_of_any_form(model):
    """Left padding said by 0 and 1, bool, additive, and by square masks such as transformers makes of it."""
    _, batch = left_padded()
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    T = ids.shape[1]
    square = real[:, None, None] & torch.ones(T, T, dtype=torch.bool).tril() | torch.eye(T, dtype=torch.bool)
    square &= real[:, None, :, None]  # rows of padding see nothing, or everything as for flash attention
    low = torch.finfo(torch.float32).min
    want = model(**batch).logits[real]
    for mask in (
        real, real.float(), torch.zeros(ids.shape).masked_fill(~real, low), square,
        torch.zeros(square.shape).masked_fill(~square, low), square | ~real[:, None, :, None],
    ):  # fmt: skip
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], want)


@pytest.mark.parametrize("gradients", (False, True))
def test_the_usual_decode_loop(model, gradients):
    """use_cache=True gives a cache, with gradients too, and the next call reads on from it."""
    ids = torch.randint(50, (2, 40))
    want = model.generate(ids, attention_mask=ids >= 0, max_new_tokens=6, do_sample=False, pad_token_id=7)[:, 40:]
    cache, new, got = None, ids, []
    with torch.set_grad_enabled(gradients):
        for _ in range(6):
            out = model(new, past_key_values=cache, use_cache=True)
            cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
            got.append(new)
    assert torch.equal(torch.cat(got, 1), want)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("changes", ({}, {"encoder_overlap": 9}), ids=str)
def test_packed_documents_see_nothing_of_each_other(changes):
    """Packing by position_ids that start again, or by a square mask; the loss too."""
    model = HSAForCausalLM(HSAConfig(replace(SMALL, **changes))).eval()
    lengths = (17, 40, 1, 12)
    ids, labels = torch.randint(50, (2, 70)), torch.randint(50, (2, 70))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    document = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    square = (document[:, None] == document) & torch.ones(70, 70, dtype=torch.bool).tril()
    alone = [model(x, labels=y) for x, y in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)]
    loss = sum(o.loss * (n - 1) for o, n in zip(alone, lengths, strict=True) if n > 1) / sum(n - 1 for n in lengths)
    for packing in ({"position_ids": positions}, {"attention_mask": square.expand(2, 1, 70, 70)}):
        out = model(ids, labels=labels, use_cache=False, **packing)
        torch.testing.assert_close(out.logits, torch.cat([o.logits for o in alone], 1))
        torch.testing.assert_close(out.loss, loss)


def test_accumulated_batches_give_the_gradient_of_one(model):
    """As Trainer does it: the sum over each part, divided by num_items_in_batch."""
    ids = torch.randint(50, (8, 40))
    norms = []
    for parts in ([ids], ids.split(2)):
        model.zero_grad()
        items = torch.tensor(sum(x[:, 1:].numel() for x in parts))
        for x in parts:
            model(x, labels=x, num_items_in_batch=items).loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*norms)


SAVED = (
    {}, {"tied": True}, {"experts": 4, "experts_per_token": 2, "layers": 4}, {"encoder_overlap": 2, "fusion": "mass"},
)  # fmt: skip


@pytest.mark.parametrize("changes", SAVED, ids=str)
def test_save_and_load(changes, tmp_path):
    model = HSAForCausalLM(HSAConfig(replace(SMALL, **changes))).eval()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HSAConfig) and config.model_config == model.config.model_config
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, HSAForCausalLM)
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[k], x) for k, x in model.state_dict().items())
    ids = torch.randint(50, (2, 60))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    plain = Model(config.model_config)
    plain.load_state_dict({k.removeprefix("model."): x for k, x in state.items()})


def test_a_damaged_or_other_checkpoint_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    for cut in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="must hold all weights of this model, got a damaged file"):
            HSAForCausalLM.from_pretrained(tmp_path)
    file.write_bytes(data)
    for changes, message in (
        ({"layers": 3}, "got missing keys"),
        ({"encoder_layers": 2}, "got missing keys"),
        ({"conv": 0}, r"got unexpected keys \['model.conv.weight_WC'\]"),
        ({"mlp_dim": 64}, "size mismatch|mismatched"),
    ):
        HSAConfig(replace(SMALL, **changes)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_config_errors_name_the_field():
    with pytest.raises(ValueError, match="heads must be an int of at least 1, got 0"):
        HSAConfig({"heads": 0})
    with pytest.raises(ValueError, match=r"model must hold fields of ModelConfig: .*'depth'"):
        HSAConfig({"depth": 3})


def test_generate_takes_a_tokenizer(model):
    """Which transformers' server always passes, and stop_strings needs."""
    fast = ByteTokenizer().fast()
    ids, options = torch.randint(50, (1, 40)), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 7}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    free = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, tokenizer=tokenizer, **options), free)
    stop = tokenizer.decode(free[0, 41:42])
    stopped = model.generate(ids, tokenizer=tokenizer, stop_strings=stop, **options)
    assert torch.equal(stopped, free[:, : stopped.shape[1]]) and stopped.shape[1] <= 42
