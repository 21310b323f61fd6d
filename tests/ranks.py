"""What test_distributed.py runs on every rank: python -m torch.distributed.run ... ranks.py FUNCTION ARGUMENTS."""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from hsa_tl.model import Model, load, preset
from hsa_tl.model.distributed import ContextParallel, end_process
from hsa_tl.model.evaluate import answers_generated, answers_right, needle_samples
from hsa_tl.model.longcontext import LongReader
from hsa_tl.model.recipe import Recipe, recipe_of
from hsa_tl.model.sharing import SharedCache, SharedMemory
from hsa_tl.model.train import train

T = 128
CONFIGS = {
    "hsa": {},
    "all chunks": {"topk": "all", "exclude_window": True, "value_residual": "resformer"},
    "joint": {"fusion": "joint", "window": 50, "heads": 8, "kv_heads": 2, "retrieval_heads": 2},
    "mass": {"fusion": "mass", "distractors": 1, "topk": 6, "kv_heads": 2, "encoder_overlap": 7},
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


def results(model: Model, logits: torch.Tensor, loss: torch.Tensor, asked: torch.Tensor) -> dict[str, torch.Tensor]:
    """asked: the logits in eval mode."""
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"logits": logits.detach(), "loss": loss.detach()[None], "gradients": gradients, "asked": asked.detach()}


def gather(x: torch.Tensor) -> torch.Tensor:
    """The parts of all ranks, along the tokens."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    return torch.cat(parts, 1)


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


def context(out: str, *names: str) -> None:
    """Configurations through ContextParallel; rank 0 saves logits, loss and gradients."""
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        model, input_ids, labels = make(name)
        got = ContextParallel(model)(input_ids, labels=labels)
        got.loss.backward()
        asked = ContextParallel(model.eval())(input_ids).logits
        mine = results(model, gather(got.logits), got.loss, gather(asked))
        for key in ("loss", "gradients"):
            dist.all_reduce(mine[key])
            mine[key] /= dist.get_world_size()
        found[name] = mine
    if dist.get_rank() == 0:
        torch.save(found, out)


SHARED = {
    "hsa": {"topp": 0.9},
    "groups": {"layers": 5, "groups": 2, "kv_heads": 2, "window": 21, "value_residual": "resformer"},
    "joint": {"fusion": "joint", "exclude_window": True, "conv": 0},
    "mass": {"fusion": "mass", "kv_heads": 2, "encoder_overlap": 15},
    "recency": {"recency": 4, "topk": 3, "fusion": "stick_breaking"},
    "all chunks": {"topk": "all"},
}
NEW = 40  # tokens to generate: their chunks are chosen, too


def contexts(case: str) -> tuple[Model, list[torch.Tensor]]:
    """NAME@LENGTH: a model of SHARED and two contexts that differ little."""
    name, length = case.split("@")
    torch.manual_seed(0)
    model = Model(dataclasses.replace(preset("tiny"), **SHARED[name])).eval()
    first = torch.randint(0, 319, (int(length),))
    second = first.clone()
    second[[int(length) // 13, -5]] += 1
    return model, [first, second]


def read(cases: list[str], memory: type, reader, cache) -> dict[str, torch.Tensor]:
    """Logits, choices and what is generated; memory: whose choices. reader(model), cache(model, tokens)."""
    found, chosen, attend = {}, [], memory.attend

    def recorded(self, q, weights, indices, **options):
        chosen.append(indices.flatten())
        return attend(self, q, weights, indices, **options)

    for case in cases:
        model, tokens = contexts(case)
        reads = reader(model)
        chosen.clear()
        with mock.patch.object(memory, "attend", recorded):
            logits = [reads.read(x.numpy().astype(np.uint16), 12) for x in tokens]
        written = cache(model, tokens[0][:-1])
        new = model.generate(tokens[0][None, -1:], NEW, cache=written)[0]
        after = model(tokens[0][None, :20], cache=written).logits[0]
        found |= {f"{case} logits": torch.cat([*logits, after]), f"{case} tokens": new}
        found[f"{case} choices"] = torch.cat(chosen)
    return found


def reading(out: str, *cases: str) -> None:
    """Contexts that the ranks share; each saves what it found, and the bytes that it sent for one token."""
    dist.init_process_group("gloo")
    group, sent = dist.group.WORLD, []
    reader = lambda model: LongReader(model, segment=64, group=group)  # noqa: E731
    found = read(cases, SharedMemory, reader, lambda *args: SharedCache(*args, group, segment=64))
    model, sample = load("needle-tiny"), next(needle_samples("mq-niah", 2000, 1))
    found["answers"] = [*answers_right(reader(model), sample), *answers_generated(model, sample, group=group)]

    cache, one = SharedCache(model, torch.zeros(300).long(), group), torch.zeros(1, 1).long()
    model(one, cache=cache)  # with it the upper decoder reads what waited
    counted = lambda call: lambda *args, **options: sent.append(args[-1].nbytes) or call(*args, **options)  # noqa: E731
    with mock.patch.multiple(dist, all_gather=counted(dist.all_gather), all_reduce=counted(dist.all_reduce)):
        model(one, cache=cache)
    try:
        model(one + dist.get_rank(), cache=cache)
    except ValueError as error:
        found["differs"] = str(error)
    torch.save(found | {"sent": sent, "held": cache.memory.longest}, f"{out}.{dist.get_rank()}")


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
    functions = {"context": context, "reading": reading, "training": training, "command": command}
    functions[sys.argv[1]](*sys.argv[2:])
    end_process()
