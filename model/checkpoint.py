"""Checkpoints that are whole or skipped: a folder for each step, named when all of it is on disk.

run/step-00000100/model.safetensors   weights
                  state.pt            optimizer, random number generators
                  meta.json           step, recipe, size and checksum of the two
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from hsa_tl.files import write_atomic

WEIGHTS, STATE, META = "model.safetensors", "state.pt", "meta.json"


class TornCheckpoint(UserWarning):
    """A checkpoint that is not whole was skipped."""


class Checkpoint(NamedTuple):
    step: int  # steps done
    recipe: dict[str, Any]
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def save(run: Path, step: int, recipe: dict, weights: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Writes run/step-<step> and removes all but the newest `keep`. A kill at any moment leaves whole folders only."""
    path, temporary = run / f"step-{step:08d}", run / f".step-{step:08d}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # Tied weights share storage, which safetensors refuses: one copy is stored under each name.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        files = {name: _digest(temporary / name) for name in (WEIGHTS, STATE)}
        for name in files:
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        write_atomic(temporary / META, json.dumps({"step": step, "recipe": recipe, "files": files}, indent=1) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in [*sorted(run.glob("step-*"))[:-keep], *run.glob(".step-*")]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load(path: Path) -> Checkpoint:
    """One checkpoint, its checksums verified. ValueError: torn or not one. OSError: it cannot be read."""
    try:
        meta = json.loads((path / META).read_text())
        for name, want in meta["files"].items():
            if (got := _digest(path / name)) != want:
                raise ValueError(f"{path / name} must have {want}, got {got}")
        state = torch.load(path / STATE, weights_only=True)
        return Checkpoint(meta["step"], meta["recipe"], load_file(path / WEIGHTS), state, path)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a checkpoint, got {error!r} in {META}") from None


def latest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; a torn one is skipped with a warning. None: there is none."""
    for path in sorted(run.glob("step-*"), reverse=True):
        try:
            return load(path)
        except (ValueError, OSError) as error:
            warnings.warn(f"skipped a torn checkpoint: {error}", TornCheckpoint, stacklevel=2)
    return None
