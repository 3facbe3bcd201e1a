"""Plan an epoch: which documents make which sequence, and which sequences make which step, known before training.

Shapes: T = seq_len, positions of a sequence · G = step_sequences, sequences of a step · S sequences of an epoch. Step s
takes sequences [s·G, (s + 1)·G); the last S mod G are left out. Everything is integer arithmetic on the offsets (and on
the mask, unless it is ignored), so a plan is the same on every machine. layouts.py fills the sequences.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from chatdata.document import blocks_of
from chatdata.errors import PlanError
from chatdata.packing.layouts import Long, Packing, pack, pad, stream
from chatdata.shards.masks import MaskPolicy
from chatdata.shards.read import Split

Layout = Literal["stream", "pack", "pad"]
Order = Literal["plan", "nanochat"]

STAGE_LAYOUTS: dict[str, Layout] = {"base": "stream", "mid": "stream", "sft": "pack"}  # unless --layout is given
STAGE_MASKS: dict[str, MaskPolicy] = {"base": "ignore", "mid": "ignore", "sft": "apply"}  # unless --mask is given

MAX_SEQ_LEN = 2**20  # 512 times nanochat's; packing keeps a set of rooms of this many bits
CHUNK_TOKENS = 2**22  # of the mask, counted at a time: 32 MiB of sums


@dataclass(frozen=True)
class LeftOut:
    """What an epoch does not train on. Each thing is counted once, in the first field it fits."""

    long_documents_dropped: int = 0  # more than T + 1 tokens, long="drop"
    long_documents_cut: int = 0  # trained on, but cut to T + 1 tokens by long="truncate"
    long_tokens: int = 0  # tokens of the dropped documents, tokens cut from the others
    one_token_documents: int = 0  # (pack and pad) nothing to predict
    documents_without_targets: int = 0  # (pack and pad) nothing supervised, before or after the cut
    tail_tokens: int = 0  # (stream) never a target, because they do not fill a sequence
    sequences: int = 0  # the last S mod G
    sequence_targets: int = 0  # the targets in them


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """Which sequences make which step of an epoch, made by `plan_epoch` or by chattrain's `make_nanochat_plan`."""

    split: Split
    layout: Layout
    mask: MaskPolicy
    seq_len: int
    step_sequences: int
    num_steps: int
    tokens_per_step: np.ndarray  # int64 [num_steps], input tokens over all ranks, padding not counted
    targets_per_step: np.ndarray  # int64 [num_steps], over all ranks
    left_out: LeftOut
    packing: Packing | None = None  # pack and pad: the documents of every sequence
    seed: int | None = None  # pack and pad: shuffles the sequences
    long: Long | None = None  # pack and pad: what happened to documents of more than T + 1 tokens
    order: Order = "plan"
    num_ranks: int | None = None  # order nanochat depends on the number of ranks
    device_batch_size: int | None = None  # and on the batch size
    rank_offsets: tuple[np.ndarray, ...] | None = None  # order nanochat, stream: where each rank's documents start

    def counts(self) -> dict[str, Any]:
        """The epoch in plain integers, for people and logs."""
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
    layout: Layout,
    mask: MaskPolicy,
    seq_len: int,
    step_sequences: int,
    seed: int = 42,
    long: Long = "error",
    num_targets: np.ndarray | None = None,
    may_be_empty: bool = False,
) -> TrainingPlan:
    """Plan an epoch over `split` in steps of `step_sequences`.

    num_targets: int64 [documents], `document_targets` where it is already known.
    Raises PlanError for arguments out of range, and unless it `may_be_empty` for a split that does not fill one step
    and for one without any target; PackingError for a document of more than T + 1 tokens with layout pack or pad and
    long="error".
    """
    for name, value, valid in (("layout", layout, get_args(Layout)), ("long", long, get_args(Long))):
        if value not in valid:
            raise PlanError(f"{name} is {value!r}: it must be one of {', '.join(valid)}")
    check_sizes(seq_len, step_sequences)
    packing, left_out = None, dict[str, int]()
    if layout == "stream":
        num_sequences, left_out["tail_tokens"] = stream(split.num_tokens, seq_len)
        tokens = np.full(num_sequences, seq_len)
        targets = tokens if mask == "ignore" else _stream_targets(split, mask, num_sequences, seq_len)
    else:
        num_targets = document_targets(split, mask, seq_len)[0] if num_targets is None else num_targets
        lengths = np.diff(split.offsets)
        packing = (pack if layout == "pack" else pad)(lengths, num_targets, seq_len, seed, long)
        tokens = packing.sum_by_sequence(packing.lengths - 1)
        targets = packing.sum_by_sequence(num_targets[packing.documents])
        num_one_token = int(np.count_nonzero(lengths < 2))
        left_out = {"long_documents_dropped": packing.num_dropped, "long_documents_cut": packing.num_truncated}
        left_out |= {"long_tokens": packing.num_tokens_lost, "one_token_documents": num_one_token}
        left_out["documents_without_targets"] = packing.num_without_targets - num_one_token
    num_steps, num_over = divmod(len(tokens), step_sequences)
    if not may_be_empty and not targets.any() and (len(targets) or left_out.get("documents_without_targets")):
        raise PlanError(f"{split.name} has {len(split):,} documents, but not one target with mask {mask}")
    if not may_be_empty and not num_steps:
        raise too_small(split, len(tokens), seq_len, step_sequences)
    used = num_steps * step_sequences
    left = LeftOut(**left_out, sequences=num_over, sequence_targets=int(targets[used:].sum()))
    tokens, targets = (values[:used].reshape(num_steps, step_sequences).sum(1) for values in (tokens, targets))
    # the build decides the order of a stream: neither a seed nor a length rule changes it
    given = (None, None) if packing is None else (seed, long)
    return TrainingPlan(split, layout, mask, seq_len, step_sequences, num_steps, tokens, targets, left, packing, *given)


def document_targets(split: Split, mask: MaskPolicy, *seq_lens: int) -> np.ndarray:
    """Targets of every document after a cut to T + 1 tokens, for each T in one pass over the mask.

    The first token of a document is never a target. Returns int64 [len(seq_lens), documents].
    """
    offsets = split.offsets
    taken = np.minimum(np.diff(offsets), np.array(seq_lens, np.int64)[:, None] + 1)
    if mask == "ignore":
        return np.maximum(taken - 1, 0)
    counts = np.empty_like(taken)
    for first, last in blocks_of(np.diff(offsets), CHUNK_TOKENS):
        start = offsets[first]
        before = np.zeros(offsets[last] - start + 1, np.int64)  # supervised tokens before each
        np.cumsum(split.mask(start, offsets[last], mask), out=before[1:])
        starts, ends = offsets[first:last] - start, offsets[first:last] - start + taken[:, first:last]
        counts[:, first:last] = before[ends] - before[np.minimum(starts + 1, ends)]
    return counts


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
    """Supervised targets of every sequence of a stream: int64 [num_sequences]."""
    counts = np.empty(num_sequences, np.int64)
    at_once = max(1, CHUNK_TOKENS // seq_len)
    for first in range(0, num_sequences, at_once):
        last = min(first + at_once, num_sequences)
        # sequence k predicts tokens k·T + 1 … (k + 1)·T
        supervised = split.mask(first * seq_len + 1, last * seq_len + 1, mask)
        counts[first:last] = np.count_nonzero(supervised.reshape(-1, seq_len), axis=1)
    return counts
