"""MMLU: 57 subjects, four choices. `auxiliary_train` is for training, `all` for validation and scoring.

https://huggingface.co/datasets/cais/mmlu (MIT). A row of `all`; rows of `auxiliary_train` wrap the same in `train`:

    {"question": "Which planet is closest to the sun?", "subject": "astronomy",
     "choices": ["Venus", "Mercury", "Mars", "Earth"], "answer": 1}
    {"train": {"question": …, "subject": "", "choices": […], "answer": 1}}
"""

from typing import Any

from chatdata.errors import TaskError
from chatdata.tasks.multiple_choice import multiple_choice
from chatdata.tasks.task import ScoredSet, Scoring, Task

LETTERS = ("A", "B", "C", "D")


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    row = row.get("train", row)
    if len(row["choices"]) != 4:
        raise TaskError(f'key "choices": {len(row["choices"])} choices; MMLU has 4')
    answer = row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < 4:
        raise TaskError(f'key "answer": {answer!r} is outside its choices 0 … 3')
    return multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[answer])


TASK = Task(
    name="mmlu",
    summary="multiple choice over 57 subjects",
    licence="MIT",
    hub="cais/mmlu",
    splits={"all": {"test": 14_042, "validation": 1_531, "dev": 285}, "auxiliary_train": {"train": 99_842}},
    permuted=True,
    scoring=Scoring(
        sets={"mmlu": ScoredSet(subset="all", chance=0.25)}, letters=lambda row: LETTERS, subject_key="subject"
    ),
    to_conversation=to_conversation,
)
