"""What a run was asked to do, and which part of it decides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatdata.packing.epoch import Layout, Order
from chatdata.packing.layouts import Long
from chattrain.errors import ResumeError

Dtype = Literal["float32", "bfloat16"]
NonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class Settings:
    """The command line of `chattrain run`. None: the stage's or the device's default."""

    data: Path
    out: Path
    init: str
    stage: str | None = None
    seq_len: int = 2048
    device_batch_size: int = 8
    total_batch_tokens: int | None = None
    steps: int | None = None
    epochs: int = 1
    stop_at: int | None = None
    lr_scale: float = 1.0
    save_every: int | None = None
    keep_last: int = 2
    eval_every: int | None = None
    layout: Layout | None = None
    mask: str | None = None  # one of chatdata.shards.masks.MaskPolicy
    order: Order = "plan"
    long: Long = "error"
    non_finite: NonFinite = "raise"
    device: str | None = None
    dtype: Dtype | None = None
    compile: bool | None = None
    recompute: bool = False
    seed: int = 42
    resume: bool = False
    tensorboard: bool = False


def recipe_of(settings: Settings, stage: str, num_steps: int, dtype: Dtype) -> dict[str, Any]:
    """What decides the weights beside the plan and the model: a resumed run must have the same.

    Not in it: ranks, device batch size, device, compile and recompute, which only cut the same work otherwise, and how
    often is saved and evaluated.
    """
    return {
        "init": settings.init,
        "stage": stage,
        "num_steps": num_steps,
        "lr_scale": settings.lr_scale,
        "dtype": dtype,
        "non_finite": settings.non_finite,
        "seed": settings.seed,
    }


def require_same_recipe(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ResumeError naming the first setting that is not what the run began with."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise ResumeError(
                f"--resume: {name} was {saved.get(name)!r} and is now {value!r}; "
                "a run continues only with the same recipe"
            )
