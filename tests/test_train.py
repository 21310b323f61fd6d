"""Recipes run end to end at toy size; a killed run resumes to the bit; a torn checkpoint is skipped."""

import copy
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from tiers import prove
from token_files import write_tokens
from typer.testing import CliRunner

from hsa_tl import workers
from hsa_tl.cli import app
from hsa_tl.files import InUse, locked
from hsa_tl.model import Model, checkpoint, load, preset
from hsa_tl.model import train as training
from hsa_tl.model.distributed import Ranks
from hsa_tl.model.recipe import Recipe, Stage, load_recipe, recipe_names, recipe_of
from hsa_tl.model.sources import make_source

STAGES = ("warmup-short-window", "warmup-self-copy", "pretrain", "mid-train", "anneal", "sft")
TOYS = ("needle-tiny", "needle-hard", "needle-small", "text-tiny", "text-tiny-baselm", "mixture", "two-tier")


def toy(steps: int = 6, **changes) -> Recipe:
    data = {"kind": "needles", "tasks": [{"needles": 1, "queries": 1}]}
    stages = (
        Stage(steps // 2, 32, 8, data, model={"topk": "all", "impl": "dense"}),
        Stage(steps - steps // 2, 64, 4, data, accumulate=2, model={"window": 16}),
    )
    values = {"name": "toy", "preset": "tiny", "stages": stages, "lr": 1e-3, "log_every": 1, "checkpoint_every": 2}
    return Recipe(**(values | changes))


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(run) -> list[dict]:
    return [json.loads(x) for x in (run / training.LOG).read_text().splitlines()]


@prove  # 8 s; test_model_hsa shows it of the layer
def test_training_learns_to_retrieve(tmp_path):
    """One needle among others' noise: chance is 1 in 96."""
    data = {"kind": "needles", "tasks": [{"needles": 1, "queries": 1}]}
    stage = Stage(120, 40, 32, data, model={"topk": "all", "impl": "dense"})
    recipe = Recipe("learn", "tiny", (stage,), 3e-3, warmup=10, checkpoint_every=1000)
    model = training.train(recipe, tmp_path)
    losses = [x["loss"] for x in log(tmp_path)]
    assert losses[0] > 5 and losses[-1] < 0.7 * losses[0]
    batch = make_source(data, 40, 999).batch(0, 100)
    predicted = model(batch.input_ids).logits[:, :-1].argmax(-1)
    counted = batch.labels[:, 1:] != -100
    assert (predicted == batch.labels[:, 1:])[counted].float().mean() > 0.3


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    """With both optimizers, of which Muon brings AdamW along."""
    recipe = toy(steps=40, optimizer="muon")
    whole = weights(training.train(recipe, tmp_path / "whole"))
    code = (
        "import sys, torch, json, pathlib; torch.set_num_threads(int(sys.argv[3]))\n"
        "from hsa_tl.model import train; from hsa_tl.model.recipe import recipe_of\n"
        "import time; slow = lambda step: time.sleep(0.1)\n"  # or it may have ended before it is killed
        "train.train(recipe_of(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2]), on_step=slow)"
    )
    run = tmp_path / "killed"
    threads = str(torch.get_num_threads())
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(asdict(recipe)), str(run), threads])
    deadline = time.monotonic() + 300
    while not list(run.glob("step-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = checkpoint.latest(run).step
    assert 0 < done < recipe.steps
    assert_same(weights(training.train(recipe, run)), whole)
    first, second = log(tmp_path / "whole"), log(run)
    assert [x["step"] for x in second] == list(range(recipe.steps))
    assert [x["loss"] for x in first] == [x["loss"] for x in second]


def test_experts_are_balanced(tmp_path):
    model = training.train(toy(2, model={"experts": 4, "experts_per_token": 2, "expert_dim": 16}), tmp_path)
    biases = [x for name, x in model.named_buffers() if name.endswith("bias_E")]
    assert biases and all(x.any() for x in biases)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with locked(tmp_path / training.LOCK), pytest.raises(InUse, match=r"run must be a folder that no other process"):
        training.train(toy(steps=2), tmp_path)
    assert not list(tmp_path.glob("step-*")) and training.train(toy(steps=2), tmp_path)


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path):
    """torch raises what is no Exception, and its message is a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a checkpoint must be read or written whole, got .*File too large$"):
            training.train(toy(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest(tmp_path) is None
    training.train(toy(), tmp_path)
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("damage", ("cut", "flip", "no meta", "bad meta"))
def test_a_torn_checkpoint_is_skipped(tmp_path, damage):
    recipe = toy()
    want = weights(training.train(recipe, tmp_path))
    newest = sorted(tmp_path.glob("step-*"))[-1]
    file = newest / ("meta.json" if "meta" in damage else "__0_0.distcp")
    raw = file.read_bytes()
    if damage == "no meta":
        file.unlink()
    else:
        file.write_bytes({"cut": raw[:-9], "flip": raw[:-9] + b"\x7f" + raw[-8:], "bad meta": b"{}"}[damage])
    with pytest.warns(checkpoint.TornCheckpoint, match=newest.name):
        assert checkpoint.latest(tmp_path).step == recipe.steps - 2
    with pytest.warns(checkpoint.TornCheckpoint):
        assert_same(weights(training.train(recipe, tmp_path)), want)


def test_a_newer_torn_checkpoint_is_none_of_those_kept(tmp_path):
    """Else the one that was just written would go in its place."""
    recipe = toy(keep=1, checkpoint_every=100)
    (tmp_path / "step-00000004").mkdir()
    with pytest.warns(checkpoint.TornCheckpoint):
        training.train(recipe, tmp_path, seconds=0)
    with pytest.warns(checkpoint.TornCheckpoint):
        assert checkpoint.latest(tmp_path).step == 1


def test_a_run_of_another_recipe_is_refused(tmp_path):
    training.train(toy(), tmp_path)
    with pytest.raises(ValueError, match=r"run must hold checkpoints of this recipe, got others in .*: lr, seed"):
        training.train(toy(lr=2e-3, seed=1), tmp_path)
    assert checkpoint.latest(tmp_path / "none") is None
    with pytest.raises(ValueError, match="run_or_name must be a folder with a checkpoint or one of needle-tiny"):
        load(tmp_path / "none")


def test_a_run_from_before_a_setting_goes_on(tmp_path):
    training.train(toy(), tmp_path, seconds=0)
    meta = next(tmp_path.glob("step-*")) / "meta.json"
    found = json.loads(meta.read_text())
    assert found["recipe"].pop("reading") == {}
    meta.write_text(json.dumps(found))
    training.train(toy(), tmp_path)
    assert checkpoint.latest(tmp_path).step == 6


def test_a_trained_model_reads_as_its_recipe_says(tmp_path):
    recipe = toy(reading={"topk": 3, "fusion": "mass", "mass_power": 2.0}, model={"topk": 5})
    assert [recipe.config(s).topk for s in recipe.stages] == ["all", 5]
    assert {recipe.config(s).fusion for s in recipe.stages} == {"softmax"}
    for model in (training.train(recipe, tmp_path), load(tmp_path)):
        assert model.config == recipe.config() and model.layers[1].hsa.topk == model.config.topk == 3
        assert model.layers[1].hsa.mass_power == 2


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    (tmp_path / ".step-00000001").mkdir()  # of a killed process
    training.train(toy(keep=2), tmp_path)
    kept = [training.LOCK, training.LOG, "step-00000004", "step-00000006"]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n for n in names if not n.startswith("events.")] == kept  # TensorBoard's, where it is installed
    model = load(tmp_path)
    assert model.config == preset("tiny") and not model.training


def test_validation_changes_no_training(tmp_path):
    """Its model sees no distractors; the next step's does again."""
    often, never = (toy(checkpoint_every=n, model={"distractors": 1}) for n in (1, 1000))
    assert_same(*(weights(training.train(r, tmp_path / str(r.checkpoint_every))) for r in (often, never)))
    assert sum(x.get("validation_loss") is not None for x in log(tmp_path / "1")) == often.steps


def test_accumulated_batches_are_one_batch():
    data = {"kind": "needles", "tasks": [{"needles": 2, "queries": 2}, {"needles": 2, "queries": 1}]}
    batch = make_source(data, 64, 0).batch(0, 6)
    parts = [type(batch)(*(x[a:b] for x in batch)) for a, b in ((0, 1), (1, 4), (4, 6))]
    found = []
    for batches in ([batch], parts):
        torch.manual_seed(0)
        model = Model(preset("tiny"))
        recipe = toy()
        optimizer = training.make_optimizers(model, recipe)
        found.append(training.train_step(model, optimizer, recipe, batches, 1e-3, Ranks("cpu")))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_every_sample_is_read_once(tmp_path, monkeypatch):
    """In order, by stage: steps, accumulated batches and the samples of each take the next ones."""
    read = []

    def source(data, length, number):
        made = make_source(data, length, number)
        batch = made.batch
        made.batch = lambda index, size: (
            read.extend((number, i) for i in range(index, index + size)) or batch(index, size)
        )
        return made

    monkeypatch.setattr(training, "make_source", source)
    recipe = toy()
    training.train(recipe, tmp_path)
    assert read == [(n, i) for n, s in enumerate(recipe.stages) for i in range(s.steps * s.batch * s.accumulate)]


@pytest.mark.parametrize("changes", ({}, {"activation_checkpointing": True}), ids=str)
def test_any_number_of_workers_trains_alike(changes, monkeypatch):
    """To the bit; parts of a batch are those of any number too, and together the batch."""
    monkeypatch.setattr(workers, "cores", lambda: 8)
    batch = make_source({"kind": "needles", "tasks": [{"needles": 2, "queries": 2}]}, 64, 0).batch(0, 7)
    found = []
    before = torch.get_num_threads()
    for threads, tokens in ((1, 128), (2, 128), (4, 128), (1, 1024)):
        monkeypatch.setattr(training, "PART_TOKENS", tokens)
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = Model(replace(preset("tiny"), **changes))
        optimizer = training.make_optimizers(model, toy())
        steps = [training.train_step(model, optimizer, toy(), [batch], 1e-3, Ranks("cpu")) for _ in range(2)]
        found.append((steps, [p.detach().clone() for p in model.parameters()]))
    torch.set_num_threads(before)
    for steps, parameters in found[1:3]:
        assert steps == found[0][0] and all(map(torch.equal, parameters, found[0][1]))
    assert found[3][0][0] == pytest.approx(found[0][0][0], rel=1e-5)


def test_a_part_of_a_batch_holds_its_distractors():
    """However few tokens a part may have; a batch that has too few sequences is refused."""
    source = make_source({"kind": "needles", "tasks": [{"needles": 2, "queries": 2}]}, 1024, 0)
    model = Model(replace(preset("tiny"), distractors=3))
    parts = training._parts([source.batch(0, 10)], model, Ranks("cpu"))
    assert [len(part.input_ids) for part in parts] == [5, 5]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), source.batch(0, 10).input_ids)
    optimizer = training.make_optimizers(model, toy())
    training.train_step(model, optimizer, toy(), [source.batch(0, 4)], 1e-3, Ranks("cpu"))
    with pytest.raises(ValueError, match="distractors must be below the batch's 2 sequences, got 3"):
        training.train_step(model, optimizer, toy(), [source.batch(0, 2)], 1e-3, Ranks("cpu"))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model = Model(preset("tiny"))
    torch.nn.init.constant_(model.output.weight, float("nan"))
    batch = make_source({"kind": "needles", "tasks": [{}]}, 32, 0).batch(0, 2)
    with pytest.raises(FloatingPointError, match="gradient must be finite"):
        training.train_step(model, training.make_optimizers(model, toy()), toy(), [batch], 1e-3, Ranks("cpu"))


def shrunk(recipe: Recipe, tmp_path) -> Recipe:
    """The recipe at toy size, on toy data."""
    narrow = lambda model: {k: v // 64 or v if k.endswith("window") else v for k, v in model.items()}  # noqa: E731
    values = asdict(recipe) | {"preset": "tiny", "checkpoint_every": 1, "log_every": 1}
    if recipe.preset != "tiny":
        values["model"] = narrow(values["model"])
    if recipe.start:
        values["start"] = str(tmp_path / recipe.start.split("/")[-1])
    stages = []
    for stage in values["stages"]:
        data = copy.deepcopy(stage["data"])
        for source in data.get("sources", [data]):
            if "path" in source:
                source["path"] = str(tmp_path / ("pairs.jsonl" if source["kind"] == "pairs" else "train.bin"))
        for task in data.get("tasks", ()) if data["kind"] == "needles" else ():
            task |= {name: min(task[name], 24) for name in ("needles", "queries")}
        model = narrow(stage["model"])
        size = {"steps": 1, "length": 448, "batch": 1 + model.get("distractors", 0), "accumulate": 2}
        stages.append(stage | size | {"data": data, "model": model})
    return recipe_of(values | {"stages": stages})


def test_a_run_out_of_time_goes_on(tmp_path):
    """Behind its time a run ends with a checkpoint after a whole step, and the next calls give the uncut run's bits."""
    recipe = toy(checkpoint_every=100)
    whole = training.train(recipe, tmp_path / "whole")
    for steps in range(1, recipe.steps + 1):
        cut = training.train(recipe, tmp_path / "cut", seconds=0.0)
        assert checkpoint.latest(tmp_path / "cut").step == steps
    assert_same(weights(cut), weights(whole))
    lines = ({k: v for k, v in x.items() if k != "seconds"} for x in log(tmp_path / "cut"))
    assert list(lines) == [{k: v for k, v in x.items() if k != "seconds"} for x in log(tmp_path / "whole")]


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_run_goes_on_where_a_parameter_had_no_gradient(optimizer, tmp_path):
    """The first stage's uniform weights teach retrieval nothing, the second stage's do."""
    first, second = toy().stages
    recipe = toy(stages=(replace(first, model={"fusion": "uniform"}), second), optimizer=optimizer)
    whole = training.train(recipe, tmp_path / "whole")
    for _ in range(recipe.steps):
        cut = training.train(recipe, tmp_path / "cut", seconds=0.0)
    assert_same(weights(cut), weights(whole))


def test_every_recipe_at_toy_size(tmp_path):
    """Each in turn, from the checkpoint of the one before; bfloat16 too."""
    write_tokens(tmp_path / "train.bin", [b"words and more words, " * 999])
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "more", "answer": "words"}\n')
    assert set(recipe_names()) == {*STAGES, *TOYS}
    for name in (*STAGES, *TOYS):
        recipe = shrunk(load_recipe(name), tmp_path)
        training.train(recipe, tmp_path / name)
        rows = log(tmp_path / name)
        assert len(rows) == recipe.steps and all(0 < x["loss"] < 7 for x in rows)
    pretrain = shrunk(load_recipe("pretrain"), tmp_path)
    assert pretrain.start == str(tmp_path / "warmup-short-window")
    for warmup in ("warmup-short-window", "warmup-self-copy"):
        started = training._start(replace(pretrain, start=str(tmp_path / warmup)), "cpu")
        assert_same(weights(started), weights(load(tmp_path / warmup)))


@pytest.mark.parametrize(
    "changes, reading, words",
    (
        ({"model": {"dim": 64}}, {}, "model of stage 2: config must leave the parameters' shapes alone"),
        ({"model": {"distractors": 4}}, {}, "batch of stage 2: distractors must be below the batch's 4 sequences"),
        ({"data": {"kind": "pairs", "path": "none.jsonl"}}, {}, "data of stage 2: .*none.jsonl"),
        ({}, {"dim": 64}, "reading: config must leave the parameters' shapes alone"),
        ({"model": {"attention": "moba"}}, {}, "model of stage 2: config must leave the layers' kinds alone, .*'moba'"),
        ({}, {"attention": "selected"}, "reading: config must leave the layers' kinds alone, got attention 'selected'"),
    ),
)
def test_what_a_later_stage_cannot_do_is_said_at_once(changes, reading, words, tmp_path):
    kind = {"attention": "full"} if "kinds" in words else {}
    stages = (*toy().stages[:1], replace(toy().stages[1], **changes))
    recipe = toy(stages=stages, reading=reading, model=kind)
    with pytest.raises(ValueError, match=words):
        training.train(recipe, tmp_path, on_step=lambda step: pytest.fail("a step"))


def test_what_was_converted_is_not_trained(tmp_path):
    recipe = Recipe("converted", "tiny", (), 1e-5, source="elsewhere")
    with pytest.raises(ValueError, match="source must be None in training, where start names a run, got elsewhere"):
        training.train(recipe, tmp_path)


def test_the_run_to_start_from_is_read_once(tmp_path):
    training.train(toy(steps=2), tmp_path / "first")
    recipe = toy(start=str(tmp_path / "first"))
    training.train(recipe, tmp_path / "run", seconds=0)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert_same(weights(training.train(recipe, tmp_path / "run")), weights(load(tmp_path / "run")))
    with pytest.raises(ValueError, match="start must be a folder with a checkpoint"):
        training.train(recipe, tmp_path / "other")


def test_train_command(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: tiny\nlr: 1e-3\nlog_every: 1\nstages:\n"
        "  - {steps: 2, length: 64, batch: 2, data: {kind: needles, tasks: [{needles: 2, queries: 2}]}}\n"
    )
    args = ["train", str(file), "--threads", "1", "--out", str(tmp_path / "run"), "--seed", "3"]
    for _ in range(2):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0 and "mine, 2 steps" in result.output, result.output
        rows = [line.split()[:2] for line in result.output.splitlines()]
        assert [x for x in rows if x and x[0].isdigit()] == [["1", "1"], ["2", "1"]]  # steps, stages
    assert checkpoint.latest(tmp_path / "run").recipe["seed"] == 3
    other = ["train", str(file), "--threads", "1", "--out", str(tmp_path / "other"), "--attention", "full"]
    assert CliRunner().invoke(app, other).exit_code == 0
    assert load(tmp_path / "other").config.attention == "full"
    for bad, words in ((["train", "nonsense"], "recipe must be a .yaml file or one of"), ([*args[:-1], "4"], "seed")):
        result = CliRunner().invoke(app, bad)
        assert result.exit_code == 2 and words in result.output and len(result.output.strip().splitlines()) == 1
