"""Which rows a checkpoint is asked, as prompts: the same sources, order and rendering as a build's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from chatdata.errors import ChatdataError, MissingSource, nearest
from chatdata.mixture import permutation, select
from chatdata.recipe import Entry
from chatdata.render import render_conversation, render_for_completion
from chatdata.sources import Locations, Source, resolve
from chatdata.tasks import Scoring, Task
from chateval.errors import UsageError

if TYPE_CHECKING:
    from chatdata.document import Document
    from chatdata.tokenizer import Tokenizer

Kind = Literal["categorical", "generative", "code"]


@dataclass(frozen=True, eq=False)
class Question:
    """One row of a scored task."""

    task: str  # the scored set's name
    item: str  # which row, for people: "mmlu all test row 812"
    subject: str | None
    row: Any
    conversation: Any  # with the row's own answer
    prompt: list[int]  # ids up to assistant_start
    tokenizer: Tokenizer

    @property
    def document(self) -> Document:
        """The whole conversation, rendered. Not kept: multiple choice never asks for it."""
        return render_conversation(self.tokenizer, self.conversation)

    @property
    def gold(self) -> str:
        """The row's own answer, where it is one text, as in multiple choice."""
        return self.conversation["messages"][-1]["content"]

    @cached_property
    def prompt_sha256(self) -> str:
        """Over the ids as `<u4` bytes: two models may be compared on an item only if they were asked the same."""
        return hashlib.sha256(np.array(self.prompt, dtype="<u4").tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ScoredTask:
    """A scored set with its questions, in the task's order."""

    name: str
    kind: Kind
    chance: float
    scoring: Scoring
    source: dict[str, Any]  # name, revision and files, as a manifest has them
    questions: list[Question]


def scored_sets(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Name for --tasks → the task it belongs to."""
    return {name: task for task in tasks.values() if task.scoring for name in task.scoring.sets}


def load_questions(
    names: Sequence[str],
    tasks: Mapping[str, Task],
    tokenizer: Tokenizer,
    data_dir: Path | None = None,
    words: str | None = None,
    limit: int | None = None,
) -> list[ScoredTask]:
    """The scored sets `names` with their first `limit` rows (all by default).

    Raises UsageError for unknown names, MissingSource naming all sources that are not at hand.
    """
    owners = scored_sets(tasks)
    for name in names:
        if name not in owners:
            raise UsageError(f'--tasks: no scored task "{name}"{nearest(name, sorted(owners))}')
    locations = Locations(Path(), data_dir=data_dir, words=words)
    found, missing = [], []
    for name in dict.fromkeys(names):
        entry = _entry(name, owners[name])
        try:
            found.append((name, entry, resolve(entry, owners[name], locations)))
        except MissingSource as error:
            missing.append(str(error))
    if missing:
        raise MissingSource("sources missing: " + " · ".join(missing))
    return [_read(name, owners[name], entry, source, tokenizer, limit) for name, entry, source in found]


def _entry(name: str, task: Task) -> Entry:
    assert task.scoring is not None
    scored = task.scoring.sets[name]
    options = {key: option.default for key, option in task.options.items()} | dict(scored.options)
    files = tuple(key for key, option in task.options.items() if option.is_file)
    return Entry(task.name, scored.split, scored.subset, rows=scored.rows, options=options, file_options=files)


def _read(name: str, task: Task, entry: Entry, source: Source, tokenizer: Tokenizer, limit: int | None) -> ScoredTask:
    assert task.scoring is not None
    scoring = task.scoring
    num_rows = entry.rows if source.make_row else source.num_rows
    assert num_rows is not None, f"{name}: a generated task says in its ScoredSet how many rows are scored"
    order = permutation(num_rows) if task.permuted else np.arange(num_rows)
    chosen = order[list(select(num_rows, None, None, None, limit))]
    wanted = np.zeros(num_rows, dtype=bool)
    wanted[chosen] = True
    questions = {}
    for number, row in source.read(wanted):
        item = f"{entry.label} row {number}"
        try:
            conversation = task.to_conversation(row)
            prompt = render_for_completion(tokenizer, conversation)
        except ChatdataError as error:
            raise error.at(f"{name}: {source.where(number)}") from error
        subject = row[scoring.subject_key] if scoring.subject_key else None
        questions[number] = Question(name, item, subject, row, conversation, prompt, tokenizer)
    kind: Kind = "categorical" if scoring.letters else "code" if scoring.program else "generative"
    chance = scoring.sets[name].chance
    in_order = [questions[number] for number in chosen.tolist()]
    return ScoredTask(name, kind, chance, scoring, source.describe(), in_order)
