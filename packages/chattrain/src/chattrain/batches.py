"""From a plan to tensors. This is the only place that shifts: a target is the token after its input.

Shapes: T = seq_len positions · G = step_sequences of a step · R ranks · B = device_batch_size · W positions of a row:
T for stream and pack; for pad what the longest document of the step needs (of the micro-batch in order nanochat), on
cuda rounded up to 64.

    tokens      bos  user_start  u  user_end  assistant_start  a  assistant_end        n = 7
    mask         0       0       0     0             0         1        1
    inputs      bos  user_start  u  user_end  assistant_start  a                       n − 1 positions
    targets, mask ignored   user_start  u  user_end  assistant_start  a  assistant_end
    targets, mask applied      -100  -100      -100             -100  a  assistant_end

Positions of pack and pad that no document fills have assistant_end as input and -100 as target; position decides this,
never a token's value. Tokens are slices and gathers of the memory maps, without Python per token; loop.py
reads them one step ahead of the model.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from chatdata.errors import PlanError
from chatdata.packing.epoch import TrainingPlan
from chatdata.render.format import NANOCHAT
from chatdata.shards.read import Split
from chattrain.loss import IGNORED
from chattrain.reads import reads_of_sequences, reads_of_step

T = TypeVar("T")
WIDTH_MULTIPLE = 64  # of pad on cuda: for every new W, cuDNN's attention builds its graphs again, about 60 ms a step

# pack: positions of each document of each row, in order, for attention.pack_sequences; else None: causal over the row
Lengths = tuple[tuple[int, ...], ...] | None
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, Lengths]  # a Batch before it is tensors


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of a plan, one per row: B of them for one micro-batch of one rank."""

    inputs: Tensor  # int64 [B, W]
    targets: Tensor  # int64 [B, W], IGNORED where there is none
    reads: np.ndarray  # int64 [B, W]: the read of each target, counted from the first of the step; any if there is none
    lengths: Lengths
    rows: Tensor = field(init=False)  # int64 [N], the flat positions with a target: found here, a GPU waits for nothing

    def __post_init__(self) -> None:
        rows = (self.targets.flatten() != IGNORED).nonzero().squeeze(1)
        object.__setattr__(self, "rows", rows.pin_memory() if self.targets.is_pinned() else rows)


class Step(NamedTuple):
    """What one rank feeds the model in one step of the optimizer."""

    number: int
    batches: tuple[Batch, ...]
    num_tokens: int  # of the plan: over all ranks and micro-batches, padding not counted
    num_targets: int  # of the plan: over all ranks and micro-batches
    digest: int  # int64 of this rank's sequences; the sum over all ranks is the step's
    target_reads: np.ndarray  # int64 [N of all its batches]: the read of each target, counted from the step's first
    read_targets: np.ndarray  # int64 [reads of the step]: targets of each, 0 in other ranks' sequences


def check_micro_batches(plan: TrainingPlan, num_ranks: int, device_batch_size: int) -> None:
    """Raise PlanError unless a step can be cut into micro-batches of `device_batch_size` for `num_ranks` ranks."""
    if num_ranks < 1 or device_batch_size < 1:
        raise PlanError(f"{num_ranks} ranks × device batch size {device_batch_size}: both must be at least 1")
    # one rank may read what several were planned to read, in their micro-batches: to do their steps again
    fits = num_ranks in (1, plan.num_ranks) and device_batch_size == plan.device_batch_size
    if plan.order == "nanochat" and not fits:
        planned = f"{plan.num_ranks} ranks × device batch size {plan.device_batch_size}"
        given = f"{num_ranks} × {device_batch_size}: its batches depend on both"
        raise PlanError(f"order nanochat was planned for {planned}, not {given}")
    at_once = num_ranks * device_batch_size
    if plan.step_sequences % at_once:
        cut = f"a step of {plan.step_sequences} sequences cannot be cut for {num_ranks} ranks × device batch size"
        right = f"must be a multiple of {at_once} × {plan.seq_len} = {at_once * plan.seq_len:,}"
        raise PlanError(f"{cut} {device_batch_size}: --total-batch-tokens {right}")


def read_step(
    plan: TrainingPlan,
    step: int,
    rank: int = 0,
    num_ranks: int = 1,
    device_batch_size: int | None = None,
    pin: bool = False,
) -> Step:
    """Rank `rank`'s share of step 0, 1, … of the run (epochs follow one another), cut into micro-batches of B.

    device_batch_size: B, by default the whole share. pin: use page-locked memory, for copies to a GPU during its work.
    Raises PlanError if the step cannot be cut like this, and in order nanochat beyond the first epoch.
    """
    check_micro_batches(plan, num_ranks, device_batch_size or plan.device_batch_size or 1)
    share = plan.step_sequences // num_ranks
    device_batch_size = device_batch_size or share
    if plan.order == "nanochat" and step >= plan.num_steps:
        raise PlanError(f"order nanochat has {plan.num_steps} steps, its first epoch: there is no step {step}")
    position = step % plan.num_steps
    first = position * plan.step_sequences + rank * share
    width = _step_width(plan, position)
    wider = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE if width and pin else width
    rows = read_rows(plan, first, first + share, wider)
    of_step = reads_of_step(plan, step)
    reads = rows.reads + np.searchsorted(of_step.sequence, first)
    target_reads = reads[rows.targets.numpy() != IGNORED]
    read_targets = np.bincount(target_reads, minlength=len(of_step.sequence))
    inputs, targets = (t.pin_memory() if pin else t for t in (rows.inputs, rows.targets))
    cuts = (slice(start, start + device_batch_size) for start in range(0, share, device_batch_size))
    batches = (Batch(inputs[cut], targets[cut], reads[cut], rows.lengths and rows.lengths[cut]) for cut in cuts)
    counts = int(plan.tokens_per_step[position]), int(plan.targets_per_step[position])
    return Step(step, tuple(batches), *counts, _digest(rows, rank * share, width), target_reads, read_targets)


def ahead(read: Callable[[int], T], numbers: Iterable[int], device: torch.device) -> Iterator[T]:
    """Yield `read` of each of `numbers`, called in a thread while the caller works on the previous one.

    Errors of the thread are raised here. The thread ends with the iterator: when it is exhausted, closed or dropped.
    """

    def work(number: int) -> T:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # set per thread; without it every rank would open a context on GPU 0
        return read(number)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        reading = (thread.submit(work, number) for number in numbers)
        for one, _following in pairwise(chain(reading, [None])):
            yield one.result()


def read_rows(plan: TrainingPlan, first: int, last: int, width: int | None = None) -> Batch:
    """Sequences [first, last) of the plan, in any step or, for an evaluation, left over.

    width: W for pad, by default what the longest document of these sequences needs. Reads are counted from the first.
    """
    stream = plan.layout == "stream"
    inputs, targets, *more = _stream_rows(plan, first, last) if stream else _document_rows(plan, first, last, width)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), *more)


def _stream_rows(plan: TrainingPlan, first: int, last: int) -> Rows:
    """T + 1 tokens per row: all but the last are inputs, all but the first are targets."""
    split, shape, reads = plan.split, (last - first, plan.seq_len), reads_of_sequences(plan, first, last)
    counts = reads.stop - reads.start
    of_target = np.repeat(np.arange(len(counts)), counts).reshape(shape[0], plan.seq_len + 1)[:, 1:]
    if plan.order == "nanochat":
        starts = split.offsets[reads.document] + reads.start
        rows = _take(split, "tokens", _ranges(starts, counts), starts).reshape(shape[0], -1)
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64), of_target, None
    start, stop = first * plan.seq_len, last * plan.seq_len
    line = split.tokens(start, stop + 1)  # a row's last target is the next one's first input
    inputs, targets = line[:-1].astype(np.int64), line[1:].astype(np.int64)
    if plan.mask != "ignore":
        targets[split.mask(start + 1, stop + 1, plan.mask) == 0] = IGNORED
    return inputs.reshape(shape), targets.reshape(shape), of_target, None


def _document_rows(plan: TrainingPlan, first: int, last: int, width: int | None) -> Rows:
    """Whole documents: each has a position for every token but its last, so no target crosses into another document."""
    split, bounds = plan.split, plan.packing.bounds[first : last + 1]
    placed = slice(bounds[0], bounds[-1])
    starts = split.offsets[plan.packing.documents[placed]]  # first token of each document
    counts = plan.packing.lengths[placed] - 1  # positions of each
    width = plan.seq_len if plan.layout == "pack" else width or int(counts.max(initial=0))
    token, cuts = _ranges(starts, counts), bounds - bounds[0]
    ends = np.concatenate([[0], np.cumsum(counts)])
    position = _ranges(np.arange(last - first) * width, np.diff(ends[cuts]))  # row · W + column
    # in other chat formats id 0: what is never a target may be any token
    padding = split.build.manifest["tokenizer"]["special_ids"].get(NANOCHAT.padding, 0)
    inputs = np.full((last - first, width), padding)
    targets, reads = np.full_like(inputs, IGNORED), np.zeros_like(inputs)
    inputs.reshape(-1)[position] = _take(split, "tokens", token, starts)
    following = _take(split, "tokens", token + 1, starts).astype(np.int64)
    if plan.mask != "ignore":
        stored = _take(split, "mask", token + 1, starts)
        following[split.apply_policy(plan.mask, stored, starts + 1, counts) == 0] = IGNORED
    targets.reshape(-1)[position] = following
    reads.reshape(-1)[position] = np.repeat(np.arange(len(counts)), counts)
    if plan.layout == "pad":
        return inputs, targets, reads, None
    positions = counts.tolist()
    return inputs, targets, reads, tuple(tuple(positions[a:b]) for a, b in pairwise(cuts.tolist()))


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … for `count` numbers, one range after another: int64 [counts.sum()]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _take(split: Split, kind: Literal["tokens", "mask"], index: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Tokens or mask of the split at `index`; starts: the first tokens of the documents it belongs to."""
    if len(split.shards) == 1:
        return split.map(kind, 0).take(index)
    bounds = np.cumsum([0, *(shard["tokens"] for shard in split.shards)])
    values = np.empty(len(index), split.map(kind, 0).dtype)
    for number in np.unique(np.searchsorted(bounds, starts, side="right") - 1):  # documents never cross shards
        inside = (index >= bounds[number]) & (index < bounds[number + 1])
        values[inside] = split.map(kind, number)[index[inside] - bounds[number]]
    return values


def _step_width(plan: TrainingPlan, position: int) -> int | None:
    """W of pad: the same for every rank and micro-batch, however the step is cut; in order nanochat one per batch."""
    if plan.layout != "pad" or plan.order == "nanochat":
        return None
    step = slice(position * plan.step_sequences, (position + 1) * plan.step_sequences)
    return int(plan.packing.lengths[step].max()) - 1  # pad has one document a sequence


def _digest(rows: Batch, first: int, width: int | None = None) -> int:
    """Sum of the hashes of the rows, each with its place in the step, wrapped to int64.

    A sum does not depend on which rank hashed which rows, so each rank hashes exactly the rows it feeds. A row's hash
    is `_mixed` of its place plus its inputs, targets and lengths, each times its own factor ("multilinear", Lemire and
    Kaser 2014): 64 bits tell batches apart; they do not resist someone making two alike. 32 × 512 positions take
    0.03 ms, SHA-256 takes 0.17 ms.
    """
    num_rows, width = len(rows.inputs), width or rows.inputs.shape[1]  # the same on a device that needs wider rows
    factors = _factors(1 << (width - 1).bit_length() if width else 1)
    inputs, targets = (t.numpy().view(np.uint64)[:, :width] for t in (rows.inputs, rows.targets))
    sums = inputs @ factors[0, :width] + targets @ factors[1, :width]
    if rows.lengths is not None:
        lengths = (np.array(row, np.uint64) @ factors[2, : len(row)] for row in rows.lengths)
        sums += np.fromiter(lengths, np.uint64, num_rows)
    places = _mixed(np.arange(first + 1, first + 1 + num_rows, dtype=np.uint64))
    return int(_mixed(places + sums).sum().astype(np.int64))


@lru_cache(maxsize=4)  # one run has few widths: they differ only in pad and order nanochat
def _factors(width: int) -> np.ndarray:
    """Odd factors for inputs, targets and lengths: uint64 [3, width]; a wider result begins with the narrower one."""
    return np.ascontiguousarray(_mixed(np.arange(3 * width, dtype=np.uint64)).reshape(width, 3).T) | np.uint64(1)


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014) of each word: uint64."""
    words = (words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
