"""The firewall between training and scoring: which training documents hold items that chateval scores.

A document counts as holding an item
  exact    if all words of the question are in it in one run and, for multiple choice (of at least MIN_EXACT_WORDS words
           in all), all choices near them in any order: white space, case, punctuation, accents and the order of
           choices make no difference;
  n-gram   if at least MIN_SHARE of the n-grams of a question of at least MIN_WORDS words are there;
  word     if it is a row about a word (spelling) that is scored.
It cannot see a question told in other words or another language, nor an answer without its question.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chatdata import hub
from chatdata.columns import Columns
from chatdata.conversation import parse_conversation
from chatdata.errors import ChatdataError, MissingSource
from chatdata.overlap import NUM_WORDS, Index, WordTable, find_texts, index_texts, normalise, word_table
from chatdata.recipe import scored_entry
from chatdata.sources import Locations, Source, resolve
from chatdata.store import Documents, RowMap
from chatdata.tasks import Task, call_task
from chatdata.tasks.multiple_choice import question_and_choices
from chatdata.tokenizer import Tokenizer

if TYPE_CHECKING:
    from chatdata.build import Plan

CHOICES = ("report", "drop", "off")  # of --decontaminate
FIREWALL_FORMAT, VERSION = "chatdata-firewall", 1
MIN_WORDS, MIN_SHARE = 13, 0.5
LOOK_SHARE = 0.6  # of the n-grams looked for, every fourth one, from which on the text itself is compared
MIN_EXACT_WORDS = 8  # of question and choices: "−4 + (−3)=" with −7, −1, 1 and 7 is in any chat of sums


class ScoredItem(NamedTuple):
    """A scored row: `parts` are its question, then its choices if it has any; `word` what a spelling row is about."""

    set: str
    item: str  # as chateval names it: "mmlu all test row 812"
    parts: tuple[str, ...]
    word: str | None

    @property
    def key_text(self) -> str:
        """What it is looked for by: the question, or its longest part if that is under NUM_WORDS words."""
        question = self.parts[0]
        if len(self.parts) == 1 or len(question.split(None, NUM_WORDS)) >= NUM_WORDS:  # no word beyond is looked at
            return question
        return max(self.parts, key=lambda part: len(part.split()))


@dataclass(frozen=True)
class Scored:
    """What is looked for: all items, an index over their `key_text`, the tokenizer's words, and where the items are
    from. checked: scored set → its source; not_checked: scored set → why; cpu_s: what finding this out took."""

    items: list[ScoredItem]
    index: Index
    table: WordTable
    checked: Mapping[str, Source]
    not_checked: Mapping[str, str]
    cpu_s: float


@dataclass(frozen=True)
class Hit:
    """A training document that holds a scored item. share: of the question's n-grams; 1.0 but for "n-gram"."""

    document: int
    item: ScoredItem
    method: str
    share: float


@dataclass(frozen=True)
class Findings:
    """checked: scored set → its source; not_checked: scored set → why; num_items: checked set → its items.

    places: flagged document → its task, source, file (None: generated, or a dataset) and row in that file, from 0.
    """

    hits: tuple[Hit, ...]
    places: Mapping[int, Mapping[str, Any]]
    checked: Mapping[str, Source]
    not_checked: Mapping[str, str]
    num_items: Mapping[str, int]
    cpu_s: float

    @property
    def documents(self) -> np.ndarray:
        """The flagged ones, ascending (int64)."""
        return np.unique(np.array([hit.document for hit in self.hits], dtype=np.int64))


def firewall_path(out: Path) -> Path:
    """Where the flagged items of the build `out` are listed: beside it, for a build holds nothing but itself."""
    return out.with_name(f"{out.name}-firewall.json")


def check(
    plan: Plan, scored: Scored, store: Documents, row_maps: Mapping[Source, RowMap], num_threads: int
) -> Findings:
    """Compare the documents of train, as they are cut, with what is `scored`."""
    started = time.process_time()
    in_train = np.zeros(len(store.num_tokens), dtype=bool)
    about_words = np.zeros(len(store.num_tokens), dtype=bool)
    for planned in plan.splits["train"]:
        row_map = row_maps[planned.source]
        documents = row_map.document_of[row_map.row_at[planned.positions.start : planned.positions.stop]]
        in_train[documents] = True
        about_words[documents] = _word_of(planned.task) is not None
    in_train &= store.drop_reason == 0
    with ThreadPoolExecutor(num_threads) as threads:
        hits = list(_find(plan.tokenizer, scored, store, in_train & ~about_words, threads))
        hits += _find_words(scored, store, row_maps, in_train & about_words, threads)
    num_items = {name: sum(item.set == name for item in scored.items) for name in scored.checked}
    places = _places({hit.document for hit in hits}, row_maps)
    cpu_s = scored.cpu_s + time.process_time() - started
    return Findings(tuple(hits), places, scored.checked, scored.not_checked, num_items, cpu_s)


def read_scored(plan: Plan) -> Scored:
    """What chateval scores, as far as it is at hand: nothing is downloaded. A second, whatever the build: it is
    known before anything is rendered, so it can be read beside that."""
    started = time.thread_time()
    items, checked, not_checked = _scored_items(plan)
    index = index_texts([item.key_text for item in items])
    table = word_table(plan.tokenizer)
    return Scored(items, index, table, checked, not_checked, time.thread_time() - started)


def _scored_items(plan: Plan) -> tuple[list[ScoredItem], dict[str, Source], dict[str, str]]:
    """The items of all scored sets at hand, the sets' sources, and why others are not checked."""
    used = {planned.entry.task for planned in plan.splits["train"]}
    has_words = any(_word_of(plan.tasks[name]) for name in used)
    # a recipe's own word list, if the command line names none: the words scored are those of one list
    lists = (planned.source.option_files.get("words") for planned in plan.splits["train"])
    words = plan.locations.words or next((str(file.path) for file in lists if file), None)
    locations = Locations(Path(), data_dir=plan.locations.data_dir, words=words)
    items: list[ScoredItem] = []
    checked: dict[str, Source] = {}
    not_checked: dict[str, str] = {}
    for task in plan.tasks.values():
        if task.scoring is None or (task.generate and task.name not in used and _word_of(task) is None):
            continue
        for name in task.scoring.sets:
            if task.generate and task.name not in used and not has_words:
                not_checked[name] = "the recipe has no rows about words"
                continue
            try:
                with hub.nothing_fetched():
                    source = resolve(scored_entry(task, name), task, locations)
                items += _items_of(task, name, source)
            except MissingSource:
                not_checked[name] = "not at hand"
            except ChatdataError as error:
                not_checked[name] = str(error)
            else:
                checked[name] = source
    return items, checked, not_checked


def _items_of(task: Task, name: str, source: Source) -> list[ScoredItem]:
    assert task.scoring is not None
    entry, word_of = scored_entry(task, name), task.scoring.word
    label = entry.label
    num_rows = source.num_rows if task.generate is None else (entry.rows or 0)
    items = []
    for number, row in source.read(np.ones(num_rows, dtype=bool)):
        conversation = call_task(task, task.to_conversation, row)
        if type(conversation) is not dict:  # the common form is what tasks mostly make
            conversation = parse_conversation(conversation)
        messages = conversation["messages"]
        question = "\n".join(str(message["content"]) for message in messages if message["role"] == "user")
        letters = call_task(task, task.scoring.letters, row) if task.scoring.letters else ()
        word = call_task(task, word_of, row) if word_of else None
        items.append(ScoredItem(name, f"{label} row {number}", question_and_choices(question, letters), word))
    return items


def _find(
    tokenizer: Tokenizer, scored: Scored, store: Documents, wanted: np.ndarray, threads: Executor
) -> Iterator[Hit]:
    """Hits of questions among the `wanted` documents (bool)."""
    texts: dict[int, str] = {}
    for document, number, _ in _candidates(scored.table, scored.index, store, wanted, threads):
        item, text = scored.items[number], texts.get(document)
        if text is None:
            texts.clear()  # candidates come by document
            text = texts[document] = _normalised(tokenizer, store, document)
        if _holds(text, item.parts):
            yield Hit(document, item, "exact", 1.0)
        elif (share := ngram_share(text, normalise(item.parts[0]))) >= MIN_SHARE:
            yield Hit(document, item, "n-gram", round(share, 3))


def _candidates(
    table: WordTable, index: Index, store: Documents, wanted: np.ndarray, threads: Executor
) -> Iterator[tuple[int, int, float]]:
    """(document, text, share) worth a closer look, documents ascending."""
    if not index.ngrams or not wanted.any():
        return

    def find(place: tuple[int, Columns]) -> tuple[np.ndarray, ...]:
        first, block = place
        part = slice(first, first + len(block.num_tokens))
        kept = np.where(wanted[part], store.num_tokens[part], 0)
        documents, numbers, shares = find_texts(index, table, block.tokens, block.num_tokens, kept)
        close = shares >= LOOK_SHARE
        return documents[close] + first, numbers[close], shares[close]

    blocks = [(first, block) for first, block in store.blocks() if wanted[first : first + len(block.num_tokens)].any()]
    for columns in threads.map(find, blocks):  # NumPy's loops leave Python's lock alone
        yield from zip(*(column.tolist() for column in columns), strict=True)


def _normalised(tokenizer: Tokenizer, store: Documents, document: int) -> str:
    text = tokenizer.decode(store.gather(np.array([document]))[0].tolist())
    for name in tokenizer.special_ids:
        text = text.replace(name, " ")
    return f" {normalise(text)} "


def _holds(text: str, parts: tuple[str, ...]) -> bool:
    """Whether a normalised text has the question in one run, and close behind it all choices in any order."""
    question, *choices = (f" {normalise(part)} " for part in parts)
    if len("".join((question, *choices)).split()) < MIN_EXACT_WORDS and choices:
        return False
    reach = 2 * (len(question) + sum(map(len, choices))) + 100  # letters and signs of the choices, a few words between
    start = text.find(question)
    while start >= 0:
        behind = text[start + len(question) - 1 : start + reach]
        if all(choice in behind for choice in choices if choice.strip()):
            return True
        start = text.find(question, start + 1)
    return False


def ngram_share(text: str, question: str) -> float:
    """Share of the distinct n-grams of a normalised question that a normalised text has; 0 under MIN_WORDS words."""
    words = question.split()
    if len(words) < MIN_WORDS:
        return 0.0
    ngrams = {" ".join(words[i : i + NUM_WORDS]) for i in range(len(words) - NUM_WORDS + 1)}
    return sum(f" {ngram} " in text for ngram in ngrams) / len(ngrams)


def _word_of(task: Task) -> Any:
    return task.scoring.word if task.scoring else None


def _find_words(
    scored: Scored, store: Documents, row_maps: Mapping[Source, RowMap], wanted: np.ndarray, threads: Executor
) -> Iterator[Hit]:
    """Documents of tasks about words whose word is scored. Rows that hold such a word anywhere are read again."""
    words: dict[str, list[ScoredItem]] = {}
    for item in scored.items:
        if item.word is not None:
            words.setdefault(normalise(item.word), []).append(item)
    candidates = np.zeros(len(wanted), dtype=bool)
    for document, _, share in _candidates(scored.table, index_texts(list(words)), store, wanted, threads):
        candidates[document] |= share == 1
    for source, row_map in row_maps.items():
        rows = (row_map.document_of >= 0) & candidates[row_map.document_of]
        if rows.any():
            for row, raw in source.read(rows):
                word = call_task(source.task, _word_of(source.task), raw)
                for item in words.get(normalise(word), ()):
                    yield Hit(int(row_map.document_of[row]), item, "word", 1.0)


def summary(findings: Findings) -> dict[str, Any]:
    """For report.json: hits (training rows) by task and scored set, flagged items by set, what was not checked."""
    rows: dict[str, dict[str, set[int]]] = {}
    for hit in findings.hits:
        rows.setdefault(findings.places[hit.document]["task"], {}).setdefault(hit.item.set, set()).add(hit.document)
    flagged = {name: len({h.item.item for h in findings.hits if h.item.set == name}) for name in findings.checked}
    return {
        "checked": {name: {"items": n, "flagged": flagged[name]} for name, n in findings.num_items.items()},
        "not_checked": dict(findings.not_checked),
        "rows": {task: {name: len(documents) for name, documents in sets.items()} for task, sets in rows.items()},
        "flagged_rows": len(findings.documents),
        "cpu_s": round(findings.cpu_s, 3),
    }


def listing(findings: Findings, build_id: str) -> dict[str, Any]:
    """For `<OUT>-firewall.json`: every flagged item with its training rows, and which sets were checked."""
    items: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for hit in findings.hits:
        rows = items.setdefault((hit.item.set, hit.item.item), [])
        rows.append({**findings.places[hit.document], "method": hit.method, "share": hit.share})
    return {
        "format": FIREWALL_FORMAT,
        "version": VERSION,
        "build_id": build_id,
        "checked": {
            name: {"items": findings.num_items[name], "source": source.describe()}
            for name, source in findings.checked.items()
        },
        "not_checked": dict(findings.not_checked),
        "items": [{"set": name, "item": item, "rows": rows} for (name, item), rows in sorted(items.items())],
    }


def _places(documents: set[int], row_maps: Mapping[Source, RowMap]) -> dict[int, dict[str, Any]]:
    places = {}
    for source, row_map in row_maps.items():
        for row in np.flatnonzero(np.isin(row_map.document_of, list(documents))).tolist():
            name, row_in_file = next(((file.name, begin) for file, begin, _ in source.files_of(row, 1)), (None, row))
            place = {"task": source.task.name, "source": source.name, "file": name, "row": row_in_file}
            places[int(row_map.document_of[row])] = place
    return places
