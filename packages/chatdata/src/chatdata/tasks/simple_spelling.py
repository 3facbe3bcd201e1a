"""SimpleSpelling: spell one word.

A row is a word, `apple`; the conversation is `Spell the word: apple` → `apple:a,p,p,l,e`.
Draws: karpathy/nanochat@790f3be:tasks/spellingbee.py (SimpleSpelling).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from chatdata.tasks import Task
from chatdata.tasks.words import TEST_SEED_OFFSET, WORD_OPTIONS, read_words, split_words


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], str]:
    words = read_words(options["words"])
    random.Random(42).shuffle(words)
    words = split_words(words, split, options["holdout"])
    offset = TEST_SEED_OFFSET if split == "test" else 0
    return lambda position: random.Random(offset + position).choice(words)


def to_conversation(word: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Spell the word: {word}"},
            {"role": "assistant", "content": f"{word}:{','.join(word)}"},
        ]
    }


TASK = Task(
    name="simple_spelling",
    summary="spell a word (generated from a word list)",
    licence="Unlicense",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    options=WORD_OPTIONS,
    to_conversation=to_conversation,
)
