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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from chatdata.packing import Long, Packing, pack, pad, stream
from chattrain.errors import PlanError

if TYPE_CHECKING:
    from chatdata.shards import Split

Rows = Literal["stream", "pack", "pad"]
MaskUse = Literal["ignore", "apply"]  # ignore: every next token is a target · apply: those where the mask is 1
Order = Literal["plan", "nanochat"]

PLAN_VERSION = 2  # of what a plan's hash stands for: raise it when the same settings come to mean other batches
MAX_SEQ_LEN = 2**20  # 512 × nanochat's; packing keeps a set of rooms of this many bits
CHUNK_TOKENS = 2**22  # of the mask counted at a time: 32 MiB of sums


@dataclass(frozen=True)
class LeftOut:
    """What an epoch of the plan does not train on, each thing counted once, in the first field it fits."""

    long_documents_dropped: int = 0  # more than T + 1 tokens, long="drop"
    long_documents_cut: int = 0  # trained on, but cut to T + 1 tokens by long="truncate"
    long_tokens: int = 0  # tokens of the dropped, tokens cut from the others
    one_token_documents: int = 0  # (pack and pad) nothing to predict
    documents_without_targets: int = 0  # (pack and pad) nothing supervised, before or after the cut
    tail_tokens: int = 0  # (stream) never a target, because they do not fill a sequence
    sequences: int = 0  # S mod G at the end
    sequence_targets: int = 0  # the targets in them


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Made by `make_plan` or `make_nanochat_plan`; read by batches.py."""

    split: Split
    rows: Rows
    mask: MaskUse
    seq_len: int
    step_sequences: int
    num_steps: int  # of an epoch
    tokens_per_step: np.ndarray  # int64 [num_steps], input tokens over all ranks, padding not counted
    targets_per_step: np.ndarray  # int64 [num_steps], over all ranks
    left_out: LeftOut
    packing: Packing | None  # pack and pad: the documents of every sequence
    seed: int | None = None  # of the order of the sequences (pack and pad)
    long: Long | None = None  # what became of documents over T + 1 tokens (pack and pad)
    order: Order = "plan"
    num_ranks: int | None = None  # order nanochat is of one number of ranks
    device_batch_size: int | None = None  # and of one batch size
    rank_offsets: tuple[np.ndarray, ...] | None = None  # order nanochat, stream: where documents start in a rank's line

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the batches of every step, as plain data, in the order in which a difference is named."""
        names = ("rows", "mask", "order", "seq_len", "step_sequences", "seed", "long", "num_ranks", "device_batch_size")
        return {
            "build_id": self.split.build.manifest["build_id"],
            "split": self.split.name,
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

    def counts(self) -> dict[str, Any]:
        """The plan in numbers, for people and logs: plain integers."""
        return {
            "documents": len(self.split),
            "tokens": self.split.num_tokens,
            "steps": self.num_steps,
            "sequences": self.num_steps * self.step_sequences,
            "input_tokens": int(self.tokens_per_step.sum()),
            "targets": int(self.targets_per_step.sum()),
            # they train nothing; only stream rows with the mask applied can have any
            "steps_without_targets": int(np.count_nonzero(self.targets_per_step == 0)),
            "left_out": asdict(self.left_out),
        }


def make_plan(
    split: Split, *, rows: Rows, mask: MaskUse, seq_len: int, step_sequences: int, seed: int = 42, long: Long = "error"
) -> BatchPlan:
    """Plan an epoch over `split`.

    Raises PlanError for arguments out of range and for a split that does not fill one step; chatdata's PackingError for
    a document of more than T + 1 tokens with rows pack or pad and long="error".
    """
    check_setting("rows", rows, get_args(Rows))
    check_setting("mask", mask, get_args(MaskUse))
    check_setting("long", long, get_args(Long))
    check_sizes(seq_len, step_sequences)
    if rows == "stream":
        num_sequences, tail_tokens = stream(split.num_tokens, seq_len)
        tokens = np.full(num_sequences, seq_len)
        targets = tokens if mask == "ignore" else _stream_targets(split, num_sequences, seq_len)
        packing, left_out = None, {"tail_tokens": tail_tokens}
    else:
        lengths = np.diff(split.offsets)
        num_targets = document_targets(split, mask, seq_len)
        packing = (pack if rows == "pack" else pad)(lengths, num_targets, seq_len, seed, long)
        tokens = sums(packing.lengths - 1, packing.bounds)
        targets = sums(num_targets[packing.documents], packing.bounds)
        num_one_token = int(np.count_nonzero(lengths < 2))
        left_out = {
            "long_documents_dropped": packing.num_dropped,
            "long_documents_cut": packing.num_truncated,
            "long_tokens": packing.num_tokens_lost,
            "one_token_documents": num_one_token,
            "documents_without_targets": packing.num_without_targets - num_one_token,
        }
    num_steps, num_over = divmod(len(tokens), step_sequences)
    if not num_steps:
        raise too_small(split, len(tokens), seq_len, step_sequences)
    used = num_steps * step_sequences
    return BatchPlan(
        split=split,
        rows=rows,
        mask=mask,
        seq_len=seq_len,
        step_sequences=step_sequences,
        num_steps=num_steps,
        tokens_per_step=tokens[:used].reshape(num_steps, -1).sum(1),
        targets_per_step=targets[:used].reshape(num_steps, -1).sum(1),
        left_out=LeftOut(sequences=num_over, sequence_targets=int(targets[used:].sum()), **left_out),
        packing=packing,
        seed=None if packing is None else seed,
        long=None if packing is None else long,
    )


def check_cut(plan: BatchPlan, num_ranks: int, device_batch_size: int) -> None:
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
            f"{device_batch_size}: it must be a multiple of {at_once}"
        )


def require_same_plan(saved: Mapping[str, Any], plan: BatchPlan) -> None:
    """Raises PlanError naming what changed, if `plan` is not the one whose `record()` was saved."""
    current = plan.record()
    for name in current:
        if saved.get(name) != current[name]:
            raise PlanError(
                f"the plan changed: {name} was {saved.get(name)!r} and is now {current[name]!r}; "
                "a run continues only on the same build with the same plan"
            )


def document_targets(split: Split, mask: MaskUse, seq_len: int) -> np.ndarray:
    """Targets of every document on its own, after a cut to T + 1 tokens; position 0 is never one. int64 [documents]."""
    offsets = split.offsets
    taken = np.minimum(np.diff(offsets), seq_len + 1)
    if mask == "ignore":
        return np.maximum(taken - 1, 0)
    counts = np.empty(len(taken), np.int64)
    first = 0
    while first < len(counts):
        # whole documents, at least one
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, side="right")) - 1)
        start = offsets[first]
        before = np.zeros(offsets[last] - start + 1, np.int64)  # supervised tokens before each
        np.cumsum(split.mask(start, offsets[last]), out=before[1:])
        starts, ends = offsets[first:last] - start, offsets[first:last] - start + taken[first:last]
        counts[first:last] = before[ends] - before[np.minimum(starts + 1, ends)]
        first = last
    return counts


def sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """values [bounds[-1]] summed from each bound to the next: int64 [bounds - 1]."""
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[bounds])


def check_setting(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise PlanError(f"{name} is {value!r}: it must be one of {', '.join(valid)}")


def check_sizes(seq_len: int, step_sequences: int) -> None:
    if not 1 <= seq_len <= MAX_SEQ_LEN:
        raise PlanError(f"sequence length is {seq_len}: it must lie in 1 … {MAX_SEQ_LEN:,}")
    if step_sequences < 1:
        raise PlanError(f"a step has {step_sequences} sequences: it must have at least 1")


def too_small(split: Split, num_sequences: int, seq_len: int, step_sequences: int) -> PlanError:
    return PlanError(
        f"{split.name} has {len(split):,} documents with {split.num_tokens:,} tokens: {num_sequences:,} sequences of "
        f"{seq_len} positions, but one step takes {step_sequences}; use a smaller batch or sequence length"
    )


def _stream_targets(split: Split, num_sequences: int, seq_len: int) -> np.ndarray:
    """Supervised targets of every sequence, read back to back: int64 [num_sequences]."""
    counts = np.empty(num_sequences, np.int64)
    at_once = max(1, CHUNK_TOKENS // seq_len)
    for first in range(0, num_sequences, at_once):
        last = min(first + at_once, num_sequences)
        # sequence k predicts tokens k·T + 1 … (k + 1)·T
        mask = split.mask(first * seq_len + 1, last * seq_len + 1)
        counts[first:last] = np.count_nonzero(mask.reshape(-1, seq_len), axis=1)
    return counts
