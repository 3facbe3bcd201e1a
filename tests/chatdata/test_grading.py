"""Answers against gold: near misses stay misses, and no answer is never right."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

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


AREA = {
    "prompt": 'import math\n\n\ndef area(r):\n    """Area."""\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert candidate(2) == math.pi * 4\n",
}
BODY = "def area(r):\n    return math.pi * r * r\n"
DOCUMENTED = 'def area(r):\n    """Use:\n    ```\n    area(1)\n    ```\n```python\narea(2)\n```\n    """\n'
DOCUMENTED += "    return math.pi * r * r"


def passes(program: str) -> bool:
    """Whether a program of this file, none of them model-written, ends without an error."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        " " + BODY,
        "\t" + BODY,
        "\r\n" + BODY.replace("\n", "\r\n"),
        f"```python\r\n{BODY}```",
        f"Here:\n```python\n{BODY}```\n".replace("\n", "\r\n"),
        f"```py\n{BODY}```",
        f"``` Python \n{BODY}```",
        f"```PYTHON3\n{BODY}```",
        f"```python3.11\n{BODY}```",
        f"```{{.python}}\n{BODY}```",
        f'```python title="area.py"\n{BODY}```',
        f"````python\n{BODY}````",
        f"~~~python\n{BODY}~~~\nDone.",
        f"```python\n\n\n{BODY}\n\n```",
        f"Sure: ```python\n{BODY}```. Done.",
        f"Sure: ```\n{BODY}\n``` That is all.",
        f"```python\n{BODY}",  # cut before it was closed
        f"```python\n{BODY.rstrip()}```",
        f"  ```python\n{BODY}  ```",
        f"```python\n{DOCUMENTED}\n```\nDone.",
        f"```python\n{BODY}mark = '```'; other = \"\\\"```\"  # don't\n```\nIt's done.",
        f'Run ```pip install x``` and\n```bash\necho "it\'s"\n```\nthen\n```python\n{BODY}```',
        f"Example:\n```python\narea(2)\n```\n\n```python\n{BODY}```",
        f"```text\n{BODY}```",
        f"```python\n{BODY}```python\narea(1)\n```",
        "```python\narea = lambda r: math.pi * r * r\n```\nOr:\n```python\nsquare = 1\n```",
        f"```python\nfrom __future__ import annotations\n{BODY}```",
        f'```python\n"""A file."""\nfrom __future__ import (\n    annotations,\n    division,\n)\n{BODY}```',
    ],
)
def test_right_programs_however_they_are_written(text: str) -> None:
    assert passes(humaneval.program(AREA, text))
    assert not passes(humaneval.program(AREA, text.replace("* r * r", "* r")))


def test_programs_get_what_the_prompt_defines() -> None:
    row = {
        "prompt": "from __future__ import annotations\r\nimport string as s\r\n\r\nSHIFT = 1\r\n\r\n\r\n"
        "def shift(t: Later):\r\n"
        '    return t[SHIFT:] + t[:SHIFT]\r\n\r\n\r\n@staticmethod\r\ndef unshift(t):\r\n    """Undo shift."""\r\n',
        "entry_point": "unshift",
        "test": "def check(candidate):\n    assert candidate(shift('abc')) == 'abc' and s.digits\n",
    }
    assert passes(humaneval.program(row, "```python\ndef unshift(t):\n    return t[-SHIFT:] + t[:-SHIFT]\n```"))
    assert passes(humaneval.program(row, row["prompt"].replace("\r", "") + "    return t[-1:] + t[:-1]"))
    no_function = {
        "prompt": "import math\n# no function\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f() > 3\n",
    }
    assert passes(humaneval.program(no_function, "def f():\n    return math.pi"))


def program_of_nanochat(row: dict, text: str) -> str:
    """karpathy/nanochat@790f3be:tasks/humaneval.py, in other words."""
    found = re.findall(r"```(?:python)?\s*\n(.*?)\n```", text, re.DOTALL)
    return f"import math\n\n{(found[0] if found else text).strip()}\n\n{row['test']}\ncheck({row['entry_point']})"


PARTS = [
    "```",
    "```python",
    "```py",
    "\n",
    "\n",
    "\r\n",
    " ",
    BODY,
    BODY,
    DOCUMENTED,
    "area = math.sqrt\n",
    "# x\n",
    '"""',
    "x",
]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=9).map("".join))
@example(f'{BODY}\n"""```\n{BODY}\n"""')
def test_whatever_passes_by_nanochats_rule_passes(text: str) -> None:
    if passes(program_of_nanochat(AREA, text)):
        assert passes(humaneval.program(AREA, text))


def test_a_task_says_how_it_is_graded_once() -> None:
    with pytest.raises(TaskError, match="exactly one of letters, grade and program"):
        Scoring(sets={"x": ScoredSet()})
    names = [name for task in load_tasks().values() if task.scoring for name in task.scoring.sets]
    assert sorted(names) == sorted(set(names)) and {"mmlu", "arc_easy", "arc_challenge", "humaneval"} <= set(names)
