"""Which documents make which sequence: `stream`, `pack` and `pad`, from document lengths alone.

A document of n tokens takes n - 1 positions, as inputs ids[:-1] with targets ids[1:]. Here are six documents, 26
tokens, seq_len = 6; "a3" is position 3 of document a, "." an empty position:

    document   a  b  c  d  e  f
    tokens     5  7  3  6  3  2
    positions  4  6  2  5  2  1

stream: documents back to back, cut every seq_len tokens. Sequence k reads tokens [k * seq_len, (k + 1) * seq_len + 1):
its last target is the first input of the next, so no target is lost. 26 tokens, 25 targets: 4 sequences, a tail of 1.

    a0 a1 a2 a3 a4 b0 | b1 b2 b3 b4 b5 b6 | c0 c1 c2 d0 d1 d2 | d3 d4 d5 e0 e1 e2 | (f0: its target f1 is the tail)

pack: whole documents, longest first, each into the fullest bin that still has room for it (best-fit decreasing). There
is a stack of bins for every amount of remaining room; the next document goes to the top of the first stack with enough.

    put     stacks of bins after it   the bin it went to
            room 1   room 2   room 4
    b (6)                             0: b0 b1 b2 b3 b4 b5   a new bin, full at once
    d (5)   1                         1: d0 d1 d2 d3 d4 .    a new bin
    a (4)   1        2                2: a0 a1 a2 a3 .  .    room 1 is too little: a new bin
    c (2)   1                         2: a0 a1 a2 a3 c0 c1   room 2 is just enough
    e (2)   1                 3       3: e0 e1 .  .  .  .    room 1 is too little: a new bin
    f (1)                     3       1: d0 d1 d2 d3 d4 f0   room 1 is a better fit than room 4

    Inside a bin documents are sorted by length, longest first, then by number. The seed (here 0) shuffles the bins.

    a0 a1 a2 a3 c0 c1 | b0 b1 b2 b3 b4 b5 | d0 d1 d2 d3 d4 f0 | e0 e1 .  .  .  .

pad: one document per sequence, shuffled by the seed (here 1). The trainer decides how wide a batch gets.

    e0 e1 | a0 a1 a2 a3 | c0 c1 | b0 b1 b2 b3 b4 b5 | f0 | d0 d1 d2 d3 d4

Everything is integer arithmetic on stable orders, so a plan is the same on every machine.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from chatdata.errors import PackingError

Long = Literal["error", "drop", "truncate"]  # what happens to a document of more than seq_len + 1 tokens


@dataclass(frozen=True)
class Packing:
    """Which documents make which sequence. All documents = placed + num_dropped + num_without_targets."""

    seq_len: int
    documents: np.ndarray  # int64 [placed], document numbers, sequence after sequence
    bounds: np.ndarray  # int64 [sequences + 1], documents[bounds[s]:bounds[s + 1]] make sequence s
    lengths: np.ndarray  # int64 [placed], tokens taken from each: all but for documents cut by long="truncate"
    num_dropped: int  # documents left out by long="drop"
    num_truncated: int  # documents placed, but cut by long="truncate"
    num_tokens_lost: int  # tokens of the dropped documents, tokens cut from the truncated ones
    num_without_targets: int  # documents left out because nothing in them (after any cut) is a target

    @property
    def num_sequences(self) -> int:
        return len(self.bounds) - 1

    @property
    def fill(self) -> float:
        """Share of the num_sequences x seq_len positions that hold an input token; 0.0 for no sequences."""
        return float((self.lengths - 1).sum()) / max(self.num_sequences * self.seq_len, 1)

    def sum_by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Values of the placed documents, [placed], added up in each sequence: int64 [sequences]."""
        return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[self.bounds])


def stream(num_tokens: int, seq_len: int) -> tuple[int, int]:
    """Count the sequences of a split read back to back, and the targets in the tail that does not fill one.

    Sequence k reads tokens [k * seq_len, (k + 1) * seq_len + 1). Every token but the first is a target exactly once:
    num_tokens - 1 = num_sequences * seq_len + num_tail_targets, with num_tail_targets < seq_len.
    Raises PackingError when seq_len < 1.
    """
    if seq_len < 1:
        raise PackingError(f"seq_len is {seq_len}: it must be at least 1")
    return divmod(max(num_tokens - 1, 0), seq_len)


def pack(lengths: np.ndarray, num_targets: np.ndarray, seq_len: int, seed: int, long: Long = "error") -> Packing:
    """Pack whole documents into sequences of seq_len positions: best-fit decreasing, then shuffled by the seed.

    lengths: integers [documents], tokens of each document, np.diff of the offsets.
    num_targets: integers [documents], targets of each document under the mask policy, after any cut to seq_len + 1
        tokens. Mask applied: supervised tokens, position 0 excluded. Mask ignored: tokens - 1.
    long: what happens to a document of more than seq_len + 1 tokens.
    Raises PackingError for such a document when long="error" (with or without targets), and for arguments out of range.
    """
    documents, taken, counts = _choose_documents(lengths, num_targets, seq_len, long)
    sizes = taken - 1
    bins = best_fit_decreasing(sizes, seq_len)
    num_documents = np.bincount(bins)  # of each bin
    shuffled = np.random.default_rng(seed).permutation(len(num_documents))  # sequence s is bin shuffled[s]
    sequences = np.argsort(shuffled)[bins]  # of each document
    # One key for (sequence, longest first); the stable sort keeps document numbers ascending where it is equal.
    order = np.argsort(sequences * (seq_len + 1) - sizes, kind="stable")
    bounds = np.concatenate([[0], num_documents[shuffled].cumsum()])
    return Packing(seq_len, documents[order], bounds, taken[order], **counts)


def pad(lengths: np.ndarray, num_targets: np.ndarray, seq_len: int, seed: int, long: Long = "error") -> Packing:
    """One document per sequence, shuffled by the seed. Arguments and errors as for pack."""
    documents, taken, counts = _choose_documents(lengths, num_targets, seq_len, long)
    order = np.random.default_rng(seed).permutation(len(documents))
    return Packing(seq_len, documents[order], np.arange(len(order) + 1), taken[order], **counts)


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Put every document into the fullest bin that still has room for it, longest document first.

    Documents of one size go in the order of their numbers. Of several bins with the same room, the last one filled is
    taken (a stack). A bin is opened only when no bin has room.

    sizes: integers [documents], positions each document takes, 1 <= size <= capacity.
    Returns int64 [documents], the bin of each document; bins are numbered in the order they were opened.
    Raises PackingError when a size is out of range.
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise PackingError(f"sizes run from {sizes.min()} to {sizes.max()}: they must lie in 1..{capacity}")
    by_size = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)  # of document by_size[i]
    num_bins = 0
    # stacks[room] is a stack of runs, a run an array of bins, the next to take first. Working on runs is what makes
    # this fast: 850,000 sft documents need 3,403 turns of the inner loop, not 850,000.
    stacks: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    rooms = 0  # bit r is set while stacks[r] holds a run, so the lowest bit of rooms >> size is the first room >= size

    counts = np.bincount(sizes)
    done = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[size])
        while done < end:
            if enough := rooms >> size:
                room = size + (enough & -enough).bit_length() - 1
                run = stacks[room].pop()
                if not stacks[room]:
                    rooms ^= 1 << room
            else:
                room = capacity
                opened = -(-(end - done) // (room // size))
                run = np.arange(num_bins, num_bins + opened)
                num_bins += opened
            # A bin just filled is still the fullest, so it takes documents of this size until none fits.
            per_bin = room // size
            placed = min(end - done, len(run) * per_bin)
            filled, rest = divmod(placed, per_bin)
            used = filled + (rest > 0)
            bins[done : done + placed] = np.repeat(run[:used], per_bin)[:placed]
            untouched, partly, full = run[used:], run[filled:used], run[:filled][::-1]
            for left, part in ((room, untouched), (room - rest * size, partly), (room - per_bin * size, full)):
                if left and len(part):  # a bin without room is never taken again
                    stacks[left].append(part)
                    rooms |= 1 << left
            done += placed
    bin_of_document = np.empty(len(sizes), np.int64)
    bin_of_document[by_size] = bins
    return bin_of_document


def _choose_documents(
    lengths: np.ndarray, num_targets: np.ndarray, seq_len: int, long: Long
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Apply the length rule, then leave out documents without a target.

    Returns the documents kept (int64 [kept], ascending), the tokens taken from each (int64 [kept], 2..seq_len + 1), and
    the four counts of Packing by name.
    """
    if seq_len < 1:
        raise PackingError(f"seq_len is {seq_len}: it must be at least 1")
    if long not in get_args(Long):
        raise PackingError(f"long is {long!r}: it must be one of {', '.join(get_args(Long))}")
    lengths = np.asarray(lengths, np.int64)
    num_targets = np.asarray(num_targets, np.int64)
    assert lengths.shape == num_targets.shape, f"{lengths.shape} lengths, {num_targets.shape} target counts"
    max_tokens = seq_len + 1
    taken = np.minimum(lengths, max_tokens)
    is_long = lengths > max_tokens
    if long == "error" and is_long.any():
        first = int(is_long.argmax())
        raise PackingError(
            f"document {first} has {lengths[first]} tokens, more than sequence length {seq_len} + 1; "
            f"{np.count_nonzero(is_long)} of {len(lengths)} documents are too long: "
            f"pass --long drop or --long truncate, or a sequence length of at least {lengths.max() - 1}"
        )
    dropped = is_long if long == "drop" else np.zeros_like(is_long)
    without_targets = ~dropped & (num_targets < 1)
    kept = ~dropped & ~without_targets
    # counted before the cut, a document could be kept with nothing left to learn from
    assert (num_targets[kept] < taken[kept]).all(), "num_targets must be counted after the cut, without position 0"
    cut = kept & is_long
    documents = np.flatnonzero(kept)
    counts = {
        "num_dropped": int(np.count_nonzero(dropped)),
        "num_truncated": int(np.count_nonzero(cut)),
        "num_tokens_lost": int(lengths[dropped].sum() + (lengths - taken)[cut].sum()),
        "num_without_targets": int(np.count_nonzero(without_targets)),
    }
    return documents, taken[documents], counts
