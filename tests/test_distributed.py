"""Two and four gloo processes compute what one does: context parallelism, FSDP2, checkpoints that change ranks."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from strategies import assert_all_accurate
from tiers import prove, tiered

from hsa_tl.accuracy import expect
from hsa_tl.model import Model, load
from hsa_tl.model import train as training
from hsa_tl.model.train import train


def launch(count: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    script = Path(ranks.__file__)
    return subprocess.run([*command, "--", script, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def alone(name: str) -> dict[str, torch.Tensor]:
    """Of one process, in float64."""
    model, input_ids, labels = ranks.make(name)
    out = model.double()(input_ids, labels=labels)
    out.loss.backward()
    return ranks.results(model, out.logits, out.loss, model.eval()(input_ids).logits)


QUICK = (2, ("hsa", "joint", "distractors", "swa"))
ALL = tuple(ranks.CONFIGS)


@pytest.mark.parametrize("count, names", tiered((QUICK, (2, ALL), (4, ALL)), quick=(QUICK,), rows=True))
def test_context_parallel_equals_one_process(count, names, tmp_path):
    run = launch(count, "context", tmp_path / "found.pt", *names)
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for name in names:
        assert_all_accurate(found[name], expect(lambda name=name: alone(name)))


def test_tokens_must_share_out_evenly():
    from hsa_tl.model import Model, preset
    from hsa_tl.model.distributed import ContextParallel

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        with pytest.raises(ValueError, match="multiple of 1 ranks \\* 16 tokens, got 40"):
            ContextParallel(Model(preset("tiny")))(torch.zeros(1, 40, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()


def curve(run: Path) -> torch.Tensor:
    return torch.tensor([json.loads(x)["loss"] for x in (run / "log.jsonl").read_text().splitlines()])


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@prove
def test_training_equals_one_process_and_survives_a_dead_rank(tmp_path, monkeypatch):
    """Two data-parallel ranks until one is killed; two or four go on, pairs along the context; one reads the result."""
    dead = tmp_path / "dead"
    died = launch(2, "training", dead, 1, 4)
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert sorted(p.name for p in dead.glob("step-*")) == ["step-00000002", "step-00000004"]
    samples = itertools.count()

    def alone():
        path = tmp_path / f"alone{next(samples)}"
        model = train(ranks.recipe(), path)
        return {"weights": weights(model), "loss": curve(path).double()}

    with monkeypatch.context() as patch:
        # The same start: in float64 from its beginning, a model would draw other numbers.
        patch.setattr(training, "Model", lambda config: Model(config).double())
        expected = expect(alone)
    for count in (2, 4):
        run = shutil.copytree(dead, tmp_path / f"resumed-{count}")
        resumed = launch(count, "training", run, 2)
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert len(curve(run)) == 6
        assert_all_accurate({"weights": weights(load(run)), "loss": curve(run)}, expected)


@prove  # each rank imports torch anew: 5 s of a core
def test_the_command_runs_on_two_ranks(tmp_path):
    """One process prints; the recipe's file is the same on all. Muon takes whole matrices, of which each has a part,
    and magnifies rounding."""
    path, recipe = tmp_path / "recipe.yaml", dataclasses.replace(ranks.recipe(), optimizer="muon")
    path.write_text(json.dumps({k: v for k, v in dataclasses.asdict(recipe).items() if k != "name"}))
    run = launch(2, "command", "train", path, "--out", tmp_path / "run", "--device", "cpu", "--context-parallel", 2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("wrote ") == 1 and len(curve(tmp_path / "run")) == 6
    train(recipe, tmp_path / "alone")
    torch.testing.assert_close(curve(tmp_path / "run"), curve(tmp_path / "alone"), rtol=1e-3, atol=0)


@prove
def test_an_uneven_batch_is_refused(tmp_path):
    run = launch(3, "training", tmp_path, 1)
    assert run.returncode != 0 and "batch must be a multiple of the 3 data-parallel ranks, got 4" in run.stderr
