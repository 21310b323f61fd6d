"""Training batches: a seed and an index decide, the loss counts what it must, and a wrong description is named."""

import json
import re

import numpy as np
import pytest
import torch
from token_files import write_tokens

from hsa_tl.model import sources
from hsa_tl.model.data import ByteTokenizer


@pytest.fixture
def file(tmp_path):
    """Of documents that do not repeat."""
    texts = [f"document {i}: " + "naïve words and more of them. " * (5 + i) for i in range(60)]
    return write_tokens(tmp_path / "train.bin", texts)


def test_windows_cover_an_epoch_once(tmp_path):
    file = write_tokens(tmp_path / "x.bin", [np.random.default_rng(0).bytes(5000)])
    source = sources.make_source({"kind": "text", "path": str(file.path)}, 64, seed=3)
    rows = source.batch(0, source.windows).input_ids
    starts = {bytes(np.asarray(file.tokens[i : i + 64]).astype(np.uint16)): i for i in range(len(file) - 63)}
    found = sorted(starts[bytes(r.numpy().astype(np.uint16))] for r in rows)
    assert np.all(np.diff(found) == 64) and len(found) == len(file) // 64
    again = source.batch(source.windows, source.windows).input_ids
    assert not (rows == again).all()


PAIRS = [json.dumps({"prompt": f"What is {i} + {i}? ", "answer": str(2 * i)}) for i in range(50)]
SPECS = (
    {"kind": "text", "needles": 0.5},
    {"kind": "self-copy"},
    {"kind": "needles", "tasks": [{"needles": 6, "queries": 2}, {"needles": 0, "key_tokens": 2, "weight": 3}]},
    {"kind": "ruler"},
    {"kind": "pairs"},
    {"kind": "mix", "sources": [{"kind": "ruler"}, {"kind": "needles", "tasks": [{}], "weight": 3}]},
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s["kind"])
def test_a_batch_depends_on_seed_and_index_only(spec, file, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(PAIRS))
    paths = {"text": file.path, "self-copy": file.path, "pairs": tmp_path / "pairs.jsonl"}

    def make(seed):
        path = {"path": str(paths[spec["kind"]])} if spec["kind"] in paths else {}
        return sources.make_source(spec | path, 700, seed)

    source = make(5)
    one, rest = source.batch(7, 5), make(5).batch(9, 3)
    assert one.input_ids.shape == one.labels.shape == (5, 700)
    assert (one.input_ids[2:] == rest.input_ids).all() and (one.labels[2:] == rest.labels).all()
    assert not (make(6).batch(7, 5).input_ids == one.input_ids).all()
    counted = one.labels != sources.IGNORE
    assert (one.labels[counted] == one.input_ids[counted]).all() and counted.any(1).all()
    assert int(one.input_ids.max()) < source.vocab_size
    if spec["kind"] == "self-copy":
        assert (one.input_ids[:, :350] == one.input_ids[:, 350:]).all()
        assert not counted[:, :350].any() and counted[:, 350:].all()


def test_the_loss_counts_the_answers_of_pairs(tmp_path):
    """Each with the end behind it; a pair that does not fit is left out, and the rest of a sample is no answer."""
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([*PAIRS, json.dumps({"prompt": "x" * 90, "answer": "never"})]))
    spec = {"kind": "pairs", "path": str(file)}
    with pytest.warns(UserWarning, match="1 of 51 pairs are left out, of more than 90 tokens"):
        source = sources.make_source(spec, 90, 0)
    batch = source.batch(0, 20)
    for tokens, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        text = "".join("|" if t == 256 else chr(t) for t in tokens)
        pairs = re.findall(r"What is (\d+) \+ \1\? (\d+)\|", text)
        assert len(pairs) > 3 and all(int(b) == 2 * int(a) for a, b in pairs)
        counted = "".join("|" if t == 256 else chr(t) for t in labels if t != sources.IGNORE)
        assert counted == "".join(f"{b}|" for _, b in pairs)
    with pytest.raises(ValueError, match=r"must have at most 9 tokens, got none of 51"):
        sources.make_source(spec, 9, 0)
    assert sources.validation_source(spec, 90, 0) is None
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "Q ", "answer": "A"}))
    unseen = sources.validation_source(spec, 90, 0).batch(0, 1).input_ids[0].tolist()
    assert bytes(unseen[:3]) == b"Q A" and set(unseen[3:]) <= {256, *b"Q A"}


def test_half_a_character_in_a_pair_is_a_question_mark(tmp_path):
    """As in a row that `hsa-tl prepare` reads."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a\ud800", "answer": "b"}))
    batch = sources.make_source({"kind": "pairs", "path": str(tmp_path / "train.jsonl")}, 4, 0).batch(0, 1)
    assert batch.input_ids.tolist() == [[*b"a?b", 256]]


def test_a_mix_has_its_shares(file):
    """Each by its weight, and all of a source's own samples, in its order."""
    tasks = [{"needles": 2}, {"needles": 3}]
    parts = [{"kind": "text", "path": str(file.path), "needles": 0.5}, {"kind": "needles", "tasks": tasks}]
    mix = {"kind": "mix", "sources": [parts[0] | {"weight": 3}, parts[1]]}
    batch = sources.make_source(mix, 400, 1).batch(0, 800)
    needles = batch.input_ids[:, -3] == 1
    text = ~needles
    for part, spec in zip((text, needles), parts, strict=True):
        assert (batch.input_ids[part] == sources.make_source(spec, 400, 1).batch(0, int(part.sum())).input_ids).all()
    assert 0.7 < text.float().mean() < 0.8
    marks = (batch.input_ids[needles] == 0).sum(1)
    asked = [b"Question: " in bytes(row.clamp(max=255).tolist()) for row in batch.input_ids[text]]
    assert 0.35 < sum(asked) / len(asked) < 0.65 and 0.35 < (marks == 2).float().mean() < 0.65
    assert isinstance(sources.tokenizer_of(mix), ByteTokenizer)
    held_out = write_tokens(file.path.with_name("held_out.bin"), [b"never trained on, " * 99])
    text, needles = sources.validation_source(mix, 400, 1).parts
    assert text.file.path == held_out.path and needles.seed == 1999


def test_a_mix_reads_each_window_of_a_text_once_an_epoch(tmp_path):
    """However few of the samples are text, and wherever reading begins."""
    file = write_tokens(tmp_path / "x.bin", [np.random.default_rng(0).bytes(64 * 40)])
    text = {"kind": "text", "path": str(file.path)}
    mix = {"kind": "mix", "sources": [text, {"kind": "needles", "tasks": [{}], "weight": 40}]}
    batch = sources.make_source(mix, 64, 3).batch(0, 4000).input_ids
    windows = [bytes(x) for x in sources.make_source(text, 64, 3).batch(0, 80).input_ids.to(torch.uint8).numpy()]
    found = [x for x in (bytes(row) for row in batch.to(torch.uint8).numpy()) if x in windows]
    assert len(set(windows[:40])) == 40 and 60 < len(found) < 140 and found[:80] == windows[: len(found)]
    assert (sources.make_source(mix, 64, 3).batch(3000, 3).input_ids == batch[3000:3003]).all()


def test_needles_are_inserted_into_their_share_of_samples(file):
    source = sources.make_source({"kind": "text", "path": str(file.path), "needles": 0.1}, 400, seed=0)
    asked = [b"Question: " in bytes(row.clamp(max=255).tolist()) for row in source.batch(0, 1000).input_ids]
    assert 70 <= sum(asked) <= 130


def test_needles_are_inserted_among_copies_too(file):
    """What is no copy is a haystack, whose every token counts."""
    source = sources.make_source({"kind": "self-copy", "path": str(file.path), "needles": 0.1}, 800, seed=0)
    batch = source.batch(0, 500)
    copies = (batch.input_ids[:, :400] == batch.input_ids[:, 400:]).all(1)
    asked = [b"Question: " in bytes(row.clamp(max=255).tolist()) for row in batch.input_ids]
    assert asked == (~copies).tolist() and 30 <= sum(asked) <= 70
    assert (batch.labels[~copies] == batch.input_ids[~copies]).all()
    assert (batch.labels[copies, :400] == sources.IGNORE).all()


@pytest.mark.parametrize("kind", ("text", "self-copy"))
def test_needles_that_do_not_fit_are_refused_at_once(kind, file):
    """And what is taken has room for every sample."""
    spec = {"kind": kind, "path": str(file.path), "needles": 1.0}
    with pytest.raises(ValueError, match="length must leave room for samples of mq-niah, got 368"):
        sources.make_source(spec, 368, 0)
    assert len(sources.make_source(spec, 376, 0).batch(0, 400).input_ids) == 400


@pytest.mark.parametrize(
    "name, short, enough", (("s-niah", 102, 110), ("mk-niah-1", 224, 230), ("mk-niah-2", 106, 110))
)
def test_the_longest_samples_of_a_task_fit(name, short, enough):
    """Their keys are words of many lengths: a length that has room for the first sample may have none for others."""
    spec = {"kind": "ruler", "tasks": [name]}
    with pytest.raises(ValueError, match=f"length must leave room for samples of {name}, got {short}"):
        sources.make_source(spec, short, 0)
    assert len(sources.make_source(spec, enough, 0).batch(0, 500).input_ids) == 500


def test_a_mix_is_of_one_tokenizer(file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "a"}')
    pairs = {"kind": "pairs", "path": str(tmp_path / "pairs.jsonl")}
    mix = {"kind": "mix", "sources": [{"kind": "text", "path": str(file.path)}, pairs]}
    assert sources.make_source(mix, 400, 0).length == 400
    pairs["tokenizer"] = str(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"sources must be of one tokenizer, got bytes, tokenizer.json \w{64}"):
        sources.make_source(mix, 400, 0)


def test_the_loss_counts_the_text_around_inserted_needles(file):
    """A window that became a haystack is a sample of text like any other."""
    source = sources.make_source({"kind": "text", "path": str(file.path), "needles": 1.0}, 400, seed=0)
    batch = source.batch(0, 4)
    assert all(b"Question: " in bytes(row.clamp(max=255).tolist()) for row in batch.input_ids)
    assert (batch.labels == batch.input_ids).all()


@pytest.mark.parametrize(
    "spec, words",
    (
        (None, "data must be a mapping with a kind, got None"),
        ("text", "data must be a mapping with a kind, got 'text'"),
        ({"kind": "nonsense"}, "kind must be one of text, self-copy, needles, ruler"),
        ({"kind": ["text"]}, "kind must be one of text, self-copy, needles, ruler"),
        (
            {"kind": "needles", "tasks": [{"needle": 3}]},
            "have the options needles, .*, key_symbols, noise_ids, apart, weight, got 'needle'",
        ),
        ({"kind": "needles"}, "data of kind needles must have the option 'tasks', got none"),
        ({"kind": "needles", "task": []}, "data of kind needles must have the options tasks, got 'task'"),
        ({"kind": "needles", "tasks": [{"needles": 500}]}, "needles must lie between"),
        ({"kind": "mix", "sources": []}, "sources must be at least one that is no mix"),
        ({"kind": "mix", "sources": [{"kind": "mix", "sources": []}]}, "sources must be at least one that is no mix"),
        ({"kind": "mix", "sources": ["text"]}, "data of kind mix must have options of the right types"),
        ({"kind": "needles", "tasks": []}, r"weights must be at least 0 and not all of them 0, .*, got \[\]"),
        ({"kind": "needles", "tasks": [{"weight": 0}]}, r"weights must be at least 0 and not all .*, got \[0\]"),
        ({"kind": "mix", "sources": [{"kind": "needles", "tasks": [{}], "weight": -1}]}, "weights must be at least 0"),
        ({"kind": "ruler", "tasks": ["s-niah", "mq-niah"]}, "length must leave room for samples of mq-niah, got 128"),
        ({"kind": "ruler", "tasks": ["x"]}, "samples of x, got 128: task must be one of"),
    ),
)
def test_a_wrong_spec_is_named(spec, words):
    with pytest.raises(ValueError, match=words):
        sources.make_source(spec, 128, 0)
