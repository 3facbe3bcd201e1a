"""What single tokens cost: steps of a run done again in memory, from the last kept checkpoint at or before them.

The record has the sum of every read; a replayed step has the loss of every target, and its sums are compared with the
record. On CPU they are equal to the byte. One process does the micro-batches of all ranks one after another, so their
gradients may be rounded differently, as they may be in bfloat16, compiled, or on another device.
"""

import codecs
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.look.report.html import CONTROLS
from chatdata.packing.epoch import TrainingPlan
from chatdata.progress import Progress
from chatdata.tokenizer.bpe import Tokenizer
from chattrain.batches import Step
from chattrain.checkpoint import checkpoint_name, kept_checkpoints, read_checkpoint
from chattrain.loop import StepResult, read_ahead, train_step
from chattrain.run.losses import read_losses, recorded_steps
from chattrain.run.settings import RunSettings
from chattrain.run.start import Ranks, find_device, first_state, make_learner
from chattrain.run.telemetry import RunRecord
from chattrain.run.trace import step_documents

MAX_STEPS, MAX_S = 200, 120.0  # from a checkpoint on, and of all replays together
MAX_TOKENS = 600  # shown of a read
Wanted = tuple[int, int, str]  # a step, the number of a read in it, and why it is shown


def within_reach(run: Path, num_steps: int) -> dict[int, int]:
    """Step → the last kept checkpoint at or before it (0: the run's start), if it is less than MAX_STEPS before."""
    kept = (0, *kept_checkpoints(run))
    return {step: start for start in kept for step in range(start, min(start + MAX_STEPS, num_steps))}


def replay(
    run: Path, record: RunRecord, plan: TrainingPlan, wanted: Sequence[Wanted], show: Progress
) -> dict[str, Any]:
    """`shown`: the `wanted` reads token by token, in this order while time is left. Nothing is written.

    Also the steps that are too `far` from a kept checkpoint and those that came too `late`, how many `steps` were done,
    how many `reads` compared with the record, how many of these are `unequal`, and by how much of the record at most.
    """
    reach, ends, shown, differences = within_reach(run, len(recorded_steps(run))), time.monotonic() + MAX_S, [], []
    device = find_device(record.machine.get("device"))  # a step of a GPU could take a CPU hours
    size = record.machine.get("device_batch_size") or plan.device_batch_size
    settings = RunSettings(record.data, run, record.recipe.init, compile=False)
    for first in dict.fromkeys(reach[step] for step, *_ in wanted if step in reach):
        steps = {step for step, *_ in wanted if reach.get(step) == first}
        start = run / "checkpoints" / checkpoint_name(first)
        state = read_checkpoint(start).state() if first else first_state(record.recipe, plan.split.build, plan.seq_len)
        learner = make_learner(settings, Ranks(0, 1, device), record.recipe, plan.layout, state)
        # the micro-batches of all ranks, rank by rank
        for step in read_ahead(plan, range(first, max(steps) + 1), 0, 1, size, device=device):
            show("replay", step.number - first, max(steps) + 1 - first, "steps")
            if time.monotonic() > ends:
                break
            result = train_step(learner, record.recipe, plan, step)
            recorded = read_losses(run, plan, step.number, step.number + 1)[2]["loss"]
            again = result.reads[0, : len(recorded)].astype(recorded.dtype)
            same = (again == recorded) | (np.isnan(again) & np.isnan(recorded))
            change = np.abs(again - recorded) / np.maximum(np.abs(recorded), np.finfo(np.float32).tiny)
            differences.append(np.where(same, 0, np.nan_to_num(change, nan=np.inf)))
            for read, why in [(read, why) for number, read, why in wanted if number == step.number]:
                shown.append(tokens_of(run, plan, step, result, read) | {"why": why})
    found = np.concatenate([np.zeros(0), *differences])
    late = sorted({step for step, *_ in wanted if step in reach} - {one["step"] for one in shown})
    facts = {"shown": shown, "late": late, "far": sorted({step for step, *_ in wanted if step not in reach})}
    facts |= {"steps": len(differences), "reads": len(found), "unequal": int(np.count_nonzero(found))}
    return facts | {"largest": float(found.max(initial=0)), "max_steps": MAX_STEPS}


def tokens_of(run: Path, plan: TrainingPlan, step: Step, result: StepResult, number: int) -> dict[str, Any]:
    """A read as `trace` shows it, and its first tokens as `cells`."""
    read, losses = step_documents(run, plan, step.number)[number], result.losses[step.target_reads == number]
    first, stop = (int(plan.split.offsets[read["doc"]]) + read[key] for key in ("start", "stop"))
    target = plan.split.mask(first, stop, plan.mask) != 0
    target[0] &= np.count_nonzero(target) == len(losses)  # the first token of a sequence is only an input
    of_token = np.full(len(target), np.nan)
    of_token[target] = losses
    tokens = plan.split.tokens(first, stop)[:MAX_TOKENS].tolist()
    return read | {"step": step.number, "cells": cells(tokens, of_token.tolist(), plan.split.build.tokenizer)}


def cells(tokens: Sequence[int], losses: Sequence[float], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """`text`, `special` and `loss` of tokens; loss is None for what is no target. Where several tokens spell one
    character, the last of them has it."""
    names = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    spell = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    texts = [names.get(token) or spell(tokenizer.token_bytes[token]).translate(CONTROLS) for token in tokens]
    return [
        {"text": text, "special": token in names, "loss": None if loss != loss else loss}
        for text, token, loss in zip(texts, tokens, losses, strict=False)
    ]
