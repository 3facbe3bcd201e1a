"""Score each checkpoint of a run as it appears, and draw score against step.

D/step-00000100/             a results folder for each checkpoint
D/step-00000100/checkpoint/  a copy, until its scores are drawn: the run prunes its own checkpoints
D/scores.json, scores.png    the scores of all of them
D/run.json                   the run's: scores of another run are refused

After a kill the same call continues: a copy gets its name when it is whole.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from msgspec import Struct

from chatdata.disk import decode
from chatdata.progress import say, shown_progress
from chatdata.tasks.task import load_tasks
from chateval.ask.questions import find_sets
from chateval.ask.run import ScoringSettings, find_isolation_for, score
from chateval.ask.subject import Subject
from chateval.errors import ResultsError
from chateval.results.figures import Results
from chateval.results.report import write_report, write_steps
from chattrain.checkpoint import TOKENIZER_FILES, WEIGHTS, checkpoint_name, kept_checkpoints
from chattrain.errors import ChattrainError
from chattrain.run.start import Ranks
from chattrain.run.telemetry import RUN_NAME, lock_run, read_run, write_run

NEEDED = {"state.json", WEIGHTS, *(f"tokenizer/{name}" for name in TOKENIZER_FILES)}  # not the optimizer
POLL_S = 1.0


class Listed(Struct):
    """Of a checkpoint's state.json."""

    files: dict[str, str]


Load = Callable[[Path], Subject]
say_once = cache(partial(say, error=True))  # a line that was said is not said again


def watch(run: Path, settings: ScoringSettings, load: Load, once: bool = False) -> Iterator[Results]:
    """Score the run's checkpoints into `settings.out`, oldest first; yield the results of each.

    Ends when the checkpoint of the run's last step is scored; with `once`, when all that exist are scored. Until then
    it waits, also for a run that was stopped, and for one that does not exist yet.
    Raises RunError (another watch writes there; with `once`: no run), ResultsError (`out` has scores of another run or
    of other settings) and what `load` and `score` raise.
    """
    out, tasks = settings.out, load_tasks(settings.task_files)
    find_isolation_for(settings, tasks)  # refuse what cannot be scored now, not when there is a checkpoint
    find_sets(settings.tasks, tasks, settings.data_dir, settings.words)
    while not once and not run.is_file() and not (run / RUN_NAME).is_file():
        say_once(f"{run}: no run there yet (Ctrl-C ends)")
        time.sleep(POLL_S)
    with lock_run(out, resume=True):
        record = read_run(run)
        old = read_run(out) if (out / RUN_NAME).is_file() else record
        if (old.plan, old.recipe) != (record.plan, record.recipe):
            raise ResultsError(f"{out}: has scores of a run with another plan or recipe; use another --out")
        write_run(out, record)
        shutil.rmtree(out / ".copy", ignore_errors=True)  # of a killed watch
        last = checkpoint_name(record.recipe.num_steps)
        while True:
            if copies := _collect(run, out):
                yield _score(copies[0], run, settings, load)
            elif once or (out / last).exists():
                return
            else:
                say_once(f"{run}: waiting for its next checkpoint, until {last} (Ctrl-C ends)")
                time.sleep(POLL_S)


def _collect(run: Path, out: Path) -> list[Path]:
    """Copy the checkpoints that have no results yet, name those that are gone; return all copies, oldest first."""
    kept, save_every = kept_checkpoints(run), read_run(run).save_every
    for checkpoint in kept.values():
        if not (out / checkpoint.name).exists():
            with suppress(FileNotFoundError):  # it is being pruned
                _copy(out, checkpoint)
    newest = max(kept, default=0)
    saved = {*kept, *range(save_every or newest, newest, save_every or 1)}
    if lost := {checkpoint_name(step) for step in saved} - {path.name for path in out.glob("step-*")}:
        say_once(f"{run}: pruned before they could be copied: {', '.join(sorted(lost))}")
    return sorted(out.glob("step-*/checkpoint"))


def _copy(out: Path, checkpoint: Path) -> None:
    """Hard links where possible: chattrain never writes to a file of a checkpoint again, it only removes it."""
    state = checkpoint / "state.json"
    listed = decode(state.read_bytes(), Listed, str(state), ResultsError).files
    half = out / ".copy"
    shutil.rmtree(half, ignore_errors=True)
    (half / "checkpoint/tokenizer").mkdir(parents=True)
    for name in NEEDED & {"state.json", *listed}:
        try:
            os.link(checkpoint / name, half / "checkpoint" / name)
        except OSError:  # another file system, one without hard links, or the file is gone
            shutil.copyfile(checkpoint / name, half / "checkpoint" / name)
    half.rename(out / checkpoint.name)


def _score(copy: Path, run: Path, settings: ScoringSettings, load: Load) -> Results:
    """Score a copy, draw its scores with the others, and remove it. New checkpoints are copied between two batches."""
    folder, out = copy.parent, settings.out
    try:
        subject = replace(load(copy), label=str(run / "checkpoints" / folder.name))
    except ChattrainError:
        shutil.rmtree(folder)  # it is copied again, when the run's own has been repaired or deleted
        raise
    like = min([*out.glob(f"step-*/{RUN_NAME}"), folder / RUN_NAME]).parent
    with shown_progress() as progress:

        def show(name: str, *counts: object) -> None:
            _collect(run, out)
            progress(f"{folder.name} {name}", *counts, part=True)

        score(subject, settings._replace(out=folder, like=like), Ranks(0, 1, subject.device), show)
    results = write_report(folder)
    write_steps(out)
    shutil.rmtree(out / ".copy", ignore_errors=True)  # of a checkpoint that was pruned meanwhile
    shutil.rmtree(copy.rename(out / ".copy"))
    return results
