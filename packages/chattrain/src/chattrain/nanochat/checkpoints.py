"""Import of karpathy/nanochat's own checkpoints: model_<step>.pt and meta_<step>.json in a folder (December 2025)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from chatdata.disk import decode
from chatdata.errors import first_line
from chattrain.errors import ImportNanochatError
from chattrain.model import ModelConfig, parse_config
from chattrain.nanochat.export import whole_weights

COMPILED_PREFIX = "_orig_mod."  # torch.compile's wrapper puts it before every name


# what newer checkpoints have in their config or among their tensors: the architecture of January 2026 and later
NEWER = {"window_pattern": "sliding windows of attention", "resid_lambdas": "scaled residuals"}
NEWER |= {"x0_lambdas": "residuals from the embedding", "value_embeds": "value embeddings"}
NEWER |= {"ve_gate": "gated value embeddings"}


class _Meta(msgspec.Struct):
    model_config: dict[str, Any]
    step: int | None = None  # checkpoints of chat_rl.py have none


def import_nanochat(folder: str | Path) -> tuple[dict[str, Tensor], ModelConfig, int]:
    """The weights (fp32; our names are nanochat's), config and step of the last checkpoint in `folder`.

    Only tensors are unpickled. Rows are added for a vocabulary that is no multiple of 64, which nanochat did not pad
    then; they are zero and never chosen. Raises ImportNanochatError for missing, unreadable or contradicting files and
    for the architecture of 2026, ConfigError for a wrong model config, and WeightsError for unknown, missing or wrongly
    shaped tensors.
    """
    step, model_path = _last(Path(folder), "model", "pt")
    meta_step, meta_path = _last(Path(folder), "meta", "json")
    if meta_step != step:
        raise ImportNanochatError(f"{folder}: the last model is of step {step}, the last meta file of step {meta_step}")

    meta = decode(meta_path.read_bytes(), _Meta, str(meta_path), ImportNanochatError)
    if meta.step not in (None, step):
        raise ImportNanochatError(f"{meta_path}: says step {meta.step}, its name says {step}")
    _refuse_newer(meta.model_config, f"{meta_path}, key")
    config = parse_config(meta.model_config, str(meta_path))

    try:
        saved = torch.load(model_path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader fails in many ways on other bytes
        raise ImportNanochatError(f"{model_path}: not a file of tensors only: {first_line(error)}") from error
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ImportNanochatError(f"{model_path}: not a dictionary of tensors")
    weights = {name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in saved.items()}
    _refuse_newer(weights, f"{model_path}, tensor")
    return whole_weights(weights, config, str(model_path)), config, step


def _refuse_newer(names: Iterable[str], where: str) -> None:
    for name in names:
        if meaning := next((meaning for known, meaning in NEWER.items() if known in name), None):
            ours = "chattrain has the one of December 2025 (790f3be)"
            newer = f"{meaning}, so it is of nanochat's architecture since January 2026"
            raise ImportNanochatError(f"{where} {name}: {newer}; {ours}")


def _last(folder: Path, kind: str, suffix: str) -> tuple[int, Path]:
    matches = ((re.fullmatch(rf"{kind}_(\d+)", path.stem), path) for path in folder.glob(f"{kind}_*.{suffix}"))
    if not (found := [(int(match[1]), path) for match, path in matches if match]):
        raise ImportNanochatError(f"{folder}: no {kind}_<step>.{suffix} in it: must be a nanochat checkpoint folder")
    return max(found)
