"""Which documents the sequences of a training plan read, and how a step is cut for ranks.

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

from typing import NamedTuple

import numpy as np

from chatdata.packing.epoch import TrainingPlan
from chattrain.nanochat.order import line_tokens


class Reads(NamedTuple):
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
    if (packing := plan.packing) is not None:
        placed = slice(packing.bounds[first], packing.bounds[last])
        sequence = np.repeat(sequences, np.diff(packing.bounds[first : last + 1]))
        lengths = packing.lengths[placed]
        return Reads(sequence, packing.documents[placed], np.zeros_like(lengths), lengths)
    if plan.order == "plan":
        return _reads_of_line(plan.split.offsets, sequences, sequences * plan.seq_len, plan.seq_len + 1)
    steps, rest = np.divmod(sequences, plan.step_sequences)
    ranks, rows = np.divmod(rest, plan.device_batch_size)
    starts = steps * line_tokens(plan) + rows * plan.seq_len
    parts = []
    for rank, offsets in enumerate(plan.rank_offsets):
        mine = ranks == rank
        part = _reads_of_line(offsets, sequences[mine], starts[mine], plan.seq_len + 1)
        parts.append(Reads(part.sequence, part.document * plan.num_ranks + rank, part.start, part.stop))
    order = np.argsort(np.concatenate([part.sequence for part in parts]), kind="stable")
    return Reads(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))


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
