"""hsa_tl.model.load: by run and by name the same model, checksums verified; shipped weights still find needles."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hsa_tl.bench import lengths
from hsa_tl.cli import app
from hsa_tl.model import load, preset, pretrained
from hsa_tl.model import train as training
from hsa_tl.model.data import ByteTokenizer
from hsa_tl.model.needles import NeedleTask, NeedleTokenizer
from hsa_tl.model.recipe import Recipe, Stage, load_recipe
from hsa_tl.model.sources import tokenizer_of
from hsa_tl.terminal import pick_dtype

ORIGIN = {"train_seconds": 1.0, "device": "cpu", "versions": "v", "commit": "c", "accuracy": []}
NEEDLES = {"kind": "needles", "tasks": [{}]}


def toy(**model) -> Recipe:
    """Its stage is not configured as the model is after training."""
    return Recipe("toy", "tiny", (Stage(2, 32, 2, NEEDLES, model={"topk": "all", "window": 16}),), 1e-3, model=model)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The package's folder of weights, empty."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def test_shipped_weights():
    model = load("needle-tiny")
    assert not model.training and model.config == preset("tiny") and model.num_parameters() == 602434
    assert isinstance(model.tokenizer, NeedleTokenizer) and next(model.parameters()).device.type == "cpu"
    about = pretrained.shipped("needle-tiny")
    named = load_recipe("needle-tiny")
    assert about.recipe["seed"] == 0 and about.steps == named.steps and about.commit and "torch" in about.versions
    assert about.recipe["stages"] == json.loads(json.dumps(asdict(named)))["stages"], "the recipe of today"
    assert {(x["task"], x["length"]) for x in about.accuracy} == {
        (task, T) for task in lengths.DEMO_TASKS for T in lengths.DEMO_LENGTHS
    }
    assert (pretrained.FOLDER / "needle-tiny.safetensors").stat().st_size <= 3e6


@pytest.fixture
def one_thread():
    """As the demo runs; two would spin for each other in thousands of tiny regions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_shipped_weights_find_needles(tmp_path, one_thread):
    """As the demo's last act asks them; chance is 1 in 96."""
    console = Console(width=100, record=True, file=(tmp_path / "console").open("w"))
    lengths.ask_shipped(console, tmp_path, lengths=(256, 4096), samples=10)
    text = console.export_text()
    assert "128 retrieved tokens" in text and "4K" in text
    rows = json.loads((tmp_path / "lengths.json").read_text())
    assert {(r["task"], r["length"]) for r in rows} == {(t, T) for t in lengths.DEMO_TASKS for T in (256, 4096)}
    assert all(r["answers"] >= r["samples"] >= 4 and r["accuracy"] >= 0.95 for r in rows), rows


@pytest.mark.parametrize("tied", (False, True))
def test_a_name_gives_the_model_of_its_run(tied, folder, tmp_path):
    trained = training.train(toy(tied=tied), tmp_path / "run")
    written = pretrained.save_weights(tmp_path / "run", folder, "toy", **ORIGIN)
    assert written == [folder / "toy.safetensors", folder / "toy.json"] and pretrained.shipped_names() == ["toy"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want = trained(ids).logits
        for model in (load("toy"), load(tmp_path / "run"), load(str(tmp_path / "run"))):
            assert model.config == trained.config and not model.training
            assert torch.equal(model(ids).logits, want) and isinstance(model.tokenizer, NeedleTokenizer)


def test_damaged_weights_are_refused(folder, tmp_path):
    training.train(toy(), tmp_path / "run")
    file, about = pretrained.save_weights(tmp_path / "run", folder, "toy", **ORIGIN)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"toy.safetensors must have the sha256 \w{64}, got \w{64}"):
        load("toy")
    about.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"toy.json must hold what is known of weights"):
        load("toy")


def test_only_a_finished_run_is_saved(folder, tmp_path):
    training.train(toy(), tmp_path / "run", seconds=0)
    for run, words in ((tmp_path / "run", "got 1 in"), (tmp_path / "none", "got no checkpoint in")):
        with pytest.raises(ValueError, match=f"run must be finished, {words}"):
            pretrained.save_weights(run, folder, "toy", **ORIGIN)
    assert not folder.exists()


@pytest.mark.parametrize("unknown", ("needle-small", "out/train/none", Path("needle-tiny"), ""))
def test_what_is_neither_is_refused(unknown, tmp_path, monkeypatch):
    """A Path is a folder, whatever its name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run_or_name must be a folder with a checkpoint or one of needle-tiny, got"):
        load(unknown)
    with pytest.raises(ValueError, match="name must be one of needle-tiny, got"):
        pretrained.shipped(str(tmp_path))


def test_weights_are_made_from_a_recipe(folder, tmp_path):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        "preset: tiny\nlr: 1e-3\nstages:\n"
        "  - {steps: 2, length: 64, batch: 2, data: {kind: needles, tasks: [{needles: 2, queries: 2}]}}\n"
    )
    console = Console(file=(tmp_path / "console").open("w"))
    lengths.make_weights(console, folder, str(recipe), seed=3, lengths=(128,), samples=2)
    about = pretrained.shipped("toy")
    assert about.recipe["seed"] == 3 and about.steps == 2 and about.train_seconds > 0 and about.device and about.commit
    assert [(x["task"], x["length"], x["answers"]) for x in about.accuracy] == [("s-niah", 128, 2), ("mq-niah", 128, 4)]
    assert load("toy").config == preset("tiny")


def test_the_tokenizer_is_the_datas():
    assert isinstance(tokenizer_of({"kind": "ruler"}), ByteTokenizer)
    assert isinstance(tokenizer_of({"kind": "text", "path": "x"}), ByteTokenizer)
    with pytest.raises(FileNotFoundError):
        tokenizer_of({"kind": "text", "path": "x", "tokenizer": "/nonexistent/tokenizer.json"})


def test_a_run_keeps_its_tokenizer(tmp_path, monkeypatch):
    """With what stands beside it; neither a file that takes its place nor another working folder changes the run's."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    file, words = Path("words/mine.json"), {"a": 0, "END": 1, "b": 2}
    file.parent.mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(file))
    file.with_name("tokenizer_config.json").write_text('{"eos_token": "END"}')
    Path("pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    data = {"kind": "pairs", "path": "pairs.jsonl", "tokenizer": str(file)}
    training.train(Recipe("toy", "tiny", (Stage(1, 32, 2, data),), 1e-3), tmp_path / "run")
    file.rename("moved.json")
    for folder in (tmp_path, tmp_path / "run"):
        monkeypatch.chdir(folder)
        tokenizer = load(tmp_path / "run").tokenizer
        assert (tokenizer.end, tokenizer.encode("b")) == (1, [2])
    (tmp_path / "run/tokenizer.json").unlink()  # a run from before
    monkeypatch.chdir(tmp_path)
    Path("moved.json").rename(file)
    assert load("run").tokenizer.encode("b") == [2]


def test_a_run_without_a_checkpoint_keeps_no_older_tokenizer(tmp_path):
    """What a run that ended before its first checkpoint left there may be of other settings."""
    tokenizers = pytest.importorskip("tokenizers")
    for name, words in (("old", {"a": 0, "END": 1, "b": 2, "</s>": 3}), ("new", {"b": 0, "a": 1, "</s>": 2})):
        (tmp_path / name).mkdir()
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
        inner.save(str(tmp_path / name / "tokenizer.json"))
    (tmp_path / "old/tokenizer_config.json").write_text('{"eos_token": "END"}')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    data = {"kind": "pairs", "path": str(tmp_path / "pairs.jsonl"), "tokenizer": str(tmp_path / "new/tokenizer.json")}
    training.train(Recipe("toy", "tiny", (Stage(1, 32, 2, data),), 1e-3), tmp_path / "old")
    tokenizer = load(tmp_path / "old").tokenizer
    assert (tokenizer.end, tokenizer.encode("b")) == (2, [0])


def test_needles_are_words():
    tokenizer = NeedleTokenizer()
    everything = np.arange(tokenizer.vocab_size)
    assert tokenizer.encode(tokenizer.decode(everything)) == everything.tolist()
    task = NeedleTask(24, needles=2, queries=1)
    words = tokenizer.decode(task.sample(0, 0).tokens).split()
    assert words.count("MARK") == 2 and words[-3] == "ASK" and words[-2][0] == "k" and words[-1][0] == "v"
    assert " ".join(words[-2:]) in " ".join(words[:-3]), "the answer stands behind its key"
    with pytest.raises(ValueError, match="text must be words such as MARK, ASK, n0, k0 and v0, got 'k96'"):
        tokenizer.encode_all(["MARK k95", "k96"])


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_generate_writes_on(tmp_path):
    """The needle's value first; a file stands before the prompt."""
    haystack = "MARK k3 v5 n1 n2 MARK k7 v9 n5"
    assert run("generate", "needle-tiny", f"{haystack} ASK k3", "--max-new-tokens", 2).split()[0] == "v5"
    (tmp_path / "haystack.txt").write_text(haystack)
    more = ("--file", tmp_path / "haystack.txt", "--max-new-tokens", 1, "--temperature", 0.01, "--seed", 1)
    assert run("generate", "needle-tiny", "ASK k7", *more) == "v9\n"
    assert run("generate", "needle-tiny", "ASK k7", "--max-new-tokens", 0) == "\n"


def test_an_exported_folder_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "exported"
    folder.mkdir()
    assert f"wrote {folder}\n" in run("export", "needle-tiny", folder)
    kind = {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kind)
    ours, text = load("needle-tiny"), "MARK k3 v5 n1 ASK k3"
    assert tokenizer.encode(text) == ours.tokenizer.encode(text)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, ours(ids).logits) and tokenizer.decode(ids[0]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "n1"}], tokenize=False) == "n1\n"
    for wrong in (folder, folder / "config.json"):
        with pytest.raises(ValueError, match="folder must be new or empty"):
            pretrained.export("needle-tiny", wrong)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_weights_in_16_bits(dtype, tmp_path):
    """As a GPU takes them; their run holds float32."""
    transformers = pytest.importorskip("transformers")
    trained = training.train(toy(tied=True), tmp_path / "run")
    run("export", tmp_path / "run", tmp_path / "folder", "--dtype", str(dtype).removeprefix("torch."))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    for model in (load(tmp_path / "run", "cpu", dtype), theirs.model):
        got, want = model.state_dict(), trained.state_dict()
        assert got.keys() == want.keys() and model.output.weight is model.embedding.weight
        assert all(got[name].dtype == dtype and torch.equal(got[name], x.to(dtype)) for name, x in want.items())
    assert next(load("needle-tiny", dtype=dtype).parameters()).dtype == dtype != torch.get_default_dtype()
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        pick_dtype("int8")


@pytest.mark.parametrize(
    "tokenizer, text", [(ByteTokenizer(), "Zürich, 東京\n\ttwo  blanks"), (NeedleTokenizer(), "ASK k3 v5")]
)
def test_tokenizers_are_the_same_in_transformers(tokenizer, text):
    fast = tokenizer.fast()
    assert fast.encode(text).ids == tokenizer.encode(text) and fast.decode(fast.encode(text).ids) == text
    assert tokenizer.end is None or fast.id_to_token(tokenizer.end) == "<|endoftext|>"
