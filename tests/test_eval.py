"""`hsa-tl eval` on toy runs: every length, task and depth has its row, the plots are images, errors are one line."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from token_files import write_tokens
from typer.testing import CliRunner

from hsa_tl.bench import cli, selections, tradeoff
from hsa_tl.bench import ruler as bench_ruler
from hsa_tl.bench.attention import selection_inputs
from hsa_tl.bench.suite import selection_label
from hsa_tl.cli import app
from hsa_tl.model import Model, evaluate, load, preset
from hsa_tl.model import train as training
from hsa_tl.model.chunk_memory import ChunkMemory
from hsa_tl.model.data import TokenFile, sidecar_path, tokens_of
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.recipe import Recipe, Stage
from hsa_tl.problem import Problem

retrieve = ChunkMemory.retrieve
NEEDLES = {"kind": "needles", "tasks": [{}]}


def trained(folder, data, name="toy"):
    training.train(Recipe(name, "tiny", (Stage(1, 256, 1, data),), 1e-3), folder)
    return folder


def invoke(*args, code=0) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def test_ruler_of_needles(tmp_path):
    run = trained(tmp_path / "run", NEEDLES)
    common = ("--run", run, "--lengths", "512,1k", "--depth-steps", 3, "--samples", 2, "--out", tmp_path)
    output = invoke("ruler", *common, "--tasks", "s-niah,mq-niah", "--memory", tmp_path / "memory")
    rows = json.loads((tmp_path / "ruler.json").read_text())
    assert {(r["task"], r["length"], r["depth"]) for r in rows} == {
        (t, T, d) for t in ("s-niah", "mq-niah") for T in (512, 1024) for d in (0, 0.5, 1)
    }
    assert all(r["answers"] == r["samples"] * (2 if r["task"] == "mq-niah" else 1) for r in rows)
    assert (tmp_path / "ruler.png").stat().st_size > 5000 and "mq-niah" in output
    assert "task must be one of s-niah" in invoke("ruler", *common, "--tasks", "vt", code=2)
    assert "haystack must go with the vocabulary words" in invoke("ruler", *common, "--haystack", __file__, code=2)
    invoke("ruler", *common, "--generate", "--tasks", "mq-niah", "--memory", tmp_path / "memory")
    generated = json.loads((tmp_path / "ruler.json").read_text())
    assert {r["method"] for r in rows} == {"teacher-forced"} and {r["method"] for r in generated} == {"generated"}
    forced = {(r["length"], r["depth"]): r for r in rows if r["task"] == "mq-niah"}
    assert [r["answers"] for r in generated] == [forced[r["length"], r["depth"]]["answers"] for r in generated]


def test_ruler_in_words_and_perplexity(tmp_path):
    write_tokens(tmp_path / "text.bin", [np.random.default_rng(0).bytes(3000)])
    run = trained(tmp_path / "run", {"kind": "text", "path": str(tmp_path / "text.bin")})
    invoke("ruler", "--run", run, "--lengths", "1k", "--depths", "0.5", "--samples", 1, "--tasks", "s-niah,vt,mv-niah",
           "--out", tmp_path, "--topk", 4)  # fmt: skip
    rows = json.loads((tmp_path / "ruler.json").read_text())
    asked = [("s-niah", 0.5, None), ("vt", None, None), ("mv-niah", None, None)]
    assert [(r["task"], r["depth"], r["haystack"]) for r in rows] == asked
    (tmp_path / "book.txt").write_text("It was a dark night. " * 9)
    invoke("ruler", "--run", run, "--lengths", "2k", "--samples", 1, "--tasks", "babi-2", "--out", tmp_path / "book",
           "--haystack", tmp_path / "book.txt")  # fmt: skip
    row = json.loads((tmp_path / "book/ruler.json").read_text())[0]
    assert (row["task"], row["haystack"], row["answers"]) == ("babi-2", "book.txt", 1)
    (tmp_path / "empty.txt").touch()
    empty = ("--haystack", tmp_path / "empty.txt")
    assert "text must hold at least 1 bytes" in invoke("ruler", "--run", run, *empty, code=2)
    common = ("--run", run, "--data", tmp_path / "text.bin", "--out", tmp_path)
    invoke("perplexity", *common, "--lengths", "256..1k")
    rows = json.loads((tmp_path / "perplexity.json").read_text())
    assert [r["length"] for r in rows] == [256, 512, 1024] and all(4 < r["bits_per_token"] < 12 for r in rows)
    assert (tmp_path / "perplexity.png").stat().st_size > 3000
    assert rows[0]["trained_tokens"] == rows[0]["trained_length"] == 256 and rows[0]["parameters"] == 602434
    assert "torch" in rows[0]["versions"] and rows[0]["commit"] and "threads" in rows[0]["device"]
    assert "lengths must be at most the 3001 tokens" in invoke("perplexity", *common, "--lengths", "4k", code=2)
    assert "lengths must be at least 2, got 1" in invoke("perplexity", *common, "--lengths", "1,512", code=2)
    other = trained(tmp_path / "other", {"kind": "text", "path": str(tmp_path / "text.bin")}, "other")
    invoke("perplexity", "--run", other, *common[2:], "--lengths", "512", "--windows", 2)
    again = json.loads((tmp_path / "perplexity.json").read_text())
    assert again[:3] == rows and (again[3]["model"], again[3]["windows"]) == ("other", 2) and len(again) == 4
    assert all(np.mean(r["bits"]) == pytest.approx(r["bits_per_token"], abs=1e-4) for r in again)
    invoke("perplexity", *common, "--lengths", "512,1k", "--windows", 2, "--topk", 0)
    alone = json.loads((tmp_path / "perplexity.json").read_text())[4:]
    assert {r["model"] for r in alone} == {"toy, windows only"}
    assert alone[0]["bits"] == alone[1]["bits"] and alone[0]["bits_per_token"] != again[1]["bits_per_token"]
    invoke("perplexity", *common, "--lengths", "1k", "--topk", 1)
    fewer = json.loads((tmp_path / "perplexity.json").read_text())
    assert fewer[:6] == again + alone and [r["model"] for r in fewer[6:]] == ["toy, topk 1"]
    for what in ("perplexity", "selections"):
        other = invoke(what, "--run", "needle-tiny", *common[2:], "--lengths", "512", code=2)
        assert "text.bin must be of the tokenizer needles, got bytes" in " ".join(other.split())
    assert "topk must be positive for selections" in invoke("selections", *common, "--topk", 0, code=2)
    invoke("perplexity", "--run", run, *common[2:], "--lengths", "256", "--before", "1k")
    same = next(r for r in json.loads((tmp_path / "perplexity.json").read_text()) if r["model"] == "toy")
    assert same["tokens"] == 128 and same["bits_per_token"] == pytest.approx(rows[0]["bits_per_token"])
    (tmp_path / "perplexity.json").write_text("[1]")
    assert "perplexity.json must hold rows that hsa-tl wrote" in invoke(
        "perplexity", *common, "--lengths", "512", code=2
    )


def test_selections_become_inputs_of_the_benchmark(tmp_path):
    write_tokens(tmp_path / "text.bin", [b"the same words, " * 400])
    run = trained(tmp_path / "run", {"kind": "text", "path": str(tmp_path / "text.bin")})
    common = ("--run", run, "--data", tmp_path / "text.bin", "--out", tmp_path)
    output = invoke("selections", *common, "--lengths", "1k", "--topk", 8)
    found = json.loads((tmp_path / "selections.json").read_text())
    assert (
        found["model"] == "toy"
        and found["commit"]
        and found["tokens"] == 1024
        and 0 < found["overlap"] <= 1
        and "distinct chunks" in output
    )
    (shares,), (layer,) = found["weight_by_distance"].values(), found["weight_by_distance"]
    assert layer == "layer 2" and len(shares) == 6 and sum(shares) == pytest.approx(1)
    assert "layer 2" in output and "31 to 62" in output and (tmp_path / "selections.png").stat().st_size > 5000
    file = tmp_path / "selections.safetensors"
    problem = Problem(2, 900, 57, 4, 2, 32, 16, 8, dtype=torch.float32, device_type="cpu")
    inputs = selection_inputs(problem, f"trained={file}")
    assert inputs.indices.shape == (2, 900, 2, 8)
    label = selection_label(f"trained={file}")
    assert label.startswith("trained=selections-") and label == selection_label(f"trained={file}")
    visible = torch.arange(900)[None, :, None, None] // 16
    assert (inputs.indices < visible).logical_or(inputs.indices == -1).all() and (inputs.indices[0, -1, 0] >= 0).all()
    model = load(run)
    ids = torch.from_numpy(TokenFile(tmp_path / "text.bin").tokens[:1024].astype(np.int64))[None]
    seen = []
    with mock.patch.object(ChunkMemory, "retrieve", lambda m, *a, **k: seen.append(retrieve(m, *a, **k)) or seen[0]):
        model(ids)
    assert torch.equal(seen[0][1][:, :900, [0, 0]].expand(2, -1, -1, -1), inputs.indices)
    for changes, words in (
        ({"K": 4}, "must have K 4, got 8"),
        ({"T": 2000}, "must hold at least 2000 tokens, got 1024"),
    ):
        with pytest.raises(ValueError, match=words):
            selection_inputs(replace(problem, **changes), f"trained={file}")
    file.write_bytes(b"x")
    assert selection_label(f"trained={file}") != label, "another selection of the same name"
    with pytest.raises(ValueError, match="must be a file that hsa-tl eval selections wrote"):
        selection_inputs(problem, f"trained={file}")


def test_fewer_chunks_kept_or_read(tmp_path):
    """Setting 1 is the model as it is, fewer chunks are read with p, and the file keeps the rows of other models."""
    write_tokens(tmp_path / "text.bin", [b"the same words, " * 400])
    run = trained(tmp_path / "run", {"kind": "text", "path": str(tmp_path / "text.bin")})
    common = ("--data", tmp_path / "text.bin", "--threads", 1, "--lengths", "512", "--samples", 1, "--tasks", "s-niah")
    found = {}
    for what, values in tradeoff.SETTINGS.items():
        for name in (run, "needle-tiny"):
            output = invoke(what, *common, "--run", name, "--out", tmp_path)
        rows = json.loads((tmp_path / f"{what}.json").read_text())
        assert [r["value"] for r in rows] == [*values, *values] and "needle-tiny" in output
        assert {(r["model"], r["task"]) for r in rows} == {("run", "text"), ("needle-tiny", "s-niah")}
        assert all(r["cpu_ratio"] > 0 and r["answers"] == 1 for r in rows) and rows[0]["cpu_ratio"] == 1
        found[what] = rows[: len(values)]
    text = TokenFile(tmp_path / "text.bin")
    (whole,) = (evaluate.bits_per_token(LongReader(load(run)), x, 128) for x in tradeoff.places(text, 512, 1))
    assert [found[what][0]["score"] for what in found] == pytest.approx([whole, whole], abs=1e-4)
    assert [r["chunks"] for r in found["budget"]] == [None] * 6
    read = [r["chunks"] for r in found["topp"]]
    assert read[0] == round(np.minimum(np.arange(512) // 16, 8).mean(), 4) and read == sorted(read, reverse=True)
    assert read[-1] < read[0] / 1.5
    assert "lengths must be at most the 6401 tokens" in invoke(
        "topp", *common[:2], "--run", run, "--lengths", "8k", code=2
    )


def test_weight_by_distance_and_layer():
    """Of tokens 64 to 127, chunks of 16: by hand; two query heads a key/value head count alike; -1 has no weight."""
    indices = torch.full((1, 128, 2, 2), -1)
    weights = torch.zeros(1, 128, 4, 2)
    indices[0, 64:, 0, 0] = torch.arange(64, 128) // 16 - 1  # the chunk before a token's own
    indices[0, 64:, 0, 1] = 0  # 3 to 6 between
    indices[0, 64:, 1, 0] = torch.arange(64, 128) // 16 - 3  # 2 between
    weights[0, :, :2] = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    weights[0, :, 2:] = torch.tensor([1.0, 0.0])
    assert selections.weight_by_distance(weights, indices, 16) == pytest.approx([0.375, 0.5, 0.125])


@pytest.mark.parametrize("fusion", ("softmax", "mass"))
def test_every_layer_is_watched_as_it_reads(fusion):
    """Its weights and chunks give what the layer gave; recency has its say."""
    torch.manual_seed(0)
    changes = {"layers": 4, "groups": 2, "topk": 2, "kv_heads": 2, "recency": 4, "fusion": fusion}
    model = Model(replace(preset("tiny"), **changes)).eval()
    torch.nn.init.constant_(model.layers[3].hsa.recency_R, 100.0)
    tokens = np.random.default_rng(0).integers(0, 320, 200).astype(np.uint16)
    found = selections.trained_selections(model, tokens)
    assert list(found) == [2, 3] and found[2][1].shape == (1, 200, 2, 2)
    assert found[3][0].shape == (1, 200, 4 if fusion == "mass" else 2, 2)
    own = torch.arange(200)[None, :, None] // 16
    assert torch.equal(found[3][1][:, 48:], torch.stack([own - 2, own - 1], 3)[:, 48:].expand(-1, -1, 2, -1).int())
    assert selections.weight_by_distance(*found[3], 16)[2:] == [0.0, 0.0]
    with pytest.raises(ValueError, match="model must have HSA with a topk, got hsa with topk all"):
        selections.trained_selections(Model(replace(model.config, topk="all")), tokens)


class Sees:
    """Right at even lengths only: rows must not be mixed up."""

    def read(self, tokens, keep):
        right = len(tokens) % 2 == 0
        nxt = np.append(tokens[1:], 0).astype(np.int64) if right else np.zeros(len(tokens), np.int64)
        return torch.nn.functional.one_hot(torch.from_numpy(nxt[-keep:]), 320)


def test_a_tokenizer_is_known_by_its_content(tmp_path):
    """A run keeps its tokenizer's file under another name."""
    file, model = write_tokens(tmp_path / "text.bin", [b"text"]), mock.Mock()
    side = json.loads(sidecar_path(file.path).read_text())
    sidecar_path(file.path).write_text(json.dumps(side | {"tokenizer": "mine.json 1234"}))
    model.tokenizer.name = "tokenizer.json 1234"
    assert len(tokens_of(file.path, model.tokenizer)) == 5
    model.tokenizer.name, model.config.chunk_size = "tokenizer.json 1235", 2
    with pytest.raises(ValueError, match=r"must be of the tokenizer tokenizer.json 1235, got mine.json 1234"):
        next(tradeoff.contexts(model, file.path, [], [4], 1))


def test_rows_are_of_their_length():
    rows = bench_ruler.run_ruler(Sees(), "needles", ["s-niah"], [200, 301], [0.0, 1.0], samples=3)
    assert [(r.length, r.accuracy) for r in rows] == [(200, 1.0), (200, 1.0), (301, 0.0), (301, 0.0)]


def test_ranks_share_contexts_of_which_answers_are_generated(monkeypatch):
    reader, seen = mock.Mock(), []
    answer = lambda model, sample, **options: seen.append(options) or np.ones(1, bool)  # noqa: E731
    monkeypatch.setattr(evaluate, "answers_generated", answer)
    list(bench_ruler.run_ruler(reader, "needles", ["s-niah"], [200], [0.5], samples=1, generate=True))
    assert seen == [{"folder": reader.folder, "group": reader.group, "more": 0}]


@pytest.mark.parametrize(
    "text, steps, want", (("0..1", 3, [0, 0.5, 1]), ("0.3", 5, [0.3]), ("0.2..0.4", 2, [0.2, 0.4]))
)
def test_depths(text, steps, want):
    assert cli.parse_depths(text, steps) == pytest.approx(want)


@pytest.mark.parametrize("text, steps", (("1..0", 3), ("x", 3), ("0..2", 3), ("0..1", 0)))
def test_bad_depths(text, steps):
    with pytest.raises(ValueError, match="depths must"):
        cli.parse_depths(text, steps)


@pytest.mark.parametrize(
    "args, words",
    (
        (("noise", "--depths", "0.5"), "depths must be left out of eval noise, got 0.5"),
        (("noise", "--generate"), "generate must be left out of eval noise"),
        (("budget", "--memory", "x"), "memory must be left out of eval budget, got x"),
        (("perplexity", "--tasks", "vt"), "tasks must be left out of eval perplexity, got vt"),
        (("selections", "--lengths", "4k,64k"), "lengths must be one for selections, got 4k,64k"),
        (("perplexity", "--before", "4k,64k"), "before must be one for perplexity, got 4k,64k"),
    ),
)
def test_what_a_measurement_does_not_take_is_refused(args, words):
    assert words in invoke(*args, code=2)


@pytest.mark.parametrize("what", ("ruler", "perplexity", "noise", "topp"))
def test_a_file_that_cannot_be_added_to_is_known_before(what, tmp_path, monkeypatch):
    (tmp_path / f"{what}.json").write_text("[1]")
    monkeypatch.setattr(cli, "load", None)  # nothing is measured
    output = invoke(what, "--out", tmp_path, code=2)
    assert f"{what}.json must hold rows that hsa-tl wrote" in output and len(output.strip().splitlines()) == 1


def test_no_run_is_one_line(tmp_path):
    output = invoke("ruler", "--run", tmp_path / "none", code=2)
    assert (
        "must be a folder with a checkpoint or one of needle-tiny, got" in output
        and len(output.strip().splitlines()) == 1
    )
    assert "must be one of ruler, perplexity, selections" in invoke("x", code=2)
