"""The items that chateval scores, and those of a user's own files, as the firewall searches for them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from msgspec import Struct

from chatdata.conversation import parse_conversation
from chatdata.disk import shown
from chatdata.errors import ChatdataError, MissingSource, SourceError, UsageError
from chatdata.firewall.ngrams import NUM_WORDS, Index, WordTable, index_texts, normalise, word_table
from chatdata.recipe import Entry, scored_entry
from chatdata.sources import hub
from chatdata.sources.find import Locations, PlannedEntry, resolve
from chatdata.sources.source import Source
from chatdata.tasks.multiple_choice import question_and_choices
from chatdata.tasks.task import Scoring, Task, call_task
from chatdata.tokenizer.bpe import Tokenizer

QUESTION_KEYS, CHOICES_KEY = ("question", "problem", "prompt"), "choices"  # of a user's own file, if none are named
NAME_KEYS = "name the keys: --against FILE:QUESTION,CHOICES"


class ScoredItem(NamedTuple):
    """A scored row: `parts` are its question, then its choices if it has any; `word` what a spelling row is about."""

    set: str
    item: str  # as chateval names it: "mmlu all test row 812"; of a user's own file: "exam.jsonl line 3"
    parts: tuple[str, ...]
    word: str | None

    def key_text(self) -> str:
        """What is searched for: the question, or the item's longest part if the question is under NUM_WORDS words."""
        question = self.parts[0]
        if len(self.parts) == 1 or len(question.split(None, NUM_WORDS)) >= NUM_WORDS:  # counts no further
            return question
        return max(self.parts, key=lambda part: len(part.split()))


class Scored(Struct, frozen=True):
    """All items, an index over their `key_text`, a build's tokenizer and the words of its tokens.

    checked: scored set or file → its source; not_checked: scored set → why; cpu_s: what reading and indexing took.
    against: name, keys (as given) and SHA-256 of each of the user's own files.
    """

    items: list[ScoredItem]
    index: Index
    tokenizer: Tokenizer
    table: WordTable
    checked: Mapping[str, Source]
    not_checked: Mapping[str, str]
    against: list[dict[str, str]]
    cpu_s: float

    @property
    def decided_by(self) -> dict[str, Any]:
        """For the manifest of a build that drops rows: set or file → SHA-256 of its files, and `against` if given."""
        sets = {name: [file["sha256"] for file in source.describe()["files"]] for name, source in self.checked.items()}
        return {"scored": sets} | ({"against": self.against} if self.against else {})


def read_scored(
    train: list[PlannedEntry], tasks: Mapping[str, Task], locations: Locations, tokenizer: Tokenizer, own: Sequence[str]
) -> Scored:
    """The scored items that are found locally (nothing is downloaded), and those of the user's own files.

    Takes a second, whatever the build, and depends on nothing rendered, so it can be read at the same time.
    """
    started = time.thread_time()
    items, checked, not_checked = _scored_items(train, tasks, locations)
    against = []
    for given in own:
        path, _, keys = (given, "", "") if Path(given).is_file() else given.partition(":")
        source = resolve(Entry("--against", "", "", path=path), tasks["conversations"], Locations(Path()))
        if checked.get(source.name, source).files != source.files:
            raise UsageError(f"--against: two files are named {source.name}; rename one")
        items += _own_items(source, [key.strip() for key in keys.split(",") if key.strip()])
        checked[source.name] = source
        against += [{"name": file.name, "keys": keys, "sha256": file.sha256} for file in source.files]
    index, table = index_texts([item.key_text() for item in items]), word_table(tokenizer)
    return Scored(items, index, tokenizer, table, checked, not_checked, against, time.thread_time() - started)


def _scored_items(
    train: list[PlannedEntry], tasks: Mapping[str, Task], locations: Locations
) -> tuple[list[ScoredItem], dict[str, Source], dict[str, str]]:
    """The items of all scored sets found locally, the sets' sources, and why others are not checked."""
    used = {planned.entry.task for planned in train}
    has_words = any(word_of(tasks[name]) for name in used)
    # the recipe's own word list, if the command line names none: scored words come from one list
    lists = (planned.source.option_files.get("words") for planned in train)
    words = locations.words or next((str(file.path) for file in lists if file), None)
    locations = Locations(Path(), data_dir=locations.data_dir, words=words)
    items: list[ScoredItem] = []
    checked: dict[str, Source] = {}
    not_checked: dict[str, str] = {}
    for task in tasks.values():
        if task.scoring is None or (task.generate and task.name not in used and word_of(task) is None):
            continue
        for name in task.scoring.sets:
            if task.generate and task.name not in used and not has_words:
                not_checked[name] = "the recipe has no rows about words"
                continue
            try:
                with hub.nothing_fetched():
                    source = resolve(scored_entry(task, name), task, locations)
                items += _items_of(task, name, source)
                checked[name] = source
            except MissingSource:
                not_checked[name] = "dataset not found locally"
            except ChatdataError as error:
                not_checked[name] = str(error)
    return items, checked, not_checked


def _items_of(task: Task, name: str, source: Source) -> list[ScoredItem]:
    scoring = cast(Scoring, task.scoring)
    entry = scored_entry(task, name)
    num_rows = source.num_rows if task.generate is None else (entry.rows or 0)
    items = []
    for number, row in source.read(np.ones(num_rows, dtype=bool)):
        conversation = call_task(task, task.to_conversation, row)
        if type(conversation) is not dict:  # most tasks return the common form
            conversation = parse_conversation(conversation)
        messages = conversation["messages"]
        question = "\n".join(str(message["content"]) for message in messages if message["role"] == "user")
        letters = call_task(task, scoring.letters, row) if scoring.letters else ()
        word = call_task(task, scoring.word, row) if scoring.word else None
        items.append(ScoredItem(name, f"{entry.label} row {number}", question_and_choices(question, letters), word))
    return items


def _own_items(source: Source, keys: list[str]) -> list[ScoredItem]:
    """The items of a user's own file. keys: of the question and of the choices, or []."""
    items, unseen = [], set(keys[1:])  # choices need not be in every row: in some files only a few have any
    places = map(str, source.places(np.arange(source.num_rows)))
    for (_, row), place in zip(source.read(np.ones(source.num_rows, dtype=bool)), places, strict=True):
        try:
            items.append(ScoredItem(source.name, place, _question_and_choices(row, keys), None))
        except SourceError as error:
            raise error.at(f"--against: {place}") from None
        unseen.difference_update(row)
    if unseen:
        raise SourceError(f'--against: {source.name}: no row has the key "{min(unseen)}"; {NAME_KEYS}')
    return items


def _question_and_choices(row: Any, keys: list[str]) -> tuple[str, ...]:
    """(question, *choices) of a row. Choices are texts or numbers, in a list, in ARC's table or each with its key."""
    if not isinstance(row, dict):
        raise SourceError(f"must be an object with a question, not {shown(row)}")
    asked = keys[0] if keys else next((key for key in QUESTION_KEYS if key in row), QUESTION_KEYS[0])
    if asked not in row:
        raise SourceError(f'no key "{asked}"; the row has {", ".join(map(shown, row))}; {NAME_KEYS}')
    question, parts = row[asked], list[str]()
    if not isinstance(question, str) or not normalise(question):
        raise SourceError(f'key "{asked}": must be a question with a word in it, not {shown(question)}')
    for key in keys[1:] or [CHOICES_KEY]:
        value = row.get(key)
        texts = value.get("text", list(value.values())) if isinstance(value, dict) else value
        texts = [] if texts is None else texts if isinstance(texts, list) else [texts]
        if not all(isinstance(text, str | int | float) for text in texts):
            raise SourceError(f'key "{key}": must be texts to choose from, not {shown(value)}')
        parts += map(str, texts)
    return question, *parts


def word_of(task: Task) -> Any:
    return task.scoring.word if task.scoring else None
