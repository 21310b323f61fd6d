"""What test_distributed.py runs on every rank: python -m torch.distributed.run ... ranks.py FUNCTION ARGUMENTS."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hsa_tl.model import Model, preset
from hsa_tl.model.distributed import ContextParallel, end_process
from hsa_tl.model.recipe import Recipe, recipe_of
from hsa_tl.model.train import train

T = 128
CONFIGS = {
    "hsa": {},
    "all chunks": {"topk": "all", "exclude_window": True, "value_residual": "resformer"},
    "joint": {"fusion": "joint", "window": 50, "heads": 8, "kv_heads": 2, "retrieval_heads": 2},
    "recency": {"recency": 4, "topk": 3},
    "distractors": {"distractors": 1, "topk": 12, "recency": 4},
    "distractors, all chunks": {"distractors": 1, "topk": "all", "fusion": "joint"},
    "swa": {"attention": "swa", "window": 70, "conv": 0},
    "full": {"attention": "full"},
    "experts": {"experts": 4, "experts_per_token": 2, "expert_dim": 64},
}


def make(name: str) -> tuple[Model, torch.Tensor, torch.Tensor]:
    """A model and a batch; labels so that a rank may have none."""
    torch.manual_seed(0)
    model = Model(dataclasses.replace(preset("tiny"), **CONFIGS[name]))
    input_ids = torch.randint(0, 320, (2, T))
    labels = input_ids.clone()
    labels[:, :40] = -100
    labels[1, :100] = -100
    return model, input_ids, labels


def results(model: Model, logits: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"logits": logits.detach(), "loss": loss.detach()[None], "gradients": gradients}


def recipe() -> Recipe:
    needles = {"kind": "needles", "tasks": [{"needles": 6, "queries": 6}]}
    return recipe_of({
        "name": "test", "preset": "tiny", "lr": 1e-3, "warmup": 2, "checkpoint_every": 2, "log_every": 1,
        "model": {"experts": 4, "experts_per_token": 2, "expert_dim": 64},
        "stages": [
            {"steps": 3, "length": 64, "batch": 4, "accumulate": 2, "data": needles, "model": {"topk": "all"}},
            {"steps": 3, "length": 128, "batch": 4, "data": needles, "model": {"topk": 4, "window": 16}},
        ],
    })  # fmt: skip


def context(out: str) -> None:
    """Every configuration through ContextParallel; rank 0 saves logits, loss and gradients."""
    dist.init_process_group("gloo")
    found = {}
    for name in CONFIGS:
        model, input_ids, labels = make(name)
        got = ContextParallel(model)(input_ids, labels=labels)
        got.loss.backward()
        ranks = dist.get_world_size()
        parts = [torch.empty_like(got.logits) for _ in range(ranks)]
        dist.all_gather(parts, got.logits.detach())
        mine = results(model, torch.cat(parts, 1), got.loss)
        for key in ("loss", "gradients"):
            dist.all_reduce(mine[key])
            mine[key] /= ranks
        found[name] = mine
    if dist.get_rank() == 0:
        torch.save(found, out)


def training(run: str, context_parallel: str, dies_at: str = "-1") -> None:
    """Trains the recipe; rank 1 is killed behind step dies_at."""

    def on_step(step):
        if step.step == int(dies_at) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    train(recipe(), Path(run), context_parallel=int(context_parallel), on_step=on_step)


def command(*arguments: str) -> None:
    """The command line."""
    from hsa_tl.cli import app

    app([*arguments, "--threads", "1"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"context": context, "training": training, "command": command}[sys.argv[1]](*sys.argv[2:])
    end_process()
