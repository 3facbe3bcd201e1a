"""How a training plan is cut for ranks, recorded and compared, and which documents a step reads.

Shapes: T = seq_len, positions of a sequence · G = step_sequences, sequences of a step over all ranks · R ranks ·
B = device_batch_size, sequences of one rank's micro-batch · S sequences of an epoch.

Step s of an epoch takes sequences [s·G, (s + 1)·G), and rank r the r-th contiguous share of them, B at a time. So the
tokens of a step depend neither on ranks nor on micro-batches, and a position in the data is one integer, the step:

    S = 14, G = 6    step 0  0 1 2 3 4 5     step 1  6 7 8 9 10 11     left out  12 13
    R = 2, B = 3     rank 0  0 1 2           rank 1  3 4 5
    R = 3, B = 1     rank 0  0, then 1       rank 1  2, then 3         rank 2  4, then 5

Every epoch repeats the plan. chatdata's packing/epoch.py makes it; nanochat/order.py makes the order of nanochat's own
loaders.

A read is the part of one document that one sequence takes:

    stream, T = 4      tokens       a a a b b b b b c c c …       every sequence reads T + 1 tokens
                       sequence 0   a a a b b                     reads (a, 0 … 3), (b, 0 … 2)
                       sequence 1           b b b b c             reads (b, 1 … 5), (c, 0 … 1)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from chatdata.errors import PlanError
from chatdata.packing.epoch import Layout, Order, TrainingPlan
from chatdata.packing.layouts import Long
from chatdata.shards.masks import MaskPolicy
from chattrain.nanochat.order import line_tokens

PLAN_VERSION = 2  # of the plan's hash: raise it when the same settings come to mean other batches


def check_cut(plan: TrainingPlan, num_ranks: int, device_batch_size: int) -> None:
    """Raise PlanError unless a step can be cut into micro-batches of `device_batch_size` for `num_ranks` ranks."""
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


class PlanRecord(msgspec.Struct, frozen=True):
    """What decides the batches of every step, as run.json and checkpoints keep it."""

    build_id: str
    split: str
    rows: Layout  # named so until the next version of these files
    mask: MaskPolicy
    order: Order
    seq_len: int
    step_sequences: int
    seed: int | None
    long: Long | None
    num_ranks: int | None
    device_batch_size: int | None
    plan_version: int
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


def require_same_plan(saved: Mapping[str, Any], current: PlanRecord) -> None:
    """Raise PlanError naming the first key of a saved record that differs from the current one."""
    for name, value in msgspec.structs.asdict(current).items():
        if saved.get(name) != value:
            raise PlanError(
                f"the plan changed: {name} was {saved.get(name)!r} and is now {value!r}; "
                "a run continues only on the same build with the same plan"
            )


@dataclass(frozen=True, eq=False)
class Reads:
    """The runs of tokens that sequences read, in reading order. All int64 [n]."""

    sequence: np.ndarray  # of the plan, not of the step
    document: np.ndarray  # of the split
    start: np.ndarray  # tokens [start, stop) of the document
    stop: np.ndarray


def reads_of_step(plan: TrainingPlan, step: int) -> Reads:
    """What all ranks read in step 0, 1, … of the run, counted on through its epochs."""
    first = step % plan.num_steps * plan.step_sequences
    return reads_of_sequences(plan, first, first + plan.step_sequences)


def reads_of_sequences(plan: TrainingPlan, first: int, last: int) -> Reads:
    """What sequences [first, last) of the plan read."""
    sequences = np.arange(first, last)
    if plan.packing is not None:
        packing = plan.packing
        placed = slice(packing.bounds[first], packing.bounds[last])
        sequence = np.repeat(sequences, np.diff(packing.bounds[first : last + 1]))
        lengths = packing.lengths[placed]
        return Reads(sequence, packing.documents[placed], np.zeros_like(lengths), lengths)
    if plan.order == "plan":
        return _reads_of_line(plan.split.offsets, sequences, sequences * plan.seq_len, plan.seq_len + 1)
    assert plan.rank_offsets is not None and plan.num_ranks is not None and plan.device_batch_size is not None
    steps, rest = np.divmod(sequences, plan.step_sequences)
    ranks, rows = np.divmod(rest, plan.device_batch_size)
    starts = steps * line_tokens(plan) + rows * plan.seq_len
    parts = []
    for rank, offsets in enumerate(plan.rank_offsets):
        mine = ranks == rank
        part = _reads_of_line(offsets, sequences[mine], starts[mine], plan.seq_len + 1)
        parts.append(Reads(part.sequence, part.document * plan.num_ranks + rank, part.start, part.stop))
    order = np.argsort(np.concatenate([part.sequence for part in parts]), kind="stable")
    return Reads(*(np.concatenate([getattr(p, name) for p in parts])[order] for name in Reads.__dataclass_fields__))


def name_documents(reads: Reads, most: int = 8) -> str:
    """For one-line messages: "documents 3, 17 and 5 more" (numbers of the split)."""
    numbers = list(dict.fromkeys(reads.document.tolist()))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"document{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:most]))}{more}"


def _reads_of_line(offsets: np.ndarray, sequences: np.ndarray, starts: np.ndarray, num_tokens: int) -> Reads:
    """Reads of sequences that each take `num_tokens` tokens from `starts` of a line of documents back to back.

    offsets: [documents + 1], where the documents start in the line. Document numbers are those of the line.
    """
    stops = starts + num_tokens
    first = np.searchsorted(offsets, starts, side="right") - 1
    counts = np.searchsorted(offsets, stops - 1, side="right") - first
    of = np.repeat(np.arange(len(sequences)), counts)
    document = first[of] + np.arange(len(of)) - (np.cumsum(counts) - counts)[of]
    start, stop = np.maximum(offsets[document], starts[of]), np.minimum(offsets[document + 1], stops[of])
    return Reads(sequences[of], document, start - offsets[document], stop - offsets[document])
