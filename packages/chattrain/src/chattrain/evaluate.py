"""Validation: bits per byte, in total and per task.

Bits per byte = nats over the targets ÷ (ln 2 · bytes of the targets), so it does not depend on the vocabulary. Special
tokens have no bytes and are left out on both sides (karpathy/nanochat@790f3be:nanochat/loss_eval.py). A target's bytes
come from the merges themselves: decoding single tokens to text miscounts those that are part of a character (193 of
32,768 in nanochat, 2ce972a).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from chatdata.packing.epoch import TrainingPlan
from chatdata.tokenizer.bpe import Tokenizer
from chattrain.batches import Batch, Lengths, ahead, read_rows
from chattrain.loss import position_losses
from chattrain.model import GPT
from chattrain.reads import reads_of_sequences
from chattrain.run.losses import tasks_of_documents
from chattrain.run.start import Ranks, StopRequest

# (inputs [B, W], document lengths or None) → hidden [B, W, C]: the model with its device, dtype and attention chosen
Forward = Callable[[torch.Tensor, Lengths], torch.Tensor]


def token_byte_counts(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of every token: int64 [vocab_size]; 0 for special tokens."""
    return np.array([len(tokenizer.token_bytes.get(i, b"")) for i in range(tokenizer.vocab_size)], np.int64)


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    forward: Forward,
    plan: TrainingPlan,
    byte_counts: np.ndarray,
    ranks: Ranks,
    device_batch_size: int,
    stop: StopRequest,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """Bits per byte over all sequences of the plan: {"total", "tasks": {name: …}, "bytes"}; None if asked to stop.

    Batches are read one ahead of the model. Ranks take turns; their sums are added once, at the end.

    show: gets how many sequences are done, and of how many.
    """
    tasks, task_of_document = tasks_of_documents(plan)
    # sequences that do not fill a step are evaluated too
    num_sequences = plan.num_steps * plan.step_sequences + plan.left_out.sequences
    nats, num_bytes = np.zeros(len(tasks)), np.zeros(len(tasks))
    at_once = device_batch_size * ranks.num_ranks

    def read(start: int) -> tuple[Batch, np.ndarray, np.ndarray, np.ndarray] | None:
        """This rank's sequences, where targets have bytes [B, W], and those targets' tasks and bytes."""
        first = min(start + ranks.rank * device_batch_size, num_sequences)
        last = min(first + device_batch_size, num_sequences)
        if first == last:
            return None
        rows = read_rows(plan, first, last)
        targets = rows.targets.numpy()
        counts = byte_counts[np.maximum(targets, 0)] * (targets >= 0)
        counted = counts > 0
        document = reads_of_sequences(plan, first, last).document[rows.reads[counted]]
        return rows, counted, task_of_document[document], counts[counted]

    starts = range(0, num_sequences, at_once)
    for start, batch in zip(starts, ahead(read, starts, ranks.device), strict=True):
        show(start, num_sequences)
        if stop.agreed(ranks):
            return None
        if batch is None:
            continue
        rows, counted, task, counts = batch
        hidden = forward(rows.inputs, rows.lengths)
        targets, with_target = rows.targets.to(ranks.device), rows.rows.to(ranks.device)
        losses = position_losses(hidden, model.lm_head.weight, targets, model.config.vocab_size, rows=with_target)
        nats += np.bincount(task, weights=losses.cpu().double().numpy()[counted], minlength=len(tasks))
        num_bytes += np.bincount(task, weights=counts, minlength=len(tasks))
    show(num_sequences, num_sequences)
    nats, num_bytes = ranks.sum(torch.from_numpy(np.stack([nats, num_bytes]))).numpy()
    sums = zip(tasks, nats.tolist(), num_bytes.tolist(), strict=True)
    per_task = {name: of_task / (math.log(2) * size) for name, of_task, size in sums if size}
    total_bytes = float(num_bytes.sum())
    total = float(nats.sum()) / (math.log(2) * total_bytes) if total_bytes else math.nan
    return {"total": total, "tasks": per_task, "bytes": int(total_bytes)}
