"""items.jsonl: one line of JSON per item and draw, appended as answers arrive.

While a run is at work the lines are in any order, and further ranks write their own files: items-00001.jsonl, ... At
the end ask/run.py puts all lines, unchanged, into items.jsonl in the tasks' order.
"""

import fcntl
import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any

from msgspec import Meta, Struct

from chatdata.disk import Count, convert, json_lines, shown
from chatdata.grading import same_answer
from chatdata.tasks.task import load_tasks
from chateval.errors import ResultsError

ITEMS_NAME = "items.jsonl"
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max, description="a finite number")]


class Item(Struct, frozen=True):
    """One answer: a line of items.jsonl. Identified by (task, item, draw)."""

    task: str
    item: str  # unique within the task: "mmlu all test row 812"
    subject: str | None
    draw: Count  # 0 ... draws - 1
    prompt_sha256: str
    output: str
    extracted: str | None
    gold: str
    correct: bool
    ending: str  # why generation ended: "letter", "assistant_end", "max_tokens", ...; for code, how the program ended
    num_prompt_tokens: Count
    num_tokens: Count  # generated
    gold_nats: Finite | None  # negative log likelihood of the gold answer
    gold_bytes: Count | None  # its length in UTF-8
    tie: bool | None = None  # categorical: several letters shared the best logit
    margin: Finite | None = None  # categorical: best letter logit - second best
    letter_mass: Finite | None = None  # categorical: probability of all letters together
    flexible_extracted: str | None = None  # generative: the last number anywhere
    flexible_correct: bool | None = None
    tool_calls: Count | None = None
    tool_failures: Count | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.item, self.draw


def open_items(path: Path) -> IO[str]:
    """Open an items file for appending. A last line without a newline, left by kill -9, is cut off first.

    The file is locked until it is closed. Raises ResultsError if another run has it open.
    """
    file = path.open("a", encoding="utf-8", newline="\n")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ResultsError(f"{path}: another run is writing there; use another --out") from None
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return file


def append_item(file: IO[str], item: Mapping[str, Any]) -> None:
    """Write an item's line and flush it, so that a killed run loses no earlier item. Fields Item lacks are kept.

    Raises ResultsError, before anything is written, for an item that could not be read back.
    """
    _checked(item, f"{item.get('task')} item {item.get('item')!r}")
    file.write(json.dumps(item) + "\n")
    file.flush()


def read_items(out: Path) -> list[Item]:
    """Read every items*.jsonl of a results folder, files by name, lines in their order.

    An unfinished last line (no newline) is ignored. The same item twice counts once.
    Raises ResultsError, naming file and line, for a damaged line, for a grade that its answer does not have, and for
    two differing lines of one (task, item, draw).
    """
    found: dict[tuple[str, str, int], tuple[Item, str]] = {}
    for path in sorted(out.glob("items*.jsonl")):
        for where, value in json_lines(path, ResultsError):
            item, place = _checked(value, where), Path(where).name
            first, first_place = found.setdefault(item.key, (item, place))
            if first != item:
                name = f"{item.task} item {item.item!r} draw {item.draw}"
                raise ResultsError(f"{out}: {first_place} and {place} are both {name}, and differ")
    return [item for item, _ in found.values()]


def _checked(value: Any, where: str) -> Item:
    """An item of plain data, graded again. Raises ResultsError."""
    item = convert(value, Item, where, ResultsError)
    if item.letter_mass is not None:
        again = {"correct": item.extracted == item.gold}
    elif item.flexible_correct is not None:
        again = {"correct": _again(item, item.correct, item.extracted, item.gold)}
        flexible_gold = item.gold.rpartition(":")[2]  # of cat:c,a,t the letters
        again["flexible_correct"] = _again(item, item.flexible_correct, item.flexible_extracted, flexible_gold)
    else:
        again = {"correct": item.ending.rpartition(", ")[2] == "passed"}
    for key, right in again.items():
        if getattr(item, key) is not right:
            answer = f"gold is {shown(item.gold)}, extracted {shown(item.extracted)} and ending {shown(item.ending)}"
            grade = f'{where}, key "{key}": is {json.dumps(not right)}'
            raise ResultsError(f"{grade}, but {answer}; delete the line and run again")
    return item


def _again(item: Item, graded: bool, extracted: str | None, gold: str) -> bool:
    """The grade of an extracted answer. How a task of your own compares other texts than `gold` is its own matter."""
    if item.task in _own_sets() or extracted in (None, gold):
        return same_answer(extracted, gold)
    return graded


@cache
def _own_sets() -> frozenset[str]:
    """The sets that shipped tasks are scored on."""
    return frozenset(name for task in load_tasks().values() if task.scoring for name in task.scoring.sets)
