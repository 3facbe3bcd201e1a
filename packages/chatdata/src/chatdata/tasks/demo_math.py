"""Demo word problems in GSM8K's form, generated from our own templates.

A row: {"question": "Ada has 12 shells and finds 30 more. How many shells does Ada have now?",
        "answer": "Ada now has 12+30 = <<12+30=42>>42 shells.\\n#### 42"}

The first two numbers decide whether a problem is train or test (one pair in ten is test), so the sum of a scored
problem is never trained on.
"""

import hashlib
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatdata.tasks.gsm8k import grade, to_conversation
from chatdata.tasks.task import ScoredSet, Scoring, Task
from chatdata.tasks.words import TEST_SEED_OFFSET

TEXTS = Path(__file__).parent / "texts"
_OPERATION = re.compile(r"<<(\{\w\})([-+*])(\{\w\})=\{(\w)\}>>")


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], dict[str, str]]:
    templates = [line.split("\t") for line in _lines("math_templates.txt")]
    names, items = _lines("names.txt"), _lines("items.txt")
    offset = TEST_SEED_OFFSET if split == "test" else 0

    def make_row(position: int) -> dict[str, str]:
        draw = random.Random(offset + position)
        question, answer = draw.choice(templates)
        values: dict[str, Any] = {"name": draw.choice(names), "item": draw.choice(items)}
        while True:
            a, b = draw.randint(2, 99), draw.randint(2, 99)
            if "{a}-{b}" in answer and a <= b:
                a, b = max(a, b) + 1, min(a, b)
            if is_test_pair(a, b) == (split == "test"):
                break
        values |= {"a": a, "b": b, "c": draw.randint(2, 9)}
        for left, operator, right, result in _OPERATION.findall(answer):
            values[result] = _apply(operator, values[left[1]], values[right[1]])
        return {
            "question": question.format(**values).replace("\\n", "\n"),
            "answer": answer.format(**values).replace("\\n", "\n"),
        }

    return make_row


def is_test_pair(a: int, b: int) -> bool:
    digest = hashlib.blake2b(f"{a},{b}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _lines(name: str) -> list[str]:
    return (TEXTS / name).read_text(encoding="utf-8").splitlines()


TASK = Task(
    name="demo_math",
    summary="demo: word problems with calculator calls (generated)",
    licence="MIT",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    scoring=Scoring(sets={"demo_math": ScoredSet(rows=200)}, grade=grade),
    to_conversation=to_conversation,
)
