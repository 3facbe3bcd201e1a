"""Multiple choice: the answer is the letter with the highest logit right after the prompt.

Only the hidden state at each prompt's last position goes through the head, in fp32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from chateval.ask.questions import Question
from chateval.ask.subject import Subject, prompt_logits
from chateval.errors import ScoringError


class Choice(NamedTuple):
    """The answer to one question."""

    letter: str
    tie: bool  # another letter had the same logit; the first is taken
    margin: float  # best letter's logit − the next one's
    letter_mass: float  # probability of all letters together: how well the model follows the form
    gold_nats: float  # −log probability of the right letter
    num_prompt_tokens: int


def letter_ids(subject: Subject, letters: Sequence[str]) -> list[int]:
    """The token of each letter. Raises ScoringError for a letter of several tokens, which has no single logit."""
    ids = [subject.tokenizer.encode_ordinary(letter) for letter in letters]
    for letter, tokens in zip(letters, ids, strict=True):
        if len(tokens) != 1:
            raise ScoringError(f"the tokenizer splits the letter {letter!r} into {len(tokens)} tokens; it must be one")
    return [tokens[0] for tokens in ids]


def choose_letters(subject: Subject, questions: Sequence[Question]) -> list[Choice]:
    """Answer one batch."""
    logits = prompt_logits(subject, [question.prompt for question in questions]).cpu()
    totals = logits.double().logsumexp(-1).tolist()
    choices = []
    for i, question in enumerate(questions):
        values = logits[i, letter_ids(subject, question.letters)].tolist()
        best, second = sorted(values, reverse=True)[:2]
        letter = question.letters[values.index(best)]  # the first of equal ones
        letter_mass = sum(math.exp(value - totals[i]) for value in values)
        gold_nats = totals[i] - values[question.letters.index(question.gold)]
        choices.append(Choice(letter, best == second, best - second, letter_mass, gold_nats, len(question.prompt)))
    return choices
