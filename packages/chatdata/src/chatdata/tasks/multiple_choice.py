"""How a multiple-choice question is asked and answered, for every task that has them.

The letter stands directly behind `=`, with no space: so it is the same token there and in the answer.
Prompt: karpathy/nanochat@790f3be:tasks/common.py (render_mc).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatdata.errors import TaskError


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict[str, Any]:
    """The conversation for one question. `answer` must be one of `letters`; raises TaskError if it is not."""
    if len(choices) != len(letters):
        raise TaskError(f'key "choices": {len(choices)} texts but {len(letters)} labels')
    if answer not in letters:
        raise TaskError(f'key "answer": {answer!r} is not one of its choices {", ".join(letters)}')
    options = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    prompt = f"Multiple Choice question: {question}\n{options}\nRespond only with the letter of the correct answer."
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
