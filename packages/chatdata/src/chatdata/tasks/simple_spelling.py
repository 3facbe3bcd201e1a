"""SimpleSpelling: spell one word.

A row is a word, `apple`; the conversation is `Spell the word: apple` → `apple:a,p,p,l,e`.
Draws: karpathy/nanochat@790f3be:tasks/spellingbee.py (SimpleSpelling).
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from chatdata.grading import Grade
from chatdata.tasks.task import Scoring, Task, one_turn
from chatdata.tasks.words import HELD_OUT, WORD_OPTIONS, drawn, shuffled_words, split_words


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], str]:
    path = options["words"]
    words = split_words(shuffled_words(path, path.stat().st_ctime_ns), path, split, options["holdout"])
    return drawn(split, random.Random.choice, words)


def to_conversation(word: str) -> dict[str, Any]:
    return one_turn(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def grade(word: str, text: str) -> Grade:
    """Strict: the whole answer. Flexible: the letters after its last colon, white space aside."""
    gold = f"{word}:{','.join(word)}"
    strict = text.strip() or None
    letters = "".join(text.rpartition(":")[2].split()) if ":" in text else None
    return Grade(gold, strict, strict == gold, letters, letters == ",".join(word))


TASK = Task(
    name="simple_spelling",
    summary="spell a word (generated from a word list)",
    licence="Unlicense",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    scoring=Scoring(sets={"simple_spelling": HELD_OUT}, grade=grade, word=lambda word: word),
    options=WORD_OPTIONS,
    to_conversation=to_conversation,
)
