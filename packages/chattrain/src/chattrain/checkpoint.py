"""Checkpoints: one folder each, written whole or not at all (under another name, synced, renamed), without pickle.

step-00000120/model.safetensors        weights in fp32, nanochat's names
step-00000120/optimizer.safetensors    "parameter name/key" → tensor
step-00000120/state.json               step, model config, plan, recipe of the run, SHA-256 of all files
step-00000120/tokenizer/               the build's
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatdata.disk import Count, Positive, convert, decode, file_sha256, sync
from chatdata.errors import first_line
from chatdata.packing.epoch import Layout, Order, TrainingPlan
from chatdata.packing.layouts import Long
from chatdata.shards.manifest import Sha256
from chatdata.shards.masks import MaskPolicy
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import load_tokenizer
from chattrain.errors import CheckpointError, NonFiniteError, ResumeError, RunError
from chattrain.model import ModelConfig, State, Tensors, parse_config

FORMAT, VERSION = "chattrain-checkpoint", 2  # 2: with SHA-256, and "layout" in the plan
PLAN_VERSION = 2  # of the plan's hash: raise it when the same settings come to mean other batches

MAX_STEPS = 10**8 - 1  # fits the name of a checkpoint
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NAME = r"step-[0-9]{8}"  # of a checkpoint's folder: others in checkpoints/ are not ours


class Recipe(msgspec.Struct, frozen=True):
    """What decides the weights besides the plan and the model: a resumed run must have the same.

    Left out: ranks, device batch size, device, compile and recompute, which only change how the work is divided, and
    how often the run saves and validates.
    """

    init: str
    stage: str
    num_steps: Positive
    lr_scale: float
    dtype: Literal["float32", "bfloat16"]
    non_finite: Literal["raise", "skip"]
    seed: int

    def __post_init__(self) -> None:
        if self.num_steps > MAX_STEPS:
            raise RunError(f"{self.num_steps:,} steps: must be at most {MAX_STEPS:,}")


class PlanRecord(msgspec.Struct, frozen=True):
    """What decides the batches of every step, as run.json and checkpoints keep it."""

    build_id: str
    split: str
    layout: Layout
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
    settings = {name: getattr(plan, name) for name in names} | {"split": plan.split.name}
    settings |= {"build_id": plan.split.build.manifest["build_id"], "plan_version": PLAN_VERSION}
    hashed = settings | {"rows": plan.layout}  # the key it had in version 1: the hash stays
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    digest.update(np.array([plan.num_steps], "<i8").tobytes())
    if plan.packing is not None:
        for array in (plan.packing.documents, plan.packing.bounds, plan.packing.lengths):
            digest.update(array.astype("<i8").tobytes())
    return PlanRecord(**settings, layout=plan.layout, hash=digest.hexdigest())


def require_same(saved: Mapping[str, Any], current: PlanRecord | Recipe) -> None:
    """Raise ResumeError naming the first key of a saved record that differs from the current one."""
    for name, value in msgspec.structs.asdict(current).items():
        if saved.get(name) != value:
            kind = "plan" if isinstance(current, PlanRecord) else "recipe"
            change = f"{name} was {saved.get(name)!r} and is now {value!r}"
            same = "a run continues only on the same build, with the same plan and recipe"
            raise ResumeError(f"the {kind} changed: {change}; {same}")


class _State(msgspec.Struct):
    step: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)]
    config: dict[str, Any]
    plan: dict[str, Any]
    recipe: dict[str, Any]
    files: dict[str, Sha256]  # all others of the folder
    sha256: Sha256  # see `_state_sha256`


class Checkpoint(NamedTuple):
    """One checkpoint folder. Its state is in memory, its tensors are still on disk."""

    path: Path
    step: int  # steps done, so the number of the next one
    config: ModelConfig
    plan: dict[str, Any]  # the run's PlanRecord, {} for an import
    recipe: dict[str, Any]  # the run's Recipe, {} for an import
    files: dict[str, str]  # name → SHA-256

    def weights(self) -> dict[str, Tensor]:
        """Raises CheckpointError if the file is not the one that was saved; so does `optimizer_tensors`."""
        return self._tensors(WEIGHTS)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = self._tensors(OPTIMIZER)
        # AdamW counts its updates, in float32; a skipped step has none
        counts = {float(value) for name, value in tensors.items() if name.endswith("/step") and value.numel() == 1}
        updates, least = counts or {0.0}, 0 if self.recipe.get("non_finite") == "skip" else min(self.step, 2**24)
        if len(updates) > 1 or not least <= max(updates) <= self.step:
            raise CheckpointError(f"{self.path}: step {self.step:,}, but its optimizer did {max(updates):,.0f} updates")
        return tensors

    def state(self) -> State:
        return self.config, self.weights(), self.optimizer_tensors()

    def native_tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint was trained in another chat format, TokenizerError."""
        tokenizer = load_tokenizer(self.path / "tokenizer", native=False)
        if tokenizer.missing_special_tokens:
            other = "trained in another chat format than nanochat's; only that one is scored and exported"
            raise CheckpointError(f"{self.path}: {other}")
        return tokenizer

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / name
        try:
            if file_sha256(path) != self.files.get(name):
                raise CheckpointError(f"{path}: SHA-256 differs from state.json's: damaged, or of another checkpoint")
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not readable: {first_line(error)}") from error


def checkpoint_name(step: int) -> str:
    """Folder names that sort by step."""
    return f"step-{step:08d}"


def require_finite(tensors: Tensors, step: int) -> None:
    """Raise NonFiniteError naming the first of `tensors`, weights or optimizer state, that holds NaN or infinity.

    step: how many are done. Costs a third of writing the tensors: an infinity norm keeps NaN and copies nothing.
    """
    for name, tensor in tensors.items():
        if tensor.numel() and not math.isfinite(torch.linalg.vector_norm(tensor.detach(), math.inf)):
            kept = "no checkpoint is written, earlier ones are kept (a lower --lr-scale may help)"
            raise NonFiniteError(f"after {step:,} steps {name} is not finite: {kept}")


def save_checkpoint(
    folder: Path, step: int, config: ModelConfig, weights: Tensors, optimizer: Tensors, plan, recipe, tokenizer: Path
) -> Path:
    """Write the checkpoint of `step` into `folder`; return its path. Raises CheckpointError if it cannot.

    plan, recipe: the run's PlanRecord and Recipe, {} for an import. tokenizer: a folder whose files are copied. Hashing
    what was written takes a third as long as writing it.
    """
    final = folder / checkpoint_name(step)
    partial = folder / f".{final.name}.partial"
    state = {"format": FORMAT, "version": VERSION, "step": step, "config": config, "plan": plan, "recipe": recipe}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tokenizer").mkdir(parents=True)
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
            write_tensors({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial / name)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / "tokenizer" / name)
        files = {str(path.relative_to(partial)): file_sha256(path) for path in partial.rglob("*.*")}
        state = msgspec.to_builtins(state | {"files": files})
        text = json.dumps(state | {"sha256": _state_sha256(state)}, indent=1, sort_keys=True) + "\n"
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


def _state_sha256(state: dict[str, Any]) -> str:
    """SHA-256 of the rest of state.json, in one spelling, as a build's manifest has its build_id."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
        if last := last_checkpoint(path):
            return last
        raise CheckpointError(f"{path}: neither a checkpoint (no state.json) nor a run with checkpoints/")
    values = decode(file.read_bytes(), dict, str(file), CheckpointError)
    if (found := (values.get("format"), values.get("version"))) != (FORMAT, VERSION):
        ours = f"{FORMAT} version {VERSION}: read it with the chattrain that wrote it"
        raise CheckpointError(f"{path}: {found[0]} version {found[1]}; this chattrain reads {ours}")
    state = convert(values, _State, str(file), CheckpointError)
    if state.sha256 != _state_sha256(values):
        raise CheckpointError(f"{file}: does not match its sha256: it was changed after the run")
    if re.fullmatch(NAME, path.name) and path.name != checkpoint_name(state.step):
        raise CheckpointError(f"{file}: step {state.step}, but the folder is {path.name}: it was renamed")
    for name in TOKENIZER_FILES:
        tokenizer = path / "tokenizer" / name
        if state.files.get(f"tokenizer/{name}") != (file_sha256(tokenizer) if tokenizer.is_file() else None):
            raise CheckpointError(f"{tokenizer}: missing, or its SHA-256 differs from state.json's")
    config = parse_config(state.config, str(file))
    return Checkpoint(path, state.step, config, state.plan, state.recipe, state.files)


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The checkpoint with the most steps in a run folder."""
    found = kept_checkpoints(run)
    return read_checkpoint(found[max(found)]) if found else None


def kept_checkpoints(run: Path) -> dict[int, Path]:
    """Steps done → checkpoint of a run folder, in order. Only names that we write count, and partial ones do not."""
    return {int(path.name.removeprefix("step-")): path for path in _folders(run, NAME)}


def keep_last(run: Path, number: int) -> None:
    """Remove all but the last `number` checkpoints of a run, and partial ones that a killed run left."""
    for path in [*_folders(run, NAME)[:-number], *_folders(run, rf"\.{NAME}\.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _folders(run: Path, name: str) -> list[Path]:
    found = (run / "checkpoints").glob("*step-*")
    return sorted(path for path in found if re.fullmatch(name, path.name) and path.is_dir())
