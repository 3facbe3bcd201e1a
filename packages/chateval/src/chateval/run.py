"""A scoring run: questions in fixed batches, a line per answer as it comes, figures at the end.

Batches are the same however often a run was interrupted: draws (answers to questions) sorted by length of prompt,
longest first, rank r of R taking every R-th, B at a time. A batch whose lines are all there is skipped; one that was
cut is answered again as a whole, so that its answers are those of an uninterrupted run, and only its missing lines are
written. When all is done the lines are put in the tasks' order, so the file does not tell how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chatdata.disk import naming, write_whole
from chatdata.tasks.task import load_tasks
from chateval.ask.answers import Draw, answer_letters, answer_programs, answer_texts
from chateval.ask.generate import Sampling
from chateval.ask.questions import ScoredTask, load_questions, scored_sets
from chateval.ask.subject import Subject
from chateval.errors import ScoringError, UsageError
from chateval.progress import Progress
from chateval.results.figures import RUN_FORMAT, RUN_NAME, VERSION, read_run, require_same_run, write_run
from chateval.results.firewall import read_firewall
from chateval.results.items import ITEMS_NAME, append_item, open_items, read_items
from chattrain.run.ranks import Ranks

if TYPE_CHECKING:
    from chateval.sandbox.isolation import Isolation


@dataclass(frozen=True)
class Settings:
    """The command line of `chateval run`, but for the model."""

    tasks: tuple[str, ...]
    out: Path
    data_dir: Path | None = None
    words: str | None = None
    task_files: tuple[Path, ...] = ()
    limit: int | None = None
    batch_size: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    draws: int = 1
    allow_code: bool = False
    firewall: Path | None = None


def score(subject: Subject, settings: Settings, ranks: Ranks, progress: Progress) -> None:
    """Answer what is not answered yet: afterwards items.jsonl holds every item. A finished folder is only read.

    Raises UsageError, MissingSource, ScoringError, ResultsError (a folder of another run), SandboxError.
    """
    tasks = load_tasks(settings.task_files)
    isolation = _isolation(settings, [name for name, task in scored_sets(tasks).items() if task.scoring.program])  # type: ignore[union-attr]
    scored = load_questions(settings.tasks, tasks, subject.tokenizer, settings.data_dir, settings.words, settings.limit)
    run = describe_run(subject, settings, scored)
    if settings.firewall is not None:
        run["firewall"] = read_firewall(settings.firewall, run["tasks"])
    _begin(settings, run, ranks)
    done = {item.key for item in read_items(settings.out)}
    ranks.wait()  # all have read before any writes
    asked = [(task, list(batches_of(task, settings, ranks))) for task in scored]
    if any(draw.key not in done for _, batches in asked for batch in batches for draw in batch):
        path = settings.out / (ITEMS_NAME if ranks.is_first else f"items-{ranks.rank:05}.jsonl")
        with naming(path), open_items(path) as file:
            for task, batches in asked:
                progress.begin(task.name, sum(len(batch) for batch in batches))
                for batch in batches:
                    for line in _answer_missing(subject, task, batch, settings, isolation, done):
                        append_item(file, line)
                    progress.advance(len(batch))
                progress.end()
    ranks.wait()
    if ranks.is_first:
        _put_in_order(settings.out, scored, settings.draws)


def batches_of(task: ScoredTask, settings: Settings, ranks: Ranks) -> Iterator[list[Draw]]:
    """This rank's batches of a task. Neighbours in length share a batch, so little of it is padding."""
    draws = [Draw(question, draw) for question in task.questions for draw in range(_num_draws(task, settings))]
    draws.sort(key=lambda draw: -len(draw.question.prompt))
    mine = draws[ranks.rank :: ranks.num_ranks]
    return (mine[start : start + settings.batch_size] for start in range(0, len(mine), settings.batch_size))


def _num_draws(task: ScoredTask, settings: Settings) -> int:
    return 1 if task.kind == "categorical" else settings.draws


def describe_run(subject: Subject, settings: Settings, scored: Sequence[ScoredTask]) -> dict[str, Any]:
    """run.json: what decides the answers, beside the questions themselves."""
    return {
        "format": RUN_FORMAT,
        "version": VERSION,
        "weights_sha256": subject.weights_sha256,
        "checkpoint": subject.label,
        "step": subject.step,
        "settings": {**asdict(settings.sampling), "dtype": str(subject.dtype).removeprefix("torch.")},
        "tasks": {
            task.name: {
                "scoring": task.kind,
                "chance": task.chance,
                "items": len(task.questions),
                "rows": task.num_rows,
                "draws": _num_draws(task, settings),
                "source": task.source,
            }
            for task in scored
        },
    }


def _isolation(settings: Settings, code_tasks: Sequence[str]) -> Isolation | None:
    """What programs of the model will run in; None if no task asks for it."""
    asked = [name for name in settings.tasks if name in code_tasks]
    if not asked:
        return None
    if not settings.allow_code:
        raise UsageError(f"{asked[0]} runs code the model wrote: allow it with --allow-code, or leave {asked[0]} out")
    from chateval.sandbox.isolation import find_isolation

    return find_isolation()


def _begin(settings: Settings, run: dict[str, Any], ranks: Ranks) -> None:
    require_same_run(settings.out, run)  # on every rank: all refuse, rather than one while the others wait for it
    ranks.wait()
    # a firewall file changes no answer: a folder that is there, even a finished one, takes it on
    if ranks.is_first and (
        not (settings.out / RUN_NAME).is_file()
        or ("firewall" in run and read_run(settings.out).get("firewall") != run["firewall"])
    ):
        write_run(settings.out, run)
    ranks.wait()


def _answer_missing(
    subject: Subject,
    task: ScoredTask,
    batch: Sequence[Draw],
    settings: Settings,
    isolation: Isolation | None,
    done: Set[tuple[str, str, int]],
) -> Iterator[dict[str, Any]]:
    """The lines of a batch that are not `done`. Raises ScoringError for a batch too large for the memory."""
    missing = {draw.key for draw in batch} - done
    if not missing:
        return
    try:
        for line in _answer(subject, task, batch, settings, isolation):
            if (line["task"], line["item"], line["draw"]) in missing:
                yield line
    except torch.OutOfMemoryError:
        raise ScoringError(
            f"{task.name}: out of memory with {len(batch)} questions at once: give a smaller --batch-size "
            "(the run continues)"
        ) from None


def _answer(
    subject: Subject, task: ScoredTask, batch: Sequence[Draw], settings: Settings, isolation: Isolation | None
) -> Iterator[dict[str, Any]]:
    if task.kind == "categorical":
        return answer_letters(subject, batch)
    if task.kind == "generative":
        return answer_texts(subject, task.task, batch, settings.sampling)
    assert isolation is not None
    return answer_programs(subject, task.task, batch, settings.sampling, isolation)


def _put_in_order(out: Path, scored: Sequence[ScoredTask], draws: int) -> None:
    """All lines in the tasks' order in items.jsonl, whole or not at all; then the other ranks' files go.

    What is in order already is left alone: a finished folder may be one that cannot be written to.
    """
    questions = ((task.name, question.item) for task in scored for question in task.questions)
    place = {(*question, draw): number for number, (question, draw) in enumerate(product(questions, range(draws)))}
    lines = {}
    paths = sorted(out.glob("items*.jsonl"))
    for path in paths:
        *whole, _unfinished = path.read_bytes().split(b"\n")  # of a killed rank that this run does not have
        for line in whole:
            item = json.loads(line)
            lines[place[item["task"], item["item"], item["draw"]]] = line
    in_order = b"".join(lines[number] + b"\n" for number in sorted(lines))
    if paths != [out / ITEMS_NAME] or paths[0].read_bytes() != in_order:
        with naming(out / ITEMS_NAME):
            write_whole(out / ITEMS_NAME, in_order)
    for path in out.glob("items-*.jsonl"):
        path.unlink()
