"""Demo multiple choice: simple facts of our own, the choices in a new order in every row.

A row: {"question": "What colour is a ripe banana?", "choices": ["blue", "yellow", "black", "red"], "answer": 1}
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatdata.tasks.mmlu import LETTERS, to_conversation
from chatdata.tasks.task import ScoredSet, Scoring, Task
from chatdata.tasks.words import drawn

FACTS = Path(__file__).parent / "texts" / "choice_facts.jsonl"


def generate(split: str, options: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    return drawn(split, _make_row, [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()])


def _make_row(draw: random.Random, facts: list[dict[str, Any]]) -> dict[str, Any]:
    fact = draw.choice(facts)
    choices = [fact["correct"], *fact["wrong"]]
    draw.shuffle(choices)
    return {"question": fact["question"], "choices": choices, "answer": choices.index(fact["correct"])}


TASK = Task(
    name="demo_choice",
    summary="demo: multiple choice over simple facts (generated)",
    licence="MIT",
    splits={"": {"train": 0, "test": 0}},
    generate=generate,
    scoring=Scoring(sets={"demo_choice": ScoredSet(chance=0.25, rows=200)}, letters=lambda row: LETTERS),
    to_conversation=to_conversation,
)
