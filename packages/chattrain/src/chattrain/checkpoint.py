"""Checkpoints: a folder each, whole or not there (written under another name, synced, renamed), no pickle in it.

step-00000120/model.safetensors        weights in fp32, nanochat's names
step-00000120/optimizer.safetensors    "parameter name/key" → tensor
step-00000120/state.json               step, model config, plan, recipe of the run
step-00000120/tokenizer/               the build's
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatdata.disk import sync
from chattrain.errors import CheckpointError, first_line
from chattrain.model import ModelConfig, parse_config

FORMAT, VERSION = "chattrain-checkpoint", 1


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder, its state read, its tensors still on disk."""

    path: Path
    step: int  # steps done: the next one to do
    config: ModelConfig
    plan: dict[str, Any]  # TrainingPlan.record() of the run, {} for an import
    recipe: dict[str, Any]  # what else decided the weights, {} for an import

    def weights(self) -> dict[str, Tensor]:
        return _read_tensors(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return _read_tensors(self.path / "optimizer.safetensors")


def checkpoint_name(step: int) -> str:
    """Folder names whose order is that of the steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    plan: Mapping[str, Any],
    recipe: Mapping[str, Any],
    tokenizer: Path,
) -> Path:
    """Write the checkpoint of `step` into `folder`; return its path. Raises CheckpointError where it cannot."""
    final = folder / checkpoint_name(step)
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in (("model", weights), ("optimizer", optimizer)):
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            write_tensors(contiguous, partial / f"{name}.safetensors")
        shutil.copytree(tokenizer, partial / "tokenizer")
        state = {"format": FORMAT, "version": VERSION, "step": step, "config": asdict(config)}
        state |= {"plan": dict(plan), "recipe": dict(recipe)}
        (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        if final.exists():  # a run that went back over this step
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: cannot be written: {first_line(error)}") from error
    return final


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that those may read who may read its neighbours: safetensors 0.8 makes 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the last one of a run folder. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    if not (path / "state.json").is_file():
        last = last_checkpoint(path)
        if last is None:
            raise CheckpointError(f"{path}: neither a checkpoint (no state.json) nor a run with checkpoints/")
        return last
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (state["format"], state["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path}: {state['format']} version {state['version']}; this chattrain reads {FORMAT} version {VERSION}"
            )
        config = parse_config(state["config"], f"{path}/state.json")
        return Checkpoint(path, state["step"], config, state["plan"], state["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}/state.json: damaged: {type(error).__name__} {error}") from error


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint with the most steps in a run folder. Partial ones have another name and are never looked at."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return read_checkpoint(found[-1]) if found else None


def keep_last(run: Path, number: int) -> None:
    """Remove all but the last `number` checkpoints of a run, and partial ones that a killed run left."""
    folder = run / "checkpoints"
    for path in [*sorted(folder.glob("step-*"))[:-number], *folder.glob(".step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {first_line(error)}") from error
