"""The questions: rows of scored tasks as prompts, with the same sources, order and rendering as a build."""

import hashlib
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from chatdata.build.plan import permutation
from chatdata.conversation import parse_conversation
from chatdata.document import Document
from chatdata.errors import ChatdataError, MissingSource, TaskError, nearest
from chatdata.recipe import Entry, scored_entry
from chatdata.render.specification import render_conversation, render_for_completion
from chatdata.sources.find import Locations, resolve
from chatdata.sources.source import Source
from chatdata.tasks.task import Task, call_task
from chatdata.tokenizer.bpe import Tokenizer
from chateval.errors import UsageError

Kind = Literal["categorical", "generative", "code"]


class Question(NamedTuple):
    """One row of a scored task."""

    task: str  # the scored set's name
    item: str  # "mmlu all test row 812"
    subject: str | None
    row: Any
    conversation: Any  # including the row's own answer
    prompt: list[int]  # ids up to assistant_start
    tokenizer: Tokenizer
    letters: tuple[str, ...] = ()  # multiple choice: the letters to choose from
    gold: str = ""  # and the right one

    @property
    def document(self) -> Document:
        """The whole conversation, rendered. Multiple choice never needs it."""
        return render_conversation(self.tokenizer, self.conversation)

    @property
    def prompt_sha256(self) -> str:
        """Over the ids as `<u4` bytes: two models are compared on an item only if their prompts are the same."""
        return hashlib.sha256(np.array(self.prompt, dtype="<u4").tobytes()).hexdigest()[:16]


class ScoredTask(NamedTuple):
    """A scored set with its questions, in the task's order."""

    name: str
    kind: Kind
    chance: float
    task: Task
    source: dict[str, Any]  # name, revision and files, as in a manifest
    num_rows: int  # in the source; more than the questions if there is a limit
    questions: list[Question]


def scored_sets(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Name for --tasks → the task it belongs to. Raises TaskError if two tasks have a scored set of the same name."""
    owners: dict[str, Task] = {}
    for task in tasks.values():
        for name in task.scoring.sets if task.scoring else ():
            if name in owners:
                raise TaskError(f'task "{task.name}": its scored set "{name}" is also one of "{owners[name].name}"')
            owners[name] = task
    return owners


def load_questions(
    names: Sequence[str],
    tasks: Mapping[str, Task],
    tokenizer: Tokenizer,
    data_dir: Path | None = None,
    words: str | None = None,
    limit: int | None = None,
) -> list[ScoredTask]:
    """The scored sets `names` with their first `limit` rows (default: all). Raises what `find_sets` raises."""
    return [_read(*found, tokenizer, limit) for found in find_sets(names, tasks, data_dir, words)]


def find_sets(
    names: Sequence[str], tasks: Mapping[str, Task], data_dir: Path | None, words: str | None
) -> list[tuple[str, Task, Entry, Source]]:
    """Each of the scored sets `names` with its task, entry and source.

    Raises UsageError for unknown names, MissingSource naming every source that was not found.
    """
    owners = scored_sets(tasks)
    for name in names:
        if name not in owners:
            raise UsageError(f'--tasks: no scored task "{name}"{nearest(name, sorted(owners))}')
    locations = Locations(Path(), data_dir=data_dir, words=words)
    found, missing = [], []
    for name in dict.fromkeys(names):
        task, entry = owners[name], scored_entry(owners[name], name)
        try:
            found.append((name, task, entry, resolve(entry, task, locations)))
        except MissingSource as error:
            missing.append(str(error))
    if missing:
        raise MissingSource("sources missing: " + " · ".join(missing))
    return found


def _read(name: str, task: Task, entry: Entry, source: Source, tokenizer: Tokenizer, limit: int | None) -> ScoredTask:
    num_rows = entry.rows if source.make_row else source.num_rows
    chosen = (permutation(num_rows) if task.permuted else np.arange(num_rows))[:limit]
    questions = {}
    for number, row in source.read(np.isin(np.arange(num_rows), chosen)):
        item = f"{entry.label} row {number}"
        try:
            questions[number] = _question(name, item, task, row, tokenizer)
        except ChatdataError as error:
            raise error.at(f"{name}: {source.where(number)}") from error
    scoring = task.scoring
    kind: Kind = "categorical" if scoring.letters else "code" if scoring.program else "generative"
    in_order = [questions[number] for number in chosen.tolist()]
    return ScoredTask(name, kind, scoring.sets[name].chance, task, source.describe(), num_rows, in_order)


def _question(name: str, item: str, task: Task, row: Any, tokenizer: Tokenizer) -> Question:
    conversation = parse_conversation(call_task(task, task.to_conversation, row))
    prompt = render_for_completion(tokenizer, conversation)
    subject = call_task(task, itemgetter(task.scoring.subject_key), row) if task.scoring.subject_key else None
    letters, gold = (), ""
    if task.scoring.letters is not None:
        letters, gold = tuple(call_task(task, task.scoring.letters, row)), conversation["messages"][-1]["content"]
        if len(letters) < 2 or gold not in letters:
            raise TaskError(f"the answer {gold!r} must be one of at least two letters, not of {', '.join(letters)}")
    return Question(name, item, subject, row, conversation, prompt, tokenizer, letters, gold)
