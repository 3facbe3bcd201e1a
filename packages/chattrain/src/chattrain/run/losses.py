"""The loss record: what each read of each step cost, in RUN/losses/, and `chattrain losses`, which names the documents.

    reads.bin    8 bytes per read, in the order of the training plan: float32 summed loss in nats, uint32 targets
    steps.bin    8 bytes per step: uint64 reads in all steps up to and with this one

Both little-endian. Which document a read is of follows from the plan (reads.py), so it is not stored. Reads are written
before the entry of their step, and a checkpoint syncs both files, so a killed run leaves at most
reads that no step counts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from chatdata.disk import naming
from chatdata.packing.epoch import TrainingPlan
from chattrain.errors import RunError
from chattrain.reads import reads_of_step

FOLDER, READS_NAME, STEPS_NAME = "losses", "reads.bin", "steps.bin"
READ = np.dtype([("loss", "<f4"), ("targets", "<u4")])
THIRDS, MOST_SHOWN = ("first", "middle", "last"), 10


@contextmanager
def open_losses(out: Path, start: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a step's reads, float64 [2, reads]: losses and numbers of targets.

    What is recorded of steps from `start` on is removed first; steps before it that are not recorded (the run began
    with an earlier chattrain) count no reads.
    """
    folder, ends = out / FOLDER, recorded_steps(out)[:start]
    folder.mkdir(exist_ok=True)
    last = ends[-1] if len(ends) else 0
    with naming(folder), (folder / READS_NAME).open("ab") as reads, (folder / STEPS_NAME).open("ab") as steps:
        reads.truncate(last * READ.itemsize)
        steps.truncate(ends.nbytes)
        steps.write(np.full(start - len(ends), last, "<u8").tobytes())

        def write(found: np.ndarray) -> None:
            reads.write(np.rec.fromarrays(found, READ).tobytes())
            reads.flush()
            steps.write(np.array(reads.tell() // READ.itemsize, "<u8").tobytes())
            steps.flush()

        yield write


def recorded_steps(out: Path) -> np.ndarray:
    """Reads in all steps up to and with each recorded one: uint64 [steps]; none if there is no record."""
    if not (out / FOLDER / STEPS_NAME).is_file():
        return np.empty(0, "<u8")
    ends = np.fromfile(out / FOLDER / STEPS_NAME, "<u8")
    return ends[ends <= (out / FOLDER / READS_NAME).stat().st_size // READ.itemsize]


def read_losses(out: Path, plan: TrainingPlan, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps and documents (int64 [n]) and values (READ [n]) of what is recorded of steps [first, last), in plan order.

    Raises RunError if the record has other reads than the plan.
    """
    ends = np.concatenate([[0], recorded_steps(out).astype(np.int64)])
    bounds = ends[min(first, len(ends) - 1) : last + 1]
    counts = np.diff(bounds)
    documents = {step: reads_of_step(plan, step).document for step, n in enumerate(counts, first) if n}
    lengths = [len(numbers) for numbers in documents.values()]
    if lengths != counts[counts != 0].tolist():
        raise RunError(f"{out / FOLDER}: has other reads than the run's plan: it is damaged, or of another run")
    file, count, skipped = out / FOLDER / READS_NAME, bounds[-1] - bounds[0], bounds[0] * READ.itemsize
    values = np.fromfile(file, READ, count, offset=skipped) if count else np.empty(0, READ)
    steps = np.repeat(np.array([*documents], np.int64), lengths)
    return steps, np.concatenate([np.empty(0, np.int64), *documents.values()]), values


def loss_table(out: Path, plan: TrainingPlan) -> pa.Table:
    """All that is recorded: step, doc, task, name, row, loss (summed, in nats) and targets of every read.

    Raises RunError if nothing is recorded, or something else than the plan.
    """
    steps, documents, values = read_losses(out, plan, 0, len(recorded_steps(out)))
    if not len(steps):
        missing = "no losses are recorded: an earlier chattrain did the steps, or none is done"
        raise RunError(f"{out}: {missing}; a run records every step from now on, with --resume too")
    facts = plan.split.index_table().select(["task", "entry", "row"]).take(documents)
    name = pa.array(plan.split.names).take(facts["entry"].combine_chunks())
    columns = {"step": steps, "doc": documents, "task": facts["task"], "name": name, "row": facts["row"]}
    return pa.table(columns | {key: np.ascontiguousarray(values[key]) for key in READ.names})


def summarise(table: pa.Table) -> dict[str, Any]:
    """Nats per target of each task in the first, middle and last third of the steps, and the documents with most.

    A document's `above` is how far it is above the mean of all targets of its steps, on average over its reads. Losses
    that are not finite are counted and left out.
    """
    finite = table.filter(pc.is_finite(table["loss"]))
    used = finite.filter(pc.greater(finite["targets"], 0))
    first, last = pc.min_max(table["step"]).as_py().values()
    step, nats, targets = (used[name].to_numpy() for name in ("step", *READ.names))
    of_step = np.bincount(step, nats) / np.maximum(np.bincount(step, targets), 1)
    used = used.append_column("above", pa.array(nats / targets - of_step[step]))
    used = used.append_column("third", pa.array(3 * (step - first) // (last + 1 - first)))
    sums = [("loss", "sum"), ("targets", "sum")]
    groups = used.group_by(["name", "third"]).aggregate(sums).sort_by("name").to_pylist()
    tasks: dict[str, dict[str, float | None]] = {group["name"]: dict.fromkeys(THIRDS) for group in groups}
    for group in groups:
        tasks[group["name"]][THIRDS[group["third"]]] = group["loss_sum"] / group["targets_sum"]
    documents = used.group_by(["doc", "name", "row"]).aggregate([("step", "count"), *sums, ("above", "mean")])
    documents = documents.rename_columns(["doc", "name", "row", "reads", "loss", "targets", "above"])
    documents = documents.append_column("mean", pc.divide(documents["loss"], documents["targets"]))
    hardest = documents.sort_by([("mean", "descending"), ("doc", "ascending")]).slice(0, MOST_SHOWN).to_pylist()
    return {"steps": [first, last], "not_finite": len(table) - len(finite), "tasks": tasks, "hardest": hardest}
