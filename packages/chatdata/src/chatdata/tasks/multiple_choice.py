"""How a multiple-choice question is asked and answered, for every task that has them.

The letter follows `=` directly, without a space, so it is the same token there and in the answer.
Prompt: karpathy/nanochat@790f3be:tasks/common.py (render_mc).
"""

from collections.abc import Sequence
from typing import Any

from chatdata.errors import TaskError
from chatdata.tasks.task import one_turn

_START, _END = "Multiple Choice question: ", "\nRespond only with the letter of the correct answer."


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> dict[str, Any]:
    """The conversation for one question. `answer` must be one of `letters`; raises TaskError if it is not."""
    if len(choices) != len(letters):
        raise TaskError(f'key "choices": {len(choices)} texts but {len(letters)} labels')
    if answer not in letters:
        raise TaskError(f'key "answer": {answer!r} is not one of its choices {", ".join(letters)}')
    options = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    return one_turn(f"{_START}{question}\n{options}{_END}", answer)


def question_and_choices(prompt: str, letters: Sequence[str]) -> tuple[str, ...]:
    """(question, *choices) of a prompt made by `multiple_choice` with these letters, (prompt,) of any other."""
    if not letters or not prompt.startswith(_START) or not prompt.endswith(_END):
        return (prompt,)
    question, *options = prompt[len(_START) : -len(_END) - 1].rsplit("\n- ", len(letters))
    endings = [f"={letter}" for letter in letters]
    if len(options) != len(letters) or not all(map(str.endswith, options, endings)):
        return (prompt,)
    return question, *map(str.removesuffix, options, endings)
