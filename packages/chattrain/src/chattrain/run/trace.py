"""`chattrain trace`: which documents were in a step, from run.json, the build, and the plan made again."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chatdata.shards.address import cached_build
from chatdata.shards.read import open_build
from chattrain.checkpoint import plan_record, require_same
from chattrain.errors import RunError
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.reads import reads_of_step
from chattrain.run.losses import READ, read_losses
from chattrain.run.telemetry import RunRecord, TrainEntry, read_log, read_run


def plan_again(run: RunRecord, data: str | Path | None = None) -> TrainingPlan:
    """The recorded plan, made again from its build. Raises ResumeError unless it is the same, FormatError.

    data: the build, if it is no longer at the recorded path.
    """
    record = run.plan
    split = open_build(data or cached_build(record.build_id) or run.data)[record.split]
    names = ("mask", "seq_len", "seed", "long", "num_ranks", "device_batch_size")  # null: not for this layout and order
    chosen: dict[str, Any] = {name: value for name in names if (value := getattr(record, name)) is not None}
    if record.order == "nanochat":
        made = make_nanochat_plan(split, **chosen)
    else:
        made = plan_epoch(split, layout=record.layout, step_sequences=record.step_sequences, **chosen)
    require_same(msgspec.structs.asdict(record), plan_record(made))
    return made


def trace_step(run: Path, step: int, data: str | Path | None = None) -> dict[str, Any]:
    """What a step was trained on: its log entry, and name, task, row, position, tokens, sequence and text of each read.

    Where they are recorded, also its summed loss in nats and the number of its targets.

    data: the build, if it is no longer at the recorded path. Raises RunError for a folder that is not a run and for a
    step that the run does not have, PlanError for another build than the run's.
    """
    record = read_run(run)
    num_steps = record.recipe.num_steps
    if not 0 <= step < num_steps:
        raise RunError(f"--step {step}: {run} has steps 0 … {num_steps - 1}")
    plan = plan_again(record, data)
    logged = next((entry for entry in read_log(run) if isinstance(entry, TrainEntry) and entry.step == step), None)
    documents = step_documents(run, plan, step)
    return {"step": step, "split": plan.split.name, "log": msgspec.to_builtins(logged), "documents": documents}


def step_documents(run: Path, plan: TrainingPlan, step: int) -> list[dict[str, Any]]:
    """The reads of a step as `trace_step` returns them."""
    reads = reads_of_step(plan, step)
    index = plan.split.index_table().select(["task", "entry", "row", "task_position"]).take(reads.document).to_pylist()
    places = np.stack([reads.document, reads.sequence % plan.step_sequences, reads.start, reads.stop], axis=1)
    names = plan.split.names
    *_, values = read_losses(run, plan, step, step + 1)
    losses = [dict(zip(READ.names, read, strict=True)) for read in values.tolist()] or [{}] * len(index)
    return [
        {"doc": doc, "name": names[facts["entry"]], **facts, "sequence": sequence, "start": start, "stop": stop, **loss}
        | {"text": plan.split.build.tokenizer.decode(plan.split[doc].tokens[start:stop].tolist())}
        for facts, (doc, sequence, start, stop), loss in zip(index, places.tolist(), losses, strict=True)
    ]
