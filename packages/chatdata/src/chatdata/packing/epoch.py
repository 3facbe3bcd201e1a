"""How many sequences and steps a split makes, and what is in each: `chatdata plan` shows it, chattrain trains on it.

Shapes: T = seq_len, positions of a sequence · G = step_sequences, sequences of a step · S sequences of an epoch. Step s
takes sequences [s·G, (s + 1)·G); the S mod G at the end are left out. Everything is integer arithmetic on the offsets
(and on the mask, where it is applied): the same everywhere. Which documents make which sequence: packing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from chatdata.errors import PlanError
from chatdata.packing.layouts import Long, Packing, pack, pad, stream
from chatdata.shards.masks import MaskPolicy, check_policy

if TYPE_CHECKING:
    from chatdata.shards.read import Split

Layout = Literal["stream", "pack", "pad"]

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
class Sequences:
    """All sequences a split makes, in the order of an epoch."""

    tokens: np.ndarray  # int64 [S], input tokens, padding not counted
    targets: np.ndarray  # int64 [S]
    packing: Packing | None  # pack and pad: the documents of every sequence
    left_out: LeftOut


@dataclass(frozen=True, eq=False)
class Epoch:
    """The sequences cut into steps."""

    split: Split
    layout: Layout
    mask: MaskPolicy
    seq_len: int
    step_sequences: int
    num_steps: int
    tokens_per_step: np.ndarray  # int64 [num_steps], input tokens over all ranks, padding not counted
    targets_per_step: np.ndarray  # int64 [num_steps], over all ranks
    left_out: LeftOut
    packing: Packing | None  # pack and pad: the documents of every sequence

    def counts(self) -> dict[str, Any]:
        """The epoch in numbers, for people and logs: plain integers."""
        return {
            "documents": len(self.split),
            "tokens": self.split.num_tokens,
            "steps": self.num_steps,
            "sequences": self.num_steps * self.step_sequences,
            "input_tokens": int(self.tokens_per_step.sum()),
            "targets": int(self.targets_per_step.sum()),
            # they train nothing; only layout stream with the mask applied can have any
            "steps_without_targets": int(np.count_nonzero(self.targets_per_step == 0)),
            "left_out": asdict(self.left_out),
        }


def plan_epoch(
    split: Split,
    *,
    layout: Layout,
    mask: str,
    seq_len: int,
    step_sequences: int,
    seed: int = 42,
    long: Long = "error",
) -> Epoch:
    """Plan an epoch over `split`, in steps of `step_sequences`.

    Raises PlanError for arguments out of range, for a split that does not fill one step and for one without any target;
    PackingError for a document of more than T + 1 tokens with layout pack or pad and long="error".
    """
    check_sizes(seq_len, step_sequences)
    mask = check_policy(mask)
    made = plan_sequences(split, layout=layout, mask=mask, seq_len=seq_len, seed=seed, long=long)
    num_steps, num_over = divmod(len(made.tokens), step_sequences)
    without = made.left_out.documents_without_targets
    if (len(made.targets) and not made.targets.any()) or (without and not len(made.targets)):
        raise PlanError(f"{split.name} has {len(split):,} documents, but not one target with mask {mask}")
    if not num_steps:
        raise too_small(split, len(made.tokens), seq_len, step_sequences)
    used = num_steps * step_sequences
    return Epoch(
        split=split,
        layout=layout,
        mask=mask,
        seq_len=seq_len,
        step_sequences=step_sequences,
        num_steps=num_steps,
        tokens_per_step=made.tokens[:used].reshape(num_steps, -1).sum(1),
        targets_per_step=made.targets[:used].reshape(num_steps, -1).sum(1),
        left_out=replace(made.left_out, sequences=num_over, sequence_targets=int(made.targets[used:].sum())),
        packing=made.packing,
    )


def plan_sequences(
    split: Split,
    *,
    layout: Layout,
    mask: MaskPolicy,
    seq_len: int,
    seed: int = 42,
    long: Long = "error",
    num_targets: np.ndarray | None = None,
) -> Sequences:
    """All sequences of a split, before any cut into steps. Errors as of `plan_epoch`, but for those about steps.

    num_targets: int64 [documents], what `document_targets` gives, where it is known already.
    """
    check_setting("layout", layout, get_args(Layout))
    check_setting("long", long, get_args(Long))
    check_sizes(seq_len, 1)
    if layout == "stream":
        num_sequences, tail_tokens = stream(split.num_tokens, seq_len)
        tokens = np.full(num_sequences, seq_len)
        targets = tokens if mask == "ignore" else _stream_targets(split, mask, num_sequences, seq_len)
        return Sequences(tokens, targets, None, LeftOut(tail_tokens=tail_tokens))
    lengths = np.diff(split.offsets)
    num_targets = document_targets(split, mask, seq_len) if num_targets is None else num_targets
    packing = (pack if layout == "pack" else pad)(lengths, num_targets, seq_len, seed, long)
    num_one_token = int(np.count_nonzero(lengths < 2))
    left_out = LeftOut(
        long_documents_dropped=packing.num_dropped,
        long_documents_cut=packing.num_truncated,
        long_tokens=packing.num_tokens_lost,
        one_token_documents=num_one_token,
        documents_without_targets=packing.num_without_targets - num_one_token,
    )
    tokens = sums(packing.lengths - 1, packing.bounds)
    return Sequences(tokens, sums(num_targets[packing.documents], packing.bounds), packing, left_out)


def document_targets(split: Split, mask: MaskPolicy, seq_len: int) -> np.ndarray:
    """Targets of every document on its own, after a cut to T + 1 tokens; position 0 is never one. int64 [documents]."""
    return document_targets_at(split, mask, [seq_len])[0]


def document_targets_at(split: Split, mask: MaskPolicy, seq_lens: Sequence[int]) -> np.ndarray:
    """`document_targets` for several T in one pass over the mask: int64 [len(seq_lens), documents]."""
    offsets = split.offsets
    taken = np.minimum(np.diff(offsets), np.array(seq_lens, np.int64)[:, None] + 1)
    if mask == "ignore":
        return np.maximum(taken - 1, 0)
    counts = np.empty_like(taken)
    first = 0
    while first < len(split):
        # whole documents, at least one
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, side="right")) - 1)
        start = offsets[first]
        before = np.zeros(offsets[last] - start + 1, np.int64)  # supervised tokens before each
        np.cumsum(split.mask(start, offsets[last], mask), out=before[1:])
        starts, ends = offsets[first:last] - start, offsets[first:last] - start + taken[:, first:last]
        counts[:, first:last] = before[ends] - before[np.minimum(starts + 1, ends)]
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


def _stream_targets(split: Split, mask: MaskPolicy, num_sequences: int, seq_len: int) -> np.ndarray:
    """Supervised targets of every sequence, read back to back: int64 [num_sequences]."""
    counts = np.empty(num_sequences, np.int64)
    at_once = max(1, CHUNK_TOKENS // seq_len)
    for first in range(0, num_sequences, at_once):
        last = min(first + at_once, num_sequences)
        # sequence k predicts tokens k·T + 1 … (k + 1)·T
        supervised = split.mask(first * seq_len + 1, last * seq_len + 1, mask)
        counts[first:last] = np.count_nonzero(supervised.reshape(-1, seq_len), axis=1)
    return counts
