"""The loss record: what each read of each step cost, in RUN/losses/, and `chattrain losses`, which names the documents.

    reads.bin    8 bytes per read, in the order of the training plan: float32 summed loss in nats, uint32 targets
    steps.bin    8 bytes per step: uint64 reads in all steps up to and with this one

Both little-endian. Which document a read is of follows from the plan (reads.py), so it is not stored. Reads are written
before the entry of their step, and a checkpoint syncs both files, so a killed run leaves at most
reads that no step counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from chatdata.arrow import values_of
from chatdata.disk import naming
from chatdata.packing.epoch import TrainingPlan
from chattrain.errors import RunError
from chattrain.reads import reads_of_step
from chattrain.run.telemetry import Entry, TrainEntry

FOLDER, READS_NAME, STEPS_NAME = "losses", "reads.bin", "steps.bin"
READ = np.dtype([("loss", "<f4"), ("targets", "<u4")])
THIRDS, MOST_SHOWN = ("first", "middle", "last"), 10
STEPS_AT_ONCE = 1024  # of a record that is read as a whole


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


def require_recorded(out: Path) -> np.ndarray:
    """`recorded_steps`; RunError if no read is recorded."""
    ends = recorded_steps(out)
    if not ends.any():
        missing = "no losses are recorded: an earlier chattrain did the steps, or none is done"
        raise RunError(f"{out}: {missing}; a run records every step from now on, with --resume too")
    return ends


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


def tasks_of_documents(plan: TrainingPlan) -> tuple[list[str], np.ndarray]:
    """Names of entries (the task's, or the recipe's own), and the number of each document's (int64 [documents])."""
    entries = plan.split.index_table()["entry"].combine_chunks()
    column = pa.array(plan.split.names).take(entries).dictionary_encode()
    return column.dictionary.to_pylist(), values_of(column.indices).astype(np.int64)


def loss_table(out: Path, plan: TrainingPlan) -> pa.Table:
    """All that is recorded: step, doc, task, name, row, loss (summed, in nats) and targets of every read.

    Raises RunError if nothing is recorded, or something else than the plan.
    """
    steps, documents, values = read_losses(out, plan, 0, len(require_recorded(out)))
    facts = plan.split.index_table().select(["task", "entry", "row"]).take(documents)
    name = pa.array(plan.split.names).take(facts["entry"].combine_chunks())
    columns = {"step": steps, "doc": documents, "task": facts["task"], "name": name, "row": facts["row"]}
    return pa.table(columns | {key: np.ascontiguousarray(values[key]) for key in READ.names})


@dataclass(frozen=True, eq=False)
class LossSums:
    """A record, added up: E task names, S steps, D documents of the split. Losses that are not finite are left out."""

    tasks: list[str]  # [E]
    task_of_document: np.ndarray  # int64 [D]
    row_of_document: np.ndarray  # int64 [D]
    by_task: np.ndarray  # float64 [2, S, E]: summed loss in nats, and targets
    by_document: np.ndarray  # float64 [4, D]: reads with targets, loss, targets, sum of what `summarise` calls `above`
    not_finite: int  # reads left out


def sum_losses(out: Path, plan: TrainingPlan) -> LossSums:
    """Read the whole record, STEPS_AT_ONCE steps at a time, so that memory does not grow with the number of reads.

    Raises RunError if nothing is recorded, or something else than the plan.
    """
    num_steps, (tasks, task_of_document) = len(require_recorded(out)), tasks_of_documents(plan)
    by_task, by_document = np.zeros((2, num_steps, len(tasks))), np.zeros((4, len(task_of_document)))
    not_finite = 0
    for first in range(0, num_steps, STEPS_AT_ONCE):
        part = by_task[:, first : first + STEPS_AT_ONCE]
        step, document, values = read_losses(out, plan, first, first + part.shape[1])
        not_finite += int(np.count_nonzero(~np.isfinite(values["loss"])))
        used = np.isfinite(values["loss"]) & (values["targets"] > 0)
        step, document, loss, targets = step[used] - first, document[used], *(values[used][key] for key in READ.names)
        cell = step * len(tasks) + task_of_document[document]
        part[:] = [np.bincount(cell, value, part[0].size).reshape(part[0].shape) for value in (loss, targets)]
        nats_of_step, targets_of_step = part.sum(axis=2)
        above = loss / targets - nats_of_step[step] / targets_of_step[step]
        for sums, value in zip(by_document, (1.0, loss, targets, above), strict=True):
            np.add.at(sums, document, value)
    rows = plan.split.index_table()["row"].to_numpy()
    return LossSums(tasks, task_of_document, rows, by_task, by_document, not_finite)


def contradictions(log: Sequence[Entry], sums: LossSums, num_recorded: int) -> list[str]:
    """How the record of a run and its log disagree: at most a line for each way. The log is compared from the first
    recorded step on, because an earlier chattrain recorded nothing.

    num_recorded: steps in the record before the log was read. A run may be at work: `log` then has all of them but the
    last, and `sums`, read after it, all that `log` has.
    """
    train = [entry for entry in log if isinstance(entry, TrainEntry)]
    by_step, steps, found = sums.by_task.sum(axis=2), [entry.step for entry in train], []
    if missing := sorted({*range(max([num_recorded - 1, *(step + 1 for step in steps)]))} - {*steps}):
        found.append(f"the log lacks {len(missing):,} of its steps, the first is {missing[0]:,}")
    if lacking := [step for step in steps if step >= by_step.shape[1]]:
        found.append(f"the loss record lacks {len(lacking):,} steps of the log, the first is {lacking[0]:,}")
    if twice := [step for step, after in pairwise(sorted(steps)) if step == after]:
        found.append(f"the log has step {twice[0]:,} twice")
    first = int(np.argmax(by_step[1] > 0))
    for entry in train:
        if first <= entry.step < by_step.shape[1]:
            loss, targets = by_step[:, entry.step]  # of what is finite
            right = abs(loss - entry.loss * targets) <= 1e-4 * abs(loss) and targets == entry.targets
            if not (right if math.isfinite(entry.loss) else targets < entry.targets):
                at = f"step {entry.step:,}: the loss record has {loss:.6g} nats of {targets:,.0f} targets"
                found.append(f"{at}, the log {entry.loss * entry.targets:.6g} of {entry.targets:,}; one is damaged")
                break
    return found


def summarise(sums: LossSums) -> dict[str, Any]:
    """Nats per target of each task in the first, middle and last third of the steps, and the hardest documents: those
    most `above` the mean of all targets of their steps, on average over their reads.

    Losses that are not finite are counted and left out.
    """
    first, last = int(np.argmax(sums.by_task[1].any(axis=1))), sums.by_task.shape[1] - 1
    third = 3 * (np.arange(first, last + 1) - first) // (last + 1 - first)
    thirds = [means(sums.by_task[:, first:][:, third == i].sum(axis=1)) for i in range(len(THIRDS))]
    tasks = {name: dict(zip(THIRDS, of, strict=True)) for name, *of in sorted(zip(sums.tasks, *thirds, strict=True))}
    documents = np.flatnonzero(sums.by_document[0])
    reads, loss, targets, above = sums.by_document[:, documents]
    columns = {"doc": documents, "name": pa.array(sums.tasks).take(pa.array(sums.task_of_document[documents]))}
    columns |= {"row": sums.row_of_document[documents], "reads": reads.astype(int), "loss": loss}
    columns |= {"targets": targets.astype(int), "above": above / reads, "mean": loss / targets}
    hardest = (
        pa.table(columns).sort_by([("above", "descending"), ("doc", "ascending")]).slice(0, MOST_SHOWN).to_pylist()
    )
    return {"steps": [first, last], "not_finite": sums.not_finite, "tasks": tasks, "hardest": hardest}


def means(sums: np.ndarray) -> list[float | None]:
    """[2, n], losses and targets → nats per target, None without targets."""
    return [nats / targets if targets else None for nats, targets in sums.T.tolist()]
