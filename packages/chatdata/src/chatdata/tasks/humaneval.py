"""HumanEval: Python functions to complete. Scored only, never trained on.

https://huggingface.co/datasets/openai/openai_humaneval (MIT). A row:

    {"task_id": "Demo/0", "prompt": "def double(x):\\n    \\"\\"\\"Twice x.\\"\\"\\"\\n", "entry_point": "double",
     "canonical_solution": "    return 2 * x\\n", "test": "def check(candidate):\\n    assert candidate(2) == 4\\n"}
"""

from __future__ import annotations

from typing import Any

from chatdata.tasks import Task


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    solution = f"{row['prompt']}\n{row['canonical_solution']}"
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": solution}]}


TASK = Task(
    name="humaneval",
    summary="Python functions to complete (scored only)",
    licence="MIT",
    hub="openai/openai_humaneval",
    splits={"openai_humaneval": {"test": 164}},
    permuted=True,
    scored_only=True,
    to_conversation=to_conversation,
)
