"""HumanEval: Python functions to complete. Scored only, never trained on.

https://huggingface.co/datasets/openai/openai_humaneval (MIT). A row:

    {"task_id": "Demo/0", "prompt": "def double(x):\\n    \\"\\"\\"Twice x.\\"\\"\\"\\n", "entry_point": "double",
     "canonical_solution": "    return 2 * x\\n", "test": "def check(candidate):\\n    assert candidate(2) == 4\\n"}
"""

from __future__ import annotations

import re
from typing import Any

from chatdata.tasks.task import ScoredSet, Scoring, Task

_FENCED = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n?```", re.DOTALL)


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    solution = f"{row['prompt']}\n{row['canonical_solution']}"
    return {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": solution}]}


def program(row: dict[str, Any], text: str) -> str:
    """The answer's code (its first fenced block, else all of it) with the prompt's imports before and the tests after.

    Rule: karpathy/nanochat@790f3be:tasks/humaneval.py.
    """
    fenced = _FENCED.search(text)
    imports = [line for line in row["prompt"].splitlines() if line.startswith(("import ", "from "))]
    code = fenced.group(1) if fenced else text
    return "\n".join([*imports, code.strip("\n"), row["test"], f"check({row['entry_point']})", ""])


TASK = Task(
    name="humaneval",
    summary="Python functions to complete (scored only)",
    licence="MIT",
    hub="openai/openai_humaneval",
    splits={"openai_humaneval": {"test": 164}},
    permuted=True,
    scored_only=True,
    scoring=Scoring(sets={"humaneval": ScoredSet(subset="openai_humaneval")}, program=program),
    to_conversation=to_conversation,
)
