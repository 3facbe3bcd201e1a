"""Rows that are made: how they are drawn, the word list of both spelling tasks, and what is kept for scoring."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

from chatdata.errors import SourceError
from chatdata.tasks.task import Option, ScoredSet

# dwyl/english-words (Unlicense), the list nanochat spells from
WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"
T = TypeVar("T")
TEST_SEED_OFFSET = 10_000_000  # test rows draw from seeds no training row reaches

WORD_OPTIONS = {
    "words": Option(str, WORDS_URL, is_file=True),
    "words_sha256": Option(str),
    "holdout": Option(bool, False),
}
# as many rows as karpathy/nanochat@790f3be:scripts/chat_eval.py scores
HELD_OUT = ScoredSet(rows=256, options={"holdout": True})


def drawn(split: str, make_row: Callable[..., T], *given: Any) -> Callable[[int], T]:
    """position → make_row(draw, *given), the same draws on every machine. Can be pickled."""
    return partial(_draw, TEST_SEED_OFFSET if split == "test" else 0, make_row, given)


def _draw(offset: int, make_row: Callable[..., T], given: tuple[Any, ...], position: int) -> T:
    return make_row(random.Random(offset + position), *given)


def read_words(path: Path) -> list[str]:
    """Words of a file, one per line, stripped. Raises SourceError for an empty line or an empty file."""
    return list(_read_words(path, path.stat().st_ctime_ns))


@lru_cache(maxsize=1)  # the two spelling tasks read the same 370,000 words, which takes 0.1 s
def _read_words(path: Path, changed_ns: int) -> list[str]:
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path.name}: not UTF-8 at byte {error.start}") from None
    if not words:
        raise SourceError(f"{path.name}: the word list is empty")
    if "" in words:
        raise SourceError(f"{path.name} line {words.index('') + 1}: an empty line in the word list")
    return words


@lru_cache(maxsize=1)  # used to draw the rows and to find the scored ones: 0.3 s
def shuffled_words(path: Path, changed_ns: int) -> tuple[str, ...]:
    """The words in simple_spelling's order. `changed_ns`: the file's st_ctime_ns."""
    words = list(_read_words(path, changed_ns))
    random.Random(42).shuffle(words)
    return tuple(words)


def is_test_word(word: str) -> bool:
    """A word is kept for scoring when the 8-byte BLAKE2b of its UTF-8, little-endian, is 0 modulo 10."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little") % 10 == 0


@lru_cache(maxsize=1)  # used by train, by test and by both spelling tasks: 0.4 s
def _test_words(path: Path, changed_ns: int) -> frozenset[str]:
    return frozenset(word for word in _read_words(path, changed_ns) if is_test_word(word))


def split_words(words: Sequence[str], path: Path, split: str, holdout: bool) -> list[str]:
    """The words a split draws from, in their order: all of them, or with `holdout` only those of train or test.

    Raises SourceError if none is left.
    """
    if not holdout:
        return list(words)
    test_words = _test_words(path, path.stat().st_ctime_ns)
    choose = filter if split == "test" else filterfalse  # C loops: 0.02 s, a comprehension takes 0.13
    if not (kept := list(choose(test_words.__contains__, words))):
        raise SourceError(f"the word list has no {split} word: with holdout = true one word in ten is a test word")
    return kept
