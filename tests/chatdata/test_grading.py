"""Answers against gold: near misses stay misses, and no answer is never right."""

from __future__ import annotations

import pytest

from chatdata.errors import TaskError
from chatdata.grading import final_number, last_number, same_number
from chatdata.tasks import ScoredSet, Scoring, demo_math, gsm8k, humaneval, load_tasks, simple_spelling, spelling_bee

ROW = {"question": "?", "answer": "So 2*5=<<2*5=10>>10.\n#### 10"}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,000", "1,000", "1,000"),
        ("####-5.", "-5", "-5"),
        ("It is 3 + 4 = 7", None, "7"),
        ("10-3", None, "3"),
        ("$40 in total", None, "$40"),
        ("#### $-4.50 and 7", "$-4.50", "7"),
        ("#### .5", ".5", ".5"),
        ("#### ten", None, None),
        ("", None, None),
        ("#### 1\n#### 2", "1", "2"),
        ("A4 is paper", None, None),
        ("#### 3/4", None, "4"),
        ("#### 1e5", None, "1"),
        ("#### 10-3", None, "3"),
        ("#### 1,2,3", None, "3"),
        ("#### 12. Done", "12", "12"),
        ("#### 12, he said", "12", "12"),
    ],
)
def test_numbers_are_found(text, strict, flexible) -> None:
    assert (final_number(text), last_number(text)) == (strict, flexible)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("10", "10.0", True),
        ("1,000", "$1000", True),
        ("0.30", ".3", True),
        ("25", "5", False),
        ("5", "25", False),
        ("10", "-10", False),
        (None, None, False),
        (None, "0", False),
        ("--4", "--4", False),
    ],
)
def test_numbers_are_compared_as_decimals(a, b, same) -> None:
    assert same_number(a, b) is same


def test_word_problems() -> None:
    right = gsm8k.grade(ROW, "It is 10.0.\n#### 10.0")
    assert (right.gold, right.extracted, right.correct, right.flexible_correct) == ("10", "10.0", True, True)
    loose = gsm8k.grade(ROW, "It is 10")
    assert (loose.extracted, loose.correct, loose.flexible_extracted, loose.flexible_correct) == (
        None,
        False,
        "10",
        True,
    )
    assert gsm8k.grade({"answer": "no number"}, "no number either").correct is False
    assert demo_math.TASK.scoring.grade is gsm8k.grade


def test_spelling() -> None:
    assert simple_spelling.grade("cat", "cat:c,a,t\n").correct
    for wrong in ("cat:c,a,t.", "cat:c,a", "c,a,t", "", "dog:d,o,g"):
        assert not simple_spelling.grade("cat", wrong).correct
    assert simple_spelling.grade("cat", "Here: c, a, t").flexible_correct
    assert simple_spelling.grade("cat", "").extracted is None
    row = {"word": "banana", "letter": "a", "question": "?"}
    assert spelling_bee.grade(row, "By hand: 2.\nBoth agree.\n#### 3").correct
    assert not spelling_bee.grade(row, "#### 2").correct


def test_programs() -> None:
    row = {"prompt": "import math\n\ndef f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(2) == 4"}
    assert humaneval.program(row, "Sure:\n```python\ndef f(x):\n    return 2 * x\n```\nDone.") == (
        "import math\ndef f(x):\n    return 2 * x\ndef check(f):\n    assert f(2) == 4\ncheck(f)\n"
    )
    assert "def f(x): return x" in humaneval.program(row, "def f(x): return x")


def test_a_task_says_how_it_is_graded_once() -> None:
    with pytest.raises(TaskError, match="exactly one of letters, grade and program"):
        Scoring(sets={"x": ScoredSet()})
    names = [name for task in load_tasks().values() if task.scoring for name in task.scoring.sets]
    assert sorted(names) == sorted(set(names)) and {"mmlu", "arc_easy", "arc_challenge", "humaneval"} <= set(names)
