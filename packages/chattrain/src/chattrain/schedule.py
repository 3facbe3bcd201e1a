"""Stage policies (stages.toml) and the two curves they give: learning-rate multiplier and Muon's momentum."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from chatdata.packing.epoch import Layout, MaskPolicy
from chattrain.errors import UnknownStageError


@dataclass(frozen=True)
class Stage:
    """The policy of one stage. The fields are explained in stages.toml."""

    name: str
    layout: Layout
    mask: MaskPolicy
    lr_fraction: float
    lr_constant: float
    momentum: tuple[float, float]
    momentum_steps: int


@cache
def stages() -> dict[str, Stage]:
    """Every stage by name, in the file's order."""
    tables = tomllib.loads(files("chattrain").joinpath("stages.toml").read_text(encoding="utf-8"))
    return {name: Stage(name, **{**table, "momentum": tuple(table["momentum"])}) for name, table in tables.items()}


def find_stage(name: str) -> Stage:
    """Raises UnknownStageError, naming those there are."""
    if name not in stages():
        raise UnknownStageError(f"unknown stage {name!r}: must be one of {', '.join(stages())}")
    return stages()[name]


def multiplier(stage: Stage, step: int, num_steps: int) -> float:
    """Learning-rate multiplier at step 0 … num_steps − 1 (`lr_fraction` is not in it: it belongs to the base rates)."""
    progress = step / num_steps
    return 1.0 if progress < stage.lr_constant else (1.0 - progress) / (1.0 - stage.lr_constant)


def momentum(stage: Stage, step: int) -> float:
    """Muon's momentum at a step."""
    start, end = stage.momentum
    return start + (end - start) * min(step / stage.momentum_steps, 1.0)
