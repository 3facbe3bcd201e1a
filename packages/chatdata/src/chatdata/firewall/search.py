"""The firewall between training and scoring: which training documents contain items that chateval scores.

A document contains an item
  exact    if it has all words of the question in one run and, for multiple choice (of at least MIN_EXACT_WORDS words
           in all), all choices close after them: white space, case, punctuation, accents and the order of choices make
           no difference;
  n-gram   if it has at least MIN_SHARE of the n-grams of a question of at least MIN_WORDS words;
  word     if it is a row about a word (spelling) that is scored.
A question in other words or another language is not found, nor an answer without its question.
"""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from chatdata.firewall.ngrams import NUM_WORDS, Index, WordTable, find_texts, index_texts, normalise
from chatdata.firewall.scored import Scored, ScoredItem, word_of
from chatdata.render.batch import RenderedBatch
from chatdata.render.documents import RenderedDocuments, RowMap
from chatdata.sources.find import PlannedEntry
from chatdata.sources.source import Source
from chatdata.tasks.task import call_task

MIN_WORDS, MIN_SHARE = 13, 0.5
LOOK_SHARE = 0.6  # of the n-grams in the index, every fourth one: from here on the text itself is compared
MIN_EXACT_WORDS = 8  # of question and choices: "−4 + (−3)=" with −7, −1, 1 and 7 is in any chat about sums


class Hit(NamedTuple):
    """A training document that contains a scored item. share: of the question's n-grams; 1.0 unless "n-gram"."""

    document: int
    item: ScoredItem
    method: str
    share: float


class Findings(NamedTuple):
    """What was found of the `scored` items.

    places: flagged document → its task, source, file (None: generated, or a dataset), row in that file
    and row in the source, both from 0.
    """

    hits: tuple[Hit, ...]
    places: Mapping[int, Mapping[str, Any]]
    scored: Scored
    cpu_s: float

    @property
    def documents(self) -> np.ndarray:
        """The flagged documents, ascending (int64)."""
        return np.unique(np.array([hit.document for hit in self.hits], dtype=np.int64))


def check(
    train: list[PlannedEntry], scored: Scored, store: RenderedDocuments, row_maps: Mapping[Source, RowMap], workers: int
) -> Findings:
    """Compare the documents of train, as cut to length, with the `scored` items, in `workers` threads."""
    started = time.process_time()
    in_train, about_words = np.zeros((2, len(store.num_tokens)), dtype=bool)
    for planned in train:
        row_map = row_maps[planned.source]
        documents = row_map.document_of[row_map.row_at[planned.task_positions]]
        in_train[documents] = True
        about_words[documents] = word_of(planned.task) is not None
    in_train &= store.drop_reason == 0
    with ThreadPoolExecutor(workers) as threads:
        hits = list(_find(scored, store, in_train & ~about_words, threads))
        hits += _find_words(scored, store, row_maps, in_train & about_words, threads)
    places = _places({hit.document for hit in hits}, row_maps)
    return Findings(tuple(hits), places, scored, scored.cpu_s + time.process_time() - started)


def _find(scored: Scored, store: RenderedDocuments, wanted: np.ndarray, threads: Executor) -> Iterator[Hit]:
    """Hits of questions among the `wanted` documents (bool)."""

    @lru_cache(maxsize=1)  # candidates of one document follow each other
    def text_of(document: int) -> str:
        text = scored.tokenizer.decode(store.gather(np.array([document]))[0].tolist())
        for name in scored.tokenizer.special_ids:
            text = text.replace(name, " ")
        return f" {normalise(text)} "

    for document, number, _ in _candidates(scored.table, scored.index, store, wanted, threads):
        text, item = text_of(document), scored.items[number]
        if _holds(text, item.parts):
            yield Hit(document, item, "exact", 1.0)
        elif (share := ngram_share(text, normalise(item.parts[0]))) >= MIN_SHARE:
            yield Hit(document, item, "n-gram", round(share, 3))


def _candidates(
    table: WordTable, index: Index, store: RenderedDocuments, wanted: np.ndarray, threads: Executor
) -> Iterator[tuple[int, int, float]]:
    """(document, text, share) worth a closer look, documents ascending."""
    if not index.ngrams or not wanted.any():
        return

    def find(place: tuple[int, RenderedBatch]) -> tuple[np.ndarray, ...]:
        first, block = place
        part = slice(first, first + len(block.num_tokens))
        kept = np.where(wanted[part], store.num_tokens[part], 0)
        documents, numbers, shares = find_texts(index, table, block.tokens, block.num_tokens, kept)
        close = shares >= LOOK_SHARE
        return documents[close] + first, numbers[close], shares[close]

    blocks = [(first, block) for first, block in store.blocks() if wanted[first : first + len(block.num_tokens)].any()]
    for columns in threads.map(find, blocks):  # NumPy's loops leave Python's lock alone
        yield from zip(*(column.tolist() for column in columns), strict=True)


def _holds(text: str, parts: tuple[str, ...]) -> bool:
    """Whether a normalised text has the question in one run, and close after it all choices in any order."""
    question, *choices = (f" {normalise(part)} " for part in parts)
    if len("".join((question, *choices)).split()) < MIN_EXACT_WORDS and choices:
        return False
    reach = 2 * (len(question) + sum(map(len, choices))) + 100  # room for signs and a few words
    start = text.find(question)
    while start >= 0:
        following = text[start + len(question) - 1 : start + reach]
        if all(choice in following for choice in choices if choice.strip()):
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


def _find_words(
    scored: Scored, store: RenderedDocuments, row_maps: Mapping[Source, RowMap], wanted: np.ndarray, threads: Executor
) -> Iterator[Hit]:
    """Documents about a scored word. The rows of documents that contain such a word anywhere are read again."""
    words: dict[str, list[ScoredItem]] = {}
    for item in scored.items:
        if item.word is not None:
            words.setdefault(normalise(item.word), []).append(item)
    candidates = np.zeros(len(wanted), dtype=bool)
    for document, _, share in _candidates(scored.table, index_texts(list(words)), store, wanted, threads):
        candidates[document] |= share == 1
    for source, row_map in row_maps.items():
        rows = (row_map.document_of >= 0) & candidates[row_map.document_of]
        for row, raw in source.read(rows):
            word = call_task(source.task, word_of(source.task), raw)
            for item in words.get(normalise(word), ()):
                yield Hit(int(row_map.document_of[row]), item, "word", 1.0)


def _places(documents: set[int], row_maps: Mapping[Source, RowMap]) -> dict[int, dict[str, Any]]:
    places = {}
    for source, row_map in row_maps.items():
        for row in np.flatnonzero(np.isin(row_map.document_of, list(documents))).tolist():
            name, row_in_file = next(((file.name, begin) for file, begin, _ in source.files_of(row, 1)), (None, row))
            place = {"task": source.task.name, "source": source.name, "file": name, "row": row_in_file}
            places[int(row_map.document_of[row])] = place | {"source_row": row}
    return places
