"""Checkpoints of torch.distributed.checkpoint that are whole or skipped: a folder for each step, named when complete.

run/step-00000100/*.distcp, .metadata   weights and optimizer, each rank's shards; any number of ranks reads them
                  rng.pt                random number generators
                  meta.json             step, recipe, size and checksum of every other file

torch.distributed.checkpoint is imported where it is used: it takes a second, which every command would wait for.
"""

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from hsa_tl.files import sha256_of, write_atomic
from hsa_tl.validation import require

RNG, META = "rng.pt", "meta.json"


class TornCheckpoint(UserWarning):
    """A checkpoint that is not whole was skipped."""


class Checkpoint(NamedTuple):
    step: int  # steps done
    recipe: dict[str, Any]
    rng: dict[str, torch.Tensor]
    path: Path


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _quietly(function, *args, **kwargs):
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():  # torch says that one process is not distributed, and deprecates its own calls
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except CheckpointException as error:  # a BaseException, such as of a full disk
            why, _ = next(iter(error.failures.values()))
            while why.__context__ is not None:  # what torch met while it closed its file
                why = why.__context__
            raise OSError(f"a checkpoint must be read or written whole, got {why}") from error


def save(
    run: Path, step: int, recipe: dict, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer],
    rng: dict[str, torch.Tensor], keep: int,
) -> Path:  # fmt: skip
    """Writes run/step-<step> and removes all but the newest `keep`. A kill at any moment leaves whole folders only.

    Every rank calls it; sharded parameters are written by the ranks that hold them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path, temporary = run / f"step-{step:08d}", run / f".step-{step:08d}"
    if _first_rank():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _wait()
    weights, moments = _quietly(get_state_dict, model, optimizers)
    _quietly(dcp.save, {"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    if _first_rank():
        torch.save(rng, temporary / RNG)
        with (temporary / RNG).open("rb") as file:
            os.fsync(file.fileno())
        files = {p.name: _digest(p) for p in sorted(temporary.iterdir())}
        write_atomic(temporary / META, json.dumps({"step": step, "recipe": recipe, "files": files}, indent=1) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        done = sorted(p for p in run.glob("step-*") if p <= path)  # a newer one is torn, and none of those kept
        for old in [*done[:-keep], *run.glob(".step-*")]:
            shutil.rmtree(old)
    _wait()
    return path


def latest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, its checksums verified; a torn one is skipped with a warning. None: there
    is none."""
    for path in sorted(run.glob("step-*"), reverse=True):
        try:
            meta = json.loads((path / META).read_text())
            for name, want in meta["files"].items():
                require((got := _digest(path / name)) == want, path / name, f"have {want}", got)
            return Checkpoint(meta["step"], meta["recipe"], torch.load(path / RNG, weights_only=True), path)
        except (ValueError, OSError, KeyError, TypeError) as error:
            warnings.warn(f"skipped a torn checkpoint, {path}: {error}", TornCheckpoint, stacklevel=2)
    return None


def load(found: Checkpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Fills parameters and buffers, and optimizers, sharded over any number of ranks. ValueError: another model's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    weights, moments = _quietly(get_state_dict, model, optimizers)
    stored = dcp.FileSystemReader(found.path).read_metadata().state_dict_metadata
    have = {k.removeprefix("model."): tuple(v.size) for k, v in stored.items() if k.startswith("model.")}
    want = {k: tuple(v.shape) for k, v in weights.items()}
    if differ := sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k)):
        got = f"{differ[0]} {have.get(differ[0], 'missing')}, expected {want.get(differ[0], 'none')}"
        more = f", and {len(differ) - 1} more" if differ[1:] else ""
        raise ValueError(f"{found.path} must hold the weights of this model, got {got}{more}")
    state = {"model": weights}
    if optimizers:  # what never had a gradient has no moments
        moved = {k.rpartition(".")[0] for k in stored}
        moments["state"] = {k: v for k, v in moments["state"].items() if f"optimizer.state.{k}" in moved}
        state["optimizer"] = moments
    _quietly(dcp.load, state, checkpoint_id=found.path)
    options = StateDictOptions(strict=False)
    _quietly(set_state_dict, model, optimizers, model_state_dict=weights, optim_state_dict=moments, options=options)
