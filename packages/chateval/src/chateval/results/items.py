"""Items of a results folder: one line of JSON per item and draw, appended as they are answered.

Until a run is done lines stand in any order, and further ranks write files of their own: items-00001.jsonl, ... Then
run.py puts all of them, unchanged, into items.jsonl in the tasks' order.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import IO, Any, get_args, get_type_hints

from chateval.errors import ResultsError

ITEMS_NAME = "items.jsonl"


@dataclass(frozen=True, slots=True)
class Item:
    """One answer: a line of items.jsonl. Identified by (task, item, draw)."""

    task: str
    item: str  # unique within the task: "mmlu all test row 812"
    subject: str | None
    draw: int  # 0 ... draws - 1
    prompt_sha256: str
    output: str
    extracted: str | None
    gold: str
    correct: bool
    ending: str  # why generation ended: "letter", "assistant_end", "max_tokens", ...; for code what running it gave
    num_prompt_tokens: int
    num_tokens: int  # generated
    gold_nats: float | None  # negative log likelihood of the gold answer
    gold_bytes: int | None  # its length in UTF-8
    tie: bool | None = None  # categorical: several letters shared the best logit
    margin: float | None = None  # categorical: best letter logit - second best
    letter_mass: float | None = None  # categorical: probability of all letters together
    flexible_extracted: str | None = None  # generative: the last number, whatever stands around it
    flexible_correct: bool | None = None
    tool_calls: int | None = None
    tool_failures: int | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.item, self.draw


ITEM_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Item).items()}
REQUIRED = {field.name for field in fields(Item) if field.default is MISSING}


def parse_item(record: Any) -> Item:
    """Check one line's fields; fields that Item does not know are passed over. Raises ResultsError naming the field."""
    if not isinstance(record, dict):
        raise ResultsError(f"an item is an object, not {type(record).__name__}")
    for name, types in ITEM_TYPES.items():
        value = record.get(name)
        if name not in record and name in REQUIRED:
            raise ResultsError(f"no field {name!r}")
        if name in record and type(value) not in types and not (type(value) is int and float in types):
            wanted = " or ".join(kind.__name__.replace("NoneType", "null") for kind in types)
            raise ResultsError(f"{name} is {value!r}: it must be {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ResultsError(f"{name} is {value}: it must be a finite number")
    return Item(**{name: record[name] for name in ITEM_TYPES if name in record})


def open_items(path: Path) -> IO[str]:
    """Open an items file for appending. A last line without its newline, as kill -9 leaves it, is cut off first.

    The file is locked until it is closed: raises ResultsError when another run has it open.
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
    """Write an item's line and hand it to the system at once, so that a killed run loses no earlier item.

    Raises ResultsError for an item that could not be read back, before anything is written.
    """
    try:
        parse_item(dict(item))
    except ResultsError as error:
        raise ResultsError(f"{item.get('task')} item {item.get('item')!r}: {error}") from None
    file.write(json.dumps(dict(item)) + "\n")
    file.flush()


def read_items(out: Path) -> list[Item]:
    """Read every items*.jsonl of a results folder, files by name, lines in their order.

    An unfinished last line (no newline) is no item yet. The same item twice counts once.
    Raises ResultsError, naming file and line, for a damaged line and for two differing lines of one (task, item, draw).
    """
    found: dict[tuple[str, str, int], tuple[Item, str]] = {}
    for path in sorted(out.glob("items*.jsonl")):
        *lines, _unfinished = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            place = f"{path.name} line {number}"
            try:
                item = parse_item(json.loads(line))
            except ResultsError as error:
                raise ResultsError(f"{path} line {number}: {error}") from None
            except ValueError as error:
                raise ResultsError(f"{path} line {number}: damaged, not JSON: {error}") from None
            first, where = found.setdefault(item.key, (item, place))
            if first != item:
                raise ResultsError(
                    f"{out}: {where} and {place} are both {item.task} item {item.item!r} draw {item.draw}, and differ"
                )
    return [item for item, _ in found.values()]
