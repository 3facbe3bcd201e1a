"""A scoring run: ask the questions in fixed batches and append each answer to items.jsonl.

Batches do not depend on interruptions: draws (answers to questions) are sorted by prompt length, longest first, rank r
of R takes every R-th, B at a time. A batch with all its lines on disk is skipped. One that was cut short is answered
again as a whole, so its answers equal those of an uninterrupted run, and only its missing lines are written. At the end
the lines are sorted into the tasks' order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chatdata.disk import naming, write_whole
from chatdata.progress import Progress
from chatdata.tasks.task import Task, load_tasks
from chateval.ask.answers import Draw, answer_letters, answer_programs, answer_texts
from chateval.ask.generate import Sampling
from chateval.ask.questions import ScoredTask, load_questions, scored_sets
from chateval.ask.subject import Subject
from chateval.errors import ScoringError, UsageError
from chateval.results.items import ITEMS_NAME, append_item, open_items, read_items
from chateval.results.run_file import RUN_NAME, Run, RunTask, read_firewall, read_run, require_same_run, write_run
from chateval.sandbox.run_code import Isolation, find_isolation
from chattrain.run.start import Ranks


class ScoringSettings(NamedTuple):
    """The options of `chateval run`, except the model."""

    tasks: tuple[str, ...]
    out: Path
    data_dir: Path | None = None
    words: str | None = None
    task_files: tuple[Path, ...] = ()
    limit: int | None = None
    batch_size: int = 32
    sampling: Sampling = Sampling()
    draws: int = 1
    allow_code: bool = False
    firewall: Path | None = None
    like: Path | None = None  # a results folder whose settings and tasks must be the same


def score(subject: Subject, settings: ScoringSettings, ranks: Ranks, progress: Progress) -> None:
    """Answer every question that has no answer on disk yet. A finished folder is only read.

    Raises UsageError, MissingSource, ScoringError, ResultsError (the folder of another run), SandboxError.
    """
    tasks = load_tasks(settings.task_files)
    isolation = find_isolation_for(settings, tasks)
    scored = load_questions(settings.tasks, tasks, subject.tokenizer, settings.data_dir, settings.words, settings.limit)
    run = describe_run(subject, settings, scored)
    if settings.firewall is not None:
        run.firewall = read_firewall(settings.firewall, run.tasks)
    require_same_run(settings.out, run)  # on every rank: if only one refused, the others would wait for it
    require_same_run(settings.like or settings.out, run, same_weights=False)
    ranks.wait()
    if ranks.is_first:
        _write_new_run(settings.out, run)
    ranks.wait()
    done = {item.key for item in read_items(settings.out)}
    ranks.wait()  # every rank reads before any rank writes
    work = [(task, batches_of(task, run.tasks[task.name].draws, settings.batch_size, ranks)) for task in scored]
    if any(draw.key not in done for _, batches in work for batch in batches for draw in batch):
        path = settings.out / (ITEMS_NAME if ranks.is_first else f"items-{ranks.rank:05}.jsonl")
        with naming(path), open_items(path) as file:
            for task, batches in work:
                num_done, num_draws = 0, sum(map(len, batches))
                progress(task.name, num_done, num_draws, "answers")
                for batch in batches:
                    missing = {draw.key for draw in batch} - done
                    for line in _answers(subject, task, batch, settings, isolation) if missing else ():
                        if (line["task"], line["item"], line["draw"]) in missing:
                            append_item(file, line)
                    num_done += len(batch)
                    progress(task.name, num_done, num_draws, "answers")
    ranks.wait()
    if ranks.is_first:
        _put_in_order(settings.out, scored, settings.draws)


def batches_of(task: ScoredTask, num_draws: int, batch_size: int, ranks: Ranks) -> list[list[Draw]]:
    """This rank's batches of a task. Prompts of similar length share a batch, which keeps padding small."""
    draws = [Draw(question, draw) for question in task.questions for draw in range(num_draws)]
    draws.sort(key=lambda draw: -len(draw.question.prompt))
    mine = draws[ranks.rank :: ranks.num_ranks]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def describe_run(subject: Subject, settings: ScoringSettings, scored: Sequence[ScoredTask]) -> Run:
    """run.json: everything that determines the answers, except the questions themselves."""
    # without top_p, which only `chateval serve` sets
    sampling = {key: value for key, value in settings.sampling._asdict().items() if (key, value) != ("top_p", 1.0)}
    sampling["dtype"] = str(subject.dtype).removeprefix("torch.")
    tasks = {}
    for task in scored:
        draws = 1 if task.kind == "categorical" else settings.draws
        answers = {"items": len(task.questions), "rows": task.num_rows, "draws": draws}
        tasks[task.name] = RunTask(scoring=task.kind, chance=task.chance, source=task.source, **answers)
    return Run("chateval-run", 1, subject.weights_sha256, subject.label, subject.step, sampling, tasks)


def find_isolation_for(settings: ScoringSettings, tasks: Mapping[str, Task]) -> Isolation | None:
    """What the model's programs will run in; None if no task needs it. Raises UsageError, SandboxError."""
    code_tasks = [name for name, task in scored_sets(tasks).items() if task.scoring.program]
    name = next((name for name in settings.tasks if name in code_tasks), None)
    if name is None:
        return None
    if not settings.allow_code:
        raise UsageError(f"{name} runs code that the model wrote: pass --allow-code, or leave {name} out")
    return find_isolation()


def _write_new_run(out: Path, run: Run) -> None:
    """Write run.json, unless it exists. A firewall file changes no answer, so it can be added to any folder."""
    if not (out / RUN_NAME).is_file() or (run.firewall is not None and run.firewall != read_run(out).firewall):
        write_run(out, run)


def _answers(
    subject: Subject, task: ScoredTask, batch: Sequence[Draw], settings: ScoringSettings, isolation: Isolation | None
) -> Iterator[dict[str, Any]]:
    """The lines of a batch. Raises ScoringError if the batch does not fit in memory."""
    try:
        if task.kind == "categorical":
            yield from answer_letters(subject, batch)
        elif task.kind == "generative":
            yield from answer_texts(subject, task.task, batch, settings.sampling)
        else:
            yield from answer_programs(subject, task.task, batch, settings.sampling, isolation)
    except torch.OutOfMemoryError:
        remedy = "run it again with a smaller --batch-size to continue"
        raise ScoringError(f"{task.name}: out of memory with {len(batch)} questions at once; {remedy}") from None


def _put_in_order(out: Path, scored: Sequence[ScoredTask], draws: int) -> None:
    """Write all lines in the tasks' order to items.jsonl, whole or not at all; then remove the other ranks' files.

    A file already in order is left alone, because a finished folder may be read-only.
    """
    questions = ((task.name, question.item) for task in scored for question in task.questions)
    place = {(*question, draw): number for number, (question, draw) in enumerate(product(questions, range(draws)))}
    lines = {}
    paths = sorted(out.glob("items*.jsonl"))
    for path in paths:
        *whole, _unfinished = path.read_bytes().split(b"\n")  # a killed rank's last line
        for line in whole:
            item = json.loads(line)
            lines[place[item["task"], item["item"], item["draw"]]] = line
    in_order = b"".join(lines[number] + b"\n" for number in sorted(lines))
    if paths != [out / ITEMS_NAME] or paths[0].read_bytes() != in_order:
        write_whole(out / ITEMS_NAME, in_order)
    for path in out.glob("items-*.jsonl"):
        path.unlink()
