"""The plan: which documents make which sequence, and which sequences make which step, known before step 0.

Shapes: T = seq_len, positions of a sequence · G = step_sequences, sequences of a step over all ranks · R ranks ·
B = device_batch_size, sequences of one rank's micro-batch · S sequences of an epoch.

Step s of an epoch takes sequences [s·G, (s + 1)·G), and rank r the r-th contiguous share of them, B at a time. So which
tokens a step sees depends neither on ranks nor on micro-batches, and a position in the data is one integer, the step:

    S = 14, G = 6    step 0  0 1 2 3 4 5     step 1  6 7 8 9 10 11     left out  12 13
    R = 2, B = 3     rank 0  0 1 2           rank 1  3 4 5
    R = 3, B = 1     rank 0  0, then 1       rank 1  2, then 3         rank 2  4, then 5

Everything is integer arithmetic on the offsets (and on the mask, where it is applied): the same on every rank and
machine. Epoch e repeats the plan. The order of nanochat's own loaders is in nanochat_order.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from chatdata.errors import PlanError
from chatdata.packing.epoch import Epoch, Layout, plan_epoch
from chatdata.packing.layouts import Long

if TYPE_CHECKING:
    from chatdata.shards.read import Split

Order = Literal["plan", "nanochat"]

PLAN_VERSION = 2  # of what a plan's hash stands for: raise it when the same settings come to mean other batches


@dataclass(frozen=True, eq=False)
class TrainingPlan(Epoch):
    """Made by `make_training_plan` or `make_nanochat_plan`; read by batches.py."""

    seed: int | None = None  # of the order of the sequences (pack and pad)
    long: Long | None = None  # what became of documents over T + 1 tokens (pack and pad)
    order: Order = "plan"
    num_ranks: int | None = None  # order nanochat is of one number of ranks
    device_batch_size: int | None = None  # and of one batch size
    rank_offsets: tuple[np.ndarray, ...] | None = None  # order nanochat, stream: where documents start in a rank's line

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the batches of every step, as plain data, in the order in which a difference is named."""
        names = ("mask", "order", "seq_len", "step_sequences", "seed", "long", "num_ranks", "device_batch_size")
        return {
            "build_id": self.split.build.manifest["build_id"],
            "split": self.split.name,
            "rows": self.layout,  # its name in records until their next version
            **{name: getattr(self, name) for name in names},
            "plan_version": PLAN_VERSION,
        }

    @property
    def hash(self) -> str:
        """SHA-256 over the settings and every document's place."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        digest.update(np.array([self.num_steps], "<i8").tobytes())
        if self.packing is not None:
            for array in (self.packing.documents, self.packing.bounds, self.packing.lengths):
                digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps for `require_same_plan`: the settings and the hash."""
        return {**self.settings, "hash": self.hash}


def make_training_plan(
    split: Split, *, layout: Layout, mask: str, seq_len: int, step_sequences: int, seed: int = 42, long: Long = "error"
) -> TrainingPlan:
    """Plan an epoch over `split`: `plan_epoch` of chatdata, which `chatdata plan` shows, and what a run has to keep.

    Raises PlanError for arguments out of range, for a split that does not fill one step and for one without any target;
    PackingError for a document of more than T + 1 tokens with layout pack or pad and long="error".
    """
    epoch = plan_epoch(
        split, layout=layout, mask=mask, seq_len=seq_len, step_sequences=step_sequences, seed=seed, long=long
    )
    # the order of stream rows is the build's: neither a seed nor a length rule decides anything
    chosen = {} if epoch.packing is None else {"seed": seed, "long": long}
    return TrainingPlan(**vars(epoch), **chosen)


def check_cut(plan: TrainingPlan, num_ranks: int, device_batch_size: int) -> None:
    """Raises PlanError unless a step can be cut into micro-batches of `device_batch_size` for `num_ranks` ranks."""
    if num_ranks < 1 or device_batch_size < 1:
        raise PlanError(f"{num_ranks} ranks × device batch size {device_batch_size}: both must be at least 1")
    if plan.order == "nanochat" and (num_ranks, device_batch_size) != (plan.num_ranks, plan.device_batch_size):
        raise PlanError(
            f"order nanochat was planned for {plan.num_ranks} ranks × device batch size {plan.device_batch_size}, "
            f"not {num_ranks} × {device_batch_size}: its batches depend on both"
        )
    at_once = num_ranks * device_batch_size
    if plan.step_sequences % at_once:
        raise PlanError(
            f"a step of {plan.step_sequences} sequences cannot be cut for {num_ranks} ranks × device batch size "
            f"{device_batch_size}: --total-batch-tokens must be a multiple of {at_once} × {plan.seq_len} = "
            f"{at_once * plan.seq_len:,}"
        )


def require_same_plan(saved: Mapping[str, Any], plan: TrainingPlan) -> None:
    """Raises PlanError naming what changed, if `plan` is not the one whose `record()` was saved."""
    current = plan.record()
    for name in current:
        if saved.get(name) != current[name]:
            raise PlanError(
                f"the plan changed: {name} was {saved.get(name)!r} and is now {current[name]!r}; "
                "a run continues only on the same build with the same plan"
            )
