"""SpellingBee: how often letter x is in word y; counted by hand, checked with the calculator tool.

A row: {"word": "banana", "letter": "a", "question": "How many times is a in banana?"}

Word and letter are drawn as in karpathy/nanochat@790f3be:tasks/spellingbee.py (the list unshuffled; nine times in ten a
letter of the word, else any letter); phrasings and the answer's wording are our own.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatdata.errors import SourceError
from chatdata.grading import Grade, grade_number
from chatdata.tasks.task import Option, Scoring, Task, one_turn
from chatdata.tasks.words import HELD_OUT, WORD_OPTIONS, drawn, read_words, split_words

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PHRASINGS = Path(__file__).parent / "texts" / "spelling_phrasings.txt"
_QUOTES = ("", "'", '"')


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], dict[str, str]]:
    path = options["words"]
    words = split_words(read_words(path), path, split, options["holdout"])
    if quoted := next((word for word in words if "'" in word or "\\" in word), None):
        raise SourceError(f"{path.name}: the word {quoted!r} cannot be quoted in the call '…'.count('…'); leave it out")
    return drawn(split, _make_row, words, read_phrasings(options["phrasings"]))


def _make_row(draw: random.Random, words: list[str], phrasings: list[str]) -> dict[str, str]:
    word = draw.choice(words)
    letter = draw.choice(word) if draw.random() < 0.9 else draw.choice(ALPHABET)
    phrasing = draw.choice(phrasings)
    letter_quote, word_quote = draw.choice(_QUOTES), draw.choice(_QUOTES)
    question = phrasing.replace("{letter}", f"{letter_quote}{letter}{letter_quote}")
    question = question.replace("{word}", f"{word_quote}{word}{word_quote}")
    return {"word": word, "letter": letter, "question": question}


def read_phrasings(path: Path) -> list[str]:
    """Phrasings, one per line, each with {letter} and {word} once. Raises SourceError naming the first other line."""
    phrasings = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(phrasings, start=1):
        if line.count("{letter}") != 1 or line.count("{word}") != 1:
            raise SourceError(f"{path.name} line {number}: a phrasing needs {{letter}} once and {{word}} once")
    if not phrasings:
        raise SourceError(f"{path.name}: no phrasings")
    return phrasings


def to_conversation(row: dict[str, str]) -> dict[str, Any]:
    word, letter = row["word"], row["letter"]
    lines, count = [], 0
    for i, char in enumerate(word, start=1):
        count += char == letter
        lines.append(f"{i}. {char} → {count}" if char == letter else f"{i}. {char}")
    by_hand = f"{word}:{','.join(word)}\nCounting {letter}:\n" + "\n".join(lines) + f"\nBy hand: {count}. Check: "
    parts = [
        {"type": "text", "text": by_hand},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\nBoth agree.\n#### {count}"},
    ]
    return one_turn(row["question"], parts)


def grade(row: dict[str, str], text: str) -> Grade:
    return grade_number(text, str(row["word"].count(row["letter"])))


TASK = Task(
    name="spelling_bee",
    summary="count a letter in a word, with a tool call (generated from a word list)",
    licence="Unlicense",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    scoring=Scoring(sets={"spelling_bee": HELD_OUT}, grade=grade, word=lambda row: row["word"]),
    options={**WORD_OPTIONS, "phrasings": Option(str, str(PHRASINGS), is_file=True)},
    to_conversation=to_conversation,
)
