"""GSM8K: grade-school word problems whose answers carry calculator calls, rendered as tool parts.

https://huggingface.co/datasets/openai/gsm8k (MIT). A row:

    {"question": "A pen costs 3 dollars. How much do 4 pens cost?",
     "answer": "They cost 3*4=<<3*4=12>>12 dollars.\\n#### 12"}

The annotation `<<3*4=12>>` becomes a `python` part "3*4" and a `python_output` part "12"; all other text stays
verbatim, empty strings included. Rule: karpathy/nanochat@790f3be:tasks/gsm8k.py.
"""

import re
from typing import Any

from chatdata.grading import Grade, final_number, grade_number
from chatdata.tasks.task import ScoredSet, Scoring, Task, one_turn

_ANNOTATION = re.compile(r"<<([^>]+)>>")


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    return one_turn(row["question"], answer_parts(row["answer"]))


def answer_parts(answer: str) -> list[dict[str, str]]:
    """Parts of an annotated answer: text at even places, the inside of `<<…>>` at odd ones."""
    parts = []
    for i, piece in enumerate(_ANNOTATION.split(answer)):
        if i % 2 == 0:
            parts.append({"type": "text", "text": piece})
            continue
        # at the last "=", because an expression may contain one; without any the output is empty
        expression, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
        parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    return parts


def grade(row: dict[str, Any], text: str) -> Grade:
    return grade_number(text, final_number(row["answer"]))


TASK = Task(
    name="gsm8k",
    summary="word problems with calculator calls",
    licence="MIT",
    hub="openai/gsm8k",
    splits={"main": {"train": 7_473, "test": 1_319}, "socratic": {"train": 7_473, "test": 1_319}},
    permuted=True,
    scoring=Scoring(sets={"gsm8k": ScoredSet(subset="main")}, grade=grade),
    to_conversation=to_conversation,
)
