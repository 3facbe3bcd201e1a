"""Checkpoints: one folder each, written whole or not at all (under another name, synced, renamed), without pickle.

step-00000120/model.safetensors        weights in fp32, nanochat's names
step-00000120/optimizer.safetensors    "parameter name/key" → tensor
step-00000120/state.json               step, model config, plan, recipe of the run
step-00000120/tokenizer/               the build's
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatdata.disk import Count, Positive, decode, sync
from chatdata.packing.epoch import Layout, Order, TrainingPlan
from chatdata.packing.layouts import Long
from chatdata.shards.masks import MaskPolicy
from chattrain.errors import CheckpointError, ResumeError, first_line
from chattrain.model import ModelConfig, parse_config

FORMAT, VERSION = "chattrain-checkpoint", 1
PLAN_VERSION = 2  # of the plan's hash: raise it when the same settings come to mean other batches

Dtype = Literal["float32", "bfloat16"]
NonFinite = Literal["raise", "skip"]


class Recipe(msgspec.Struct, frozen=True):
    """What decides the weights besides the plan and the model: a resumed run must have the same.

    Left out: ranks, device batch size, device, compile and recompute, which only change how the work is divided, and
    how often the run saves and validates.
    """

    init: str
    stage: str
    num_steps: Positive
    lr_scale: float
    dtype: Dtype
    non_finite: NonFinite
    seed: int


class PlanRecord(msgspec.Struct, frozen=True):
    """What decides the batches of every step, as run.json and checkpoints keep it."""

    build_id: str
    split: str
    rows: Layout  # named so until the next version of these files
    mask: MaskPolicy
    order: Order
    seq_len: Positive
    step_sequences: Positive
    seed: int | None
    long: Long | None
    num_ranks: Positive | None
    device_batch_size: Positive | None
    plan_version: Count
    hash: str  # SHA-256 over the above and every document's place


def plan_record(plan: TrainingPlan) -> PlanRecord:
    names = ("mask", "order", "seq_len", "step_sequences", "seed", "long", "num_ranks", "device_batch_size")
    settings = {name: getattr(plan, name) for name in names} | {"split": plan.split.name, "rows": plan.layout}
    settings |= {"build_id": plan.split.build.manifest["build_id"], "plan_version": PLAN_VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.array([plan.num_steps], "<i8").tobytes())
    if plan.packing is not None:
        for array in (plan.packing.documents, plan.packing.bounds, plan.packing.lengths):
            digest.update(array.astype("<i8").tobytes())
    return PlanRecord(**settings, hash=digest.hexdigest())


def require_same(saved: Mapping[str, Any], current: PlanRecord | Recipe) -> None:
    """Raise ResumeError naming the first key of a saved record that differs from the current one."""
    for name, value in msgspec.structs.asdict(current).items():
        if saved.get(name) != value:
            kind = "plan" if isinstance(current, PlanRecord) else "recipe"
            raise ResumeError(
                f"the {kind} changed: {name} was {saved.get(name)!r} and is now {value!r}; "
                "a run continues only on the same build, with the same plan and recipe"
            )


class _Version(msgspec.Struct):
    format: str
    version: Count


class _State(_Version):
    step: Count
    config: dict[str, Any]
    plan: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder. Its state is in memory, its tensors are still on disk."""

    path: Path
    step: int  # steps done, so the number of the next one
    config: ModelConfig
    plan: dict[str, Any]  # the run's PlanRecord, {} for an import
    recipe: dict[str, Any]  # the run's Recipe, {} for an import

    def weights(self) -> dict[str, Tensor]:
        return _read_tensors(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return _read_tensors(self.path / "optimizer.safetensors")


def checkpoint_name(step: int) -> str:
    """Folder names that sort by step."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    plan: Any,
    recipe: Any,
    tokenizer: Path,
) -> Path:
    """Write the checkpoint of `step` into `folder`; return its path. Raises CheckpointError if it cannot.

    plan, recipe: the run's PlanRecord and Recipe, {} for an import. tokenizer: a folder, copied.
    """
    final = folder / checkpoint_name(step)
    partial = folder / f".{final.name}.partial"
    state = {"format": FORMAT, "version": VERSION, "step": step, "config": config, "plan": plan, "recipe": recipe}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, tensors in (("model", weights), ("optimizer", optimizer)):
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            write_tensors(contiguous, partial / f"{name}.safetensors")
        shutil.copytree(tokenizer, partial / "tokenizer")
        text = json.dumps(msgspec.to_builtins(state), indent=1, sort_keys=True) + "\n"
        (partial / "state.json").write_text(text, encoding="utf-8")
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
    """Write a safetensors file with the usual permissions: safetensors 0.8 itself makes it 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the last one of a run folder. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint or run folder")
    file = path / "state.json"
    if not file.is_file():
        last = last_checkpoint(path)
        if last is None:
            raise CheckpointError(f"{path}: neither a checkpoint (no state.json) nor a run with checkpoints/")
        return last
    data = file.read_bytes()
    found = decode(data, _Version, str(file), CheckpointError)
    if (found.format, found.version) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: {found.format} version {found.version}; this chattrain reads {FORMAT} version {VERSION}"
        )
    state = decode(data, _State, str(file), CheckpointError)
    return Checkpoint(path, state.step, parse_config(state.config, str(file)), state.plan, state.recipe)


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint with the most steps in a run folder. Partial ones have another name and are never read."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return read_checkpoint(found[-1]) if found else None


def keep_last(run: Path, number: int) -> None:
    """Remove all but the last `number` checkpoints of a run, and partial ones that a killed run left."""
    folder = run / "checkpoints"
    for path in [*sorted(folder.glob("step-*"))[:-number], *folder.glob(".step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {first_line(error)}") from error
