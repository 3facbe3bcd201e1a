"""Compare a generated answer with the row's own. The task files grade their rows with it.

Two readings are always kept. Strict: the number after `####`, the form the training data teaches. Flexible: the last
number of the text. A missing answer equals nothing, not even a missing gold answer.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

# 1,234.5 · -7 · .5 · $40: the sign of a number, not of a subtraction like 10-3
_NUMBER = r"(?<![\w.])-?\$?-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# 3/4, 1e5 and 10-3 are not the numbers 3, 1 and 10
_FINAL = re.compile(rf"####\s*({_NUMBER})(?![\d/^*+-]|[eE,.]\d)")
_ANY = re.compile(_NUMBER)


class Grade(NamedTuple):
    """One graded answer: strict (the score) and flexible (stored with it)."""

    gold: str
    extracted: str | None
    correct: bool
    flexible_extracted: str | None
    flexible_correct: bool


def final_number(text: str) -> str | None:
    """The number after the first `####`, as written; None if there is none."""
    found = _FINAL.search(text)
    return found.group(1) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text, as written; None if there is none."""
    found = _ANY.findall(text)
    return found[-1] if found else None


def same_number(a: str | None, b: str | None) -> bool:
    """Whether both are numbers of the same value: "1,000" and "$1000.0" are, None and None are not."""
    values = [_decimal(text) for text in (a, b)]
    return values[0] is not None and values[0] == values[1]


def same_answer(extracted: str | None, gold: str) -> bool:
    """Whether an extracted answer is the gold one: the same text or the same number. A missing answer never is."""
    return extracted is not None and (extracted == gold or same_number(extracted, gold))


def grade_number(text: str, gold: str | None) -> Grade:
    """Grade an answer whose gold is a number."""
    strict, flexible = final_number(text), last_number(text)
    return Grade(gold or "", strict, same_number(strict, gold), flexible, same_number(flexible, gold))


def _decimal(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
