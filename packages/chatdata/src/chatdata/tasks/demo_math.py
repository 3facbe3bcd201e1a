"""Demo word problems in GSM8K's form, generated from our own templates.

A row: {"question": "Ada has 12 shells and finds 30 more. How many shells does Ada have now?",
        "answer": "Ada now has 12+30 = <<12+30=42>>42 shells.\\n#### 42"}

The first two numbers decide whether a problem is train or test (one pair in ten is test), so the sum of a scored
problem is never trained on.
"""

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatdata.calculator import calculate
from chatdata.tasks.gsm8k import grade, to_conversation
from chatdata.tasks.task import ScoredSet, Scoring, Task
from chatdata.tasks.words import drawn, is_test_word

TEXTS = Path(__file__).parent / "texts"
FILES = ("math_templates.txt", "names.txt", "items.txt")
_OPERATION = re.compile(r"<<(\{\w\}[-+*]\{\w\})=\{(\w)\}>>")


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], dict[str, str]]:
    templates, *values = ((TEXTS / name).read_text(encoding="utf-8").splitlines() for name in FILES)
    return drawn(split, _make_row, split == "test", [line.split("\t") for line in templates], *values)


def _make_row(
    draw: random.Random, is_test: bool, templates: list[list[str]], names: list[str], items: list[str]
) -> dict[str, str]:
    question, answer = draw.choice(templates)
    values: dict[str, Any] = {"name": draw.choice(names), "item": draw.choice(items)}
    while True:
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        if "{a}-{b}" in answer and a <= b:
            a, b = max(a, b) + 1, min(a, b)
        if is_test_pair(a, b) == is_test:
            break
    values |= {"a": a, "b": b, "c": draw.randint(2, 9)}
    for call, result in _OPERATION.findall(answer):
        values[result] = calculate(call.format(**values))
    question, answer = (text.format(**values).replace("\\n", "\n") for text in (question, answer))
    return {"question": question, "answer": answer}


def is_test_pair(a: int, b: int) -> bool:
    return is_test_word(f"{a},{b}")


TASK = Task(
    name="demo_math",
    summary="demo: word problems with calculator calls (generated)",
    licence="MIT",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    scoring=Scoring(sets={"demo_math": ScoredSet(rows=200)}, grade=grade),
    to_conversation=to_conversation,
)
