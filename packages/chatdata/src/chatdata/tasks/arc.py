"""ARC: grade-school science questions, 3 to 5 choices under the row's own labels (A–E or 1–5).

https://huggingface.co/datasets/allenai/ai2_arc (CC BY-SA 4.0). A row:

    {"id": "demo_1", "question": "Which of these melts in the sun?",
     "choices": {"text": ["a stone", "ice", "a spoon"], "label": ["A", "B", "C"]}, "answerKey": "B"}
"""

from typing import Any

from chatdata.tasks.multiple_choice import multiple_choice
from chatdata.tasks.task import ScoredSet, Scoring, Task


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    return multiple_choice(row["question"], choices["text"], choices["label"], row["answerKey"])


TASK = Task(
    name="arc",
    summary="multiple-choice grade-school science",
    licence="CC-BY-SA-4.0",
    hub="allenai/ai2_arc",
    splits={
        "ARC-Easy": {"train": 2_251, "validation": 570, "test": 2_376},
        "ARC-Challenge": {"train": 1_119, "validation": 299, "test": 1_172},
    },
    permuted=True,
    scoring=Scoring(
        sets={
            "arc_easy": ScoredSet(subset="ARC-Easy", chance=0.25),
            "arc_challenge": ScoredSet(subset="ARC-Challenge", chance=0.25),
        },
        letters=lambda row: row["choices"]["label"],
    ),
    to_conversation=to_conversation,
)
