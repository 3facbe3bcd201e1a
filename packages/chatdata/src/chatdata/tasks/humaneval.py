"""HumanEval: Python functions to complete. Scored only, never trained on.

https://huggingface.co/datasets/openai/openai_humaneval (MIT). A row:

    {"task_id": "Demo/0", "prompt": "def double(x):\\n    \\"\\"\\"Twice x.\\"\\"\\"\\n", "entry_point": "double",
     "canonical_solution": "    return 2 * x\\n", "test": "def check(candidate):\\n    assert candidate(2) == 4\\n"}
"""

import ast
import re
import warnings
from typing import Any

from chatdata.tasks.task import ScoredSet, Scoring, Task, one_turn

# inline code; a fence at the start of a line, whatever is after it; a fence elsewhere with nothing or "python" after it
_OPENING = re.compile(
    r"`{3,}[^`\n]+`{3,}|^[ \t]*(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$|(?P<inner>```)[^\S\n]*(?:py\w*)?[^\S\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
# Python's strings and comments, in which a fence is text, and fences outside them
_CODE = re.compile(
    r"(\"{3}|'{3})(?:\\.|(?!\1).)*+\1|\"(?:\\.|[^\"\\\n])*+\"|'(?:\\.|[^'\\\n])*+'|#[^\n]*"
    r"|^[ \t]*(?P<fence>`{3,}|~{3,})",
    re.DOTALL | re.MULTILINE,
)
_OF_NANOCHAT = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)
_FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^\n]*)\n?", re.MULTILINE)


def to_conversation(row: dict[str, Any]) -> dict[str, Any]:
    return one_turn(row["prompt"], f"{row['prompt']}\n{row['canonical_solution']}")


def program(row: dict[str, Any], text: str) -> str:
    """The answer's code, after what the prompt defines before the function, and before the tests.

    Whatever passes by the rule of karpathy/nanochat@790f3be:tasks/humaneval.py passes by this one.
    """
    name, prompt = row["entry_point"], row["prompt"].replace("\r\n", "\n")
    start = rf"^(?:@.*\n)*(?:async )?def {re.escape(name)}\b"
    before, *function = re.split(start, prompt, maxsplit=1, flags=re.MULTILINE)
    if not function:
        before = "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))
    parts = [before.strip("\n"), answer_code(text, name)]
    futures = [found.strip() for part in parts for found in _FUTURE.findall(part)]  # must be a program's first lines
    parts = [*futures, *(_FUTURE.sub("", part) for part in parts), row["test"], f"check({name})", ""]
    return "\n".join(part for part in parts[:-1] if part) + "\n"


def answer_code(text: str, name: str) -> str:
    """The first fenced block of Python that defines `name`; else the first one; all of the text if there is none."""
    text = text.replace("\r\n", "\n")
    if not _OF_NANOCHAT.search(text) and _is_program(text, name):
        return text.strip()  # a fence in it is in a string
    python, other, at = list[str](), list[str](), 0
    while opening := _OPENING.search(text, at):
        at = opening.end()
        if fence := opening["fence"] or opening["inner"]:
            end = next((token for token in _CODE.finditer(text, at) if (token["fence"] or "").startswith(fence)), None)
            code = text[at : end.start()] if end else text[at:].rstrip().removesuffix(fence)
            words = (opening["info"] or "").lower().strip(" \t{}.:").split()
            (python if not words or words[0].startswith("py") else other).append(code.strip())
            # a fence with something after it may open the next block
            at = len(text) if not end else end.start() if text[end.end() :].partition("\n")[0].strip() else end.end()
    blocks = (*python, *_OF_NANOCHAT.findall(text)[:1], *other, text)
    candidates = [code for code in blocks if code.strip()] or [""]
    # a fence that is left in the code, outside of its strings, is no Python
    candidates.sort(key=lambda code: any(token["fence"] for token in _CODE.finditer(code)))
    word = re.escape(name)
    names = rf"^\s*(?:async\s+)?(?:def|class)\s+{word}\b|^{word}\s*(?::.*)?=(?!=)|\bimport\b.*\b{word}\b"
    defines = re.compile(names, re.MULTILINE)
    return next((code for code in candidates if defines.search(code)), candidates[0]).strip()


def _is_program(text: str, name: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes such as "\\d"
            body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(getattr(node, "name", None) == name for node in body)


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
