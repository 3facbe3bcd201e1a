"""The settings of a run: the command line of `chattrain run`."""

from dataclasses import dataclass
from pathlib import Path

from chatdata.packing.epoch import Layout, Order
from chatdata.packing.layouts import Long
from chatdata.shards.masks import MaskPolicy
from chattrain.checkpoint import Dtype, NonFinite


@dataclass(frozen=True)
class RunSettings:
    """None: the default of the stage or the device."""

    data: str | Path  # or an address
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
    mask: MaskPolicy | None = None
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
