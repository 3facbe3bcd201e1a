"""`--order nanochat`: the order in which that commit's loaders read documents (karpathy/nanochat@790f3be).

Shapes as in plan.py: R ranks · B sequences of a rank's micro-batch · T positions. There is one micro-batch a step, so a
step has G = R·B sequences, and both R and B change which tokens it sees. Rank r owns documents r, r + R, r + 2R, …

mask ignored (scripts/mid_train.py): a rank's documents back to back are its line. Every micro-batch takes B·T + 1
tokens off it: B·T inputs, and the last token, only ever a target. Training ends for all ranks when the first one has
read its last document, so every step is within the first epoch:

    R = 1, B = 2, T = 3     line        a a a a a b b b b c c c c c c c d d d
                            step 0      a a a | a a b b        (7 tokens: inputs and targets share all but the ends)
                            step 1      b b c | c c c c
                            the next 7 would need d, the last document: not trained

mask applied (scripts/chat_sft.py): B whole documents a micro-batch in their order, nothing left out, as wide as the
longest of them needs. Steps end with the last R·B whole documents.
"""

from typing import Any

import numpy as np

from chatdata.errors import PlanError
from chatdata.packing.epoch import LeftOut, TrainingPlan, check_sizes, document_targets, too_small
from chatdata.packing.layouts import Packing
from chatdata.shards.masks import check_policy
from chatdata.shards.read import Split


def make_nanochat_plan(
    split: Split, *, mask: str, seq_len: int, num_ranks: int, device_batch_size: int
) -> TrainingPlan:
    """Plan the first epoch in nanochat's order: its midtraining loader (mask="ignore") or its sft loader ("apply").

    Raises PlanError for a split too small for one step, for a mask that nanochat does not have, and for a document of
    more than T + 1 tokens if the mask is applied (nanochat cuts when it renders: build with --max-tokens).
    """
    mask = check_policy(mask)
    if mask not in ("ignore", "apply"):
        raise PlanError(f"order nanochat has the masks ignore and apply, not {mask}; leave out --order for others")
    check_sizes(seq_len, num_ranks * device_batch_size)
    sizes = {"seq_len": seq_len, "num_ranks": num_ranks, "device_batch_size": device_batch_size}
    filled = _queue(split, **sizes) if mask == "ignore" else _padded(split, **sizes)
    step_sequences = num_ranks * device_batch_size
    return TrainingPlan(split=split, mask=mask, order="nanochat", step_sequences=step_sequences, **sizes, **filled)


def line_tokens(plan: TrainingPlan) -> int:
    """Tokens a micro-batch takes off its rank's line."""
    return plan.device_batch_size * plan.seq_len + 1


def wrap_micro_batch(rank_offsets: np.ndarray, micro_batch_tokens: int) -> int:
    """The micro-batch, from 0, during which a rank's documents run out: the first that needs its last one."""
    return int(rank_offsets[-2]) // micro_batch_tokens


def _queue(split: Split, seq_len: int, num_ranks: int, device_batch_size: int) -> dict[str, Any]:
    """The fields of a plan in which every rank reads its documents back to back."""
    lengths, taken = np.diff(split.offsets), device_batch_size * seq_len + 1
    rank_offsets = tuple(np.concatenate([[0], lengths[rank::num_ranks].cumsum()]) for rank in range(num_ranks))
    enough = len(split) >= num_ranks
    num_steps = min(wrap_micro_batch(offsets, taken) for offsets in rank_offsets) if enough else 0
    if not num_steps:
        raise too_small(split, 0, seq_len, num_ranks * device_batch_size)
    per_step = np.full(num_steps, num_ranks * device_batch_size * seq_len)
    left_out = LeftOut(tail_tokens=split.num_tokens - num_ranks * num_steps * taken)
    steps = {"num_steps": num_steps, "tokens_per_step": per_step, "targets_per_step": per_step}
    return {"layout": "stream", "left_out": left_out, "rank_offsets": rank_offsets, **steps}


def _padded(split: Split, seq_len: int, num_ranks: int, device_batch_size: int) -> dict[str, Any]:
    """The fields of a plan in which every rank reads its documents one per sequence."""
    lengths, step_sequences = np.diff(split.offsets), num_ranks * device_batch_size
    num_steps, num_over = divmod(len(lengths), step_sequences)
    if not num_steps:
        raise too_small(split, len(lengths), seq_len, step_sequences)
    if lengths.max() > seq_len + 1:
        long = f"document {lengths.argmax()} of {split.name} has {lengths.max()} tokens"
        remedy = f"build with --max-tokens, or use a sequence length of at least {lengths.max() - 1}"
        raise PlanError(f"{long}, more than sequence length {seq_len} + 1; order nanochat cuts nothing: {remedy}")
    used = num_steps * step_sequences
    # sequence (step, rank, j) is the rank's next document: j first, then steps
    documents = np.arange(used).reshape(num_steps, device_batch_size, num_ranks).transpose(0, 2, 1).reshape(-1)
    num_targets = document_targets(split, "apply", seq_len)[0]
    left_out = LeftOut(sequences=num_over, sequence_targets=int(num_targets[used:].sum()))
    packing = Packing(seq_len, documents, np.arange(used + 1), lengths[documents], 0, 0, 0, 0)
    tokens, targets = (values[documents].reshape(num_steps, -1).sum(1) for values in (lengths - 1, num_targets))
    steps = {"num_steps": num_steps, "tokens_per_step": tokens, "targets_per_step": targets}
    return {"layout": "pad", "left_out": left_out, "packing": packing, **steps}
