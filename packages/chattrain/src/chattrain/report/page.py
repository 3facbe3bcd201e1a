"""`chattrain report`: one HTML file of a run, from its log, its loss record, its build, and steps replayed.

A long log is cut into parts of equal length. Numbers are plain values that JSON can hold, None where none is finite.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from chatdata.errors import ChatdataError, first_line
from chatdata.look.ledger import summed
from chatdata.look.report.html import chart, check_report, named, write_page
from chatdata.packing.epoch import TrainingPlan
from chatdata.progress import Progress
from chattrain.checkpoint import kept_checkpoints, read_checkpoint
from chattrain.errors import ChattrainError
from chattrain.model import parameter_shapes
from chattrain.reads import reads_of_step
from chattrain.report.replay import Wanted, replay, within_reach
from chattrain.run.losses import LossSums, contradictions, means, recorded_steps, sum_losses, summarise
from chattrain.run.telemetry import LOG_NAME, TrainEntry, ValEntry, read_log, read_run
from chattrain.run.trace import plan_again, step_documents

ROOM = "chattrain.report"
MAX_POINTS, MAX_ROWS = 200, 20  # parts of a log in a chart, and in a table
FIGURES = ("multiplier", "gradient_norm", "tokens_per_s", "mfu", "data_wait_share")
# a step's loss has jumped if it is above median + SIGMAS · 1.4826 · MAD of the NEIGHBOURS (at least LEAST) steps before
# it; their MAD counts as at least FLOOR of the median
NEIGHBOURS, LEAST, SIGMAS, FLOOR = 32, 8, 6, 0.01
MAX_JUMPS, MAX_BEHIND, MAX_EXCERPT, MAX_REPLAYED = 12, 4, 160, 6


def write_report(run: Path, out: Path | None, data: str | None, progress: Progress) -> dict[str, Any]:
    """Write the report of a run to `out`, by default `<run>-report.html` next to it, complete or not at all.

    Returns its numbers, with `out` and `bytes`. data: the build, if it is no longer at the recorded path. Raises
    UsageError if no page can be made or written (see `check_report`), RunError if `run` is not a run folder or its log
    is damaged, and what `open_build` raises for `data`. What else is missing is in `missing`, and on the page.
    """
    folder = named(run)
    out = out or folder.with_name(f"{folder.name}-report.html")
    check_report(out)
    numbers = {"name": folder.name, "rule": (SIGMAS, NEIGHBOURS, LEAST, FLOOR), **run_numbers(run, data, progress)}
    size = write_page(out, ROOM, charts_of(numbers), most=MAX_JUMPS, n=numbers)
    return {"out": str(out), "bytes": size, **numbers}


def run_numbers(run: Path, data: str | None, progress: Progress) -> dict[str, Any]:
    """Everything the page shows; what it cannot show is in `missing`, a line each."""
    record, log, missing = read_run(run), run / LOG_NAME, list[str]()

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        """What a user can cause, too little memory included, becomes a line of `missing`."""
        try:
            return work()
        except (ChatdataError, ChattrainError, OSError, RuntimeError) as error:
            missing.append(f"{what}: {first_line(error)}")

    kept = kept_checkpoints(run)
    saved = attempt("no size of the model", lambda: read_checkpoint(run)) if kept else None
    plan = plan_again(record, data) if data else attempt("no tasks, documents or texts", lambda: plan_again(record))
    num_recorded, entries = len(recorded_steps(run)), read_log(run)  # in this order, and the record last
    sums = plan and attempt("no losses of tasks and documents", lambda: sum_losses(run, plan))
    train = [entry for entry in entries if isinstance(entry, TrainEntry)]
    missing += contradictions(entries, sums, num_recorded) if sums else []
    numbers: dict[str, Any] = {
        "run": msgspec.to_builtins(record),
        "missing": missing,
        "kept": [*kept],
        "model": saved and vars(saved.config),
        "uniform": saved and math.log(saved.config.vocab_size),
        "parameters": saved and sum(map(math.prod, parameter_shapes(saved.config).values())),
        "build": plan and {"path": str(plan.split.build.path), "stage": plan.split.build.manifest["stage"]},
        "entries": plan and summed(plan.split.build.manifest["splits"][plan.split.name]["entries"]),
        "plan": plan and plan.counts(),
        "written": log.is_file() and time.strftime("%Y-%m-%d %H:%M", time.localtime(log.stat().st_mtime)),
        "done": len(train),
        "skipped": sum(entry.skipped for entry in train),
        "step_s": sum(entry.tokens / entry.tokens_per_s for entry in train if entry.tokens_per_s),
        "points": parts_of(train, sums, MAX_POINTS),
        "rows": parts_of(train, sums, MAX_ROWS),
        "validations": [msgspec.to_builtins(entry) for entry in entries if isinstance(entry, ValEntry)],
        "tasks": sums.tasks if sums else [],
        "summary": sums and summarise(sums),
        "jumps": jumps_of(train),
    }
    if plan and sums:
        for jump in numbers["jumps"][:MAX_JUMPS]:
            jump["documents"] = behind(run, plan, sums, jump["step"])
        wanted = wanted_reads(run, plan, numbers)
        numbers["replays"] = attempt("no losses of tokens", lambda: replay(run, record, plan, wanted, progress))
    return numbers


def parts_of(train: Sequence[TrainEntry], sums: LossSums | None, most: int) -> list[dict[str, Any]]:
    """At most `most` parts: steps `step` … `last`, `loss` per target, `low` and `high` of single steps, medians of
    FIGURES, and `tasks`, the loss of each of sums.tasks."""
    parts = []
    for entries in np.array_split(np.array(train, object), min(len(train), most)) if train else ():
        finite = [entry for entry in entries if math.isfinite(entry.loss)]
        losses, first, last = [entry.loss for entry in finite], entries[0].step, entries[-1].step
        part = {"step": first, "last": last, "low": min(losses, default=None), "high": max(losses, default=None)}
        part["loss"] = means(np.array([[sum(e.loss * e.targets for e in finite)], [sum(e.targets for e in finite)]]))[0]
        part["tasks"] = means(sums.by_task[:, first : last + 1].sum(axis=1)) if sums else []
        for name in FIGURES:
            values = [value for e in entries if (value := getattr(e, name)) != "unknown" and math.isfinite(value)]
            part[name] = median(values) if values else None
        parts.append(part)
    return parts


def jumps_of(train: Sequence[TrainEntry]) -> list[dict[str, Any]]:
    """Steps whose loss is not finite, or jumped (see NEIGHBOURS), the largest jump first: `step`, `loss`, `expected`
    (the median before it), `deviations` above that, and no `documents` yet."""
    found, before = [], deque[float](maxlen=NEIGHBOURS)
    for entry in train:
        jump = {"step": entry.step, "loss": None, "expected": None, "deviations": math.inf, "documents": []}
        if math.isfinite(entry.loss):
            expected = median(before) if len(before) >= LEAST else entry.loss
            deviation = 1.4826 * max(median(abs(loss - expected) for loss in [*before, expected]), FLOOR * expected)
            jump |= {"loss": entry.loss, "expected": expected, "deviations": (entry.loss - expected) / (deviation or 1)}
            before.append(entry.loss)
        if jump["deviations"] > SIGMAS:
            found.append(jump)
    return sorted(found, key=lambda jump: -jump["deviations"])


def behind(run: Path, plan: TrainingPlan, sums: LossSums, step: int) -> list[dict[str, Any]]:
    """The reads of a step, as `trace` shows them, that are most `above` what their tasks cost per target in the
    NEIGHBOURS steps before it: in nats, infinite if their loss is not finite. `read` is their number in the step."""
    past = sums.by_task[:, max(0, step - NEIGHBOURS) : step].sum(axis=1)
    usual = dict(zip(sums.tasks, means(past), strict=True))
    reads = [read | {"read": number} for number, read in enumerate(step_documents(run, plan, step)) if "loss" in read]
    for read in reads:
        above = read["loss"] - read["targets"] * (usual[read["name"]] or 0.0)
        read |= {"above": above if math.isfinite(above) else math.inf, "text": read["text"][:MAX_EXCERPT]}
    return sorted(reads, key=lambda read: -read["above"])[:MAX_BEHIND]


def wanted_reads(run: Path, plan: TrainingPlan, numbers: dict[str, Any]) -> list[Wanted]:
    """Reads to show token by token: the first behind each jump, and the hardest documents in the nearest steps."""
    jumps = [(jump["step"], jump["documents"][:1]) for jump in numbers["jumps"][:MAX_REPLAYED]]
    wanted = [(step, found["read"], "its step's loss jumped") for step, first in jumps for found in first]
    hardest = [found["doc"] for found in numbers["summary"]["hardest"][:MAX_REPLAYED]]
    reach, nearest = within_reach(run, numbers["done"]), dict[int, Wanted]()
    for step in sorted(reach, key=lambda step: (step - reach[step], -step)):
        reads = reads_of_step(plan, step)
        document, lengths = reads.document, reads.stop - reads.start
        found = np.flatnonzero(np.isin(document, hardest))
        for read in found[np.argsort(-lengths[found], kind="stable")].tolist():
            nearest.setdefault(document[read], (step, read, "one of the hardest documents"))
    return wanted + [nearest[doc] for doc in hardest if doc in nearest]


def charts_of(numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Vega-Lite by id: lines over steps. What has no value gets none."""
    points, validations = numbers["points"], numbers["validations"]
    lines = {key: [(part["step"], part[key]) for part in points] for key in ("loss", *FIGURES)}
    lines |= {f"loss-{i}": [(part["step"], part["tasks"][i]) for part in points] for i in range(len(numbers["tasks"]))}
    lines["validation"] = [(entry["step"], entry["bits_per_byte"]) for entry in validations]
    for i, task in enumerate(validations[-1]["tasks"] if validations else ()):
        lines[f"validation-{i}"] = [(entry["step"], entry["tasks"].get(task)) for entry in validations]
    charts = {}
    for name, line in lines.items():
        if any(value is not None for _, value in line):
            rows = points if name == "loss" else [{"step": step, "value": value} for step, value in line]
            charts[name] = chart(ROOM, "loss" if name == "loss" else "line", rows, 130, f"{name} by step")
    return charts
