"""Which documents were in a step: from a run's own record, the build and the plan made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatdata.disk import write_whole
from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chatdata.shards.read import open_build
from chattrain.checkpoint import FORMAT
from chattrain.errors import RunError
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.plan import plan_record, reads_of_step, require_same_plan
from chattrain.run.telemetry import LOG_NAME, read_log

RUN_NAME = "run.json"


def write_run(out: Path, data: Path, plan: TrainingPlan, recipe: dict[str, Any]) -> None:
    """run.json: where the run's data was, its plan and recipe. Written before step 0."""
    contents = {"format": FORMAT, "data": str(data.resolve()), "plan": plan_record(plan), "recipe": recipe}
    write_whole(out / RUN_NAME, (json.dumps(contents, indent=1, sort_keys=True) + "\n").encode())


def read_run(run: Path) -> dict[str, Any]:
    """What `write_run` wrote. Raises RunError."""
    try:
        return json.loads((run / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run}: not a run folder: no readable {RUN_NAME}; give the --out of a chattrain run") from error


def plan_again(record: dict[str, Any], data: Path | None) -> TrainingPlan:
    """The plan of a run's record, made from its build and proved the same. Raises FormatError or PlanError."""
    plan = record["plan"]
    split = open_build(data or Path(record["data"]))[plan["split"]]
    if plan["order"] == "nanochat":
        keys = ("mask", "seq_len", "num_ranks", "device_batch_size")
        made = make_nanochat_plan(split, **{key: plan[key] for key in keys})
    else:
        keys = ("mask", "seq_len", "step_sequences", "seed", "long")
        # stream needs neither: its record holds null
        made = plan_epoch(split, layout=plan["rows"], **{key: plan[key] for key in keys if plan[key] is not None})
    require_same_plan(plan, plan_record(made))
    return made


def trace_step(run: Path, step: int, data: Path | None = None) -> dict[str, Any]:
    """What a step was trained on: its log entry, and per document task, row, position, tokens and sequence.

    data: the build, where it is no longer at the recorded path. Raises RunError for a folder that is no run and a step
    that the run does not have, PlanError for another build than the run's.
    """
    record = read_run(run)
    num_steps = record["recipe"]["num_steps"]
    if not 0 <= step < num_steps:
        raise RunError(f"--step {step}: {run} has steps 0 … {num_steps - 1}")
    plan = plan_again(record, data)
    log = read_log(run) if (run / LOG_NAME).is_file() else []
    logged = next((entry for entry in log if entry["kind"] == "train" and entry["step"] == step), None)
    reads = reads_of_step(plan, step)
    index = plan.split.index_table().select(["task", "entry", "row", "position"]).take(reads.document).to_pylist()
    documents = [
        {"doc": doc, **facts, "sequence": sequence, "start": start, "stop": stop}
        for doc, facts, sequence, start, stop in zip(
            reads.document.tolist(),
            index,
            (reads.sequence % plan.step_sequences).tolist(),
            reads.start.tolist(),
            reads.stop.tolist(),
            strict=True,
        )
    ]
    return {"step": step, "split": plan.split.name, "log": logged, "documents": documents}
