"""run.json: the weights, settings and tasks that the items of a results folder belong to.

OUT/run.json        {"format": "chateval-run", "version": 1, "weights_sha256": ..., "settings": ..., "tasks": ...}
OUT/items.jsonl     one line per item and draw (items.py); while ranks are at work, one file per rank
OUT/results.json    every figure, computed from the two (figures.py)
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, to_builtins

from chatdata.check.diff import ABSENT, differences
from chatdata.disk import Count, Positive, convert, decode, naming, write_whole
from chatdata.firewall.listing import Listing
from chatdata.shards.manifest import Source
from chateval.errors import ResultsError, ScoringError

RUN_NAME = "run.json"


class RunTask(Struct, kw_only=True, omit_defaults=True):
    """A scored task."""

    scoring: Literal["categorical", "generative", "code"]
    chance: Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to below 1")]  # accuracy of guessing
    items: Count  # to be answered
    rows: Count | None = None  # of the source; more than `items` under a limit
    draws: Positive  # answers per item
    source: dict[str, Any]  # name, revision and files, as in a manifest


class Firewall(Struct):
    """What a firewall file says about the scored items."""

    sha256: str  # of the file
    build_id: str
    flagged: dict[str, list[str]]  # checked task → its items that training documents hold


class Run(Struct, omit_defaults=True):
    """run.json."""

    format: Literal["chateval-run"]
    version: Literal[1]
    weights_sha256: str
    checkpoint: str
    step: Count | None
    settings: dict[str, Any]
    tasks: dict[str, RunTask]
    firewall: Firewall | None = None


def write_run(out: Path, run: Run) -> None:
    """Write run.json and make its folder. Raises ResultsError for a run that read_run would refuse."""
    decode(json_bytes(to_builtins(run)), Run, RUN_NAME, ResultsError)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RUN_NAME, to_builtins(run))


def read_run(out: Path) -> Run:
    """Read run.json. Raises ResultsError if it is missing, damaged or of an unknown version."""
    path = out / RUN_NAME
    if not path.is_file():
        raise ResultsError(f"{out}: not a results folder (no {RUN_NAME}); give the --out of a chateval run")
    return decode(path.read_bytes(), Run, str(path), ResultsError)


def require_same_run(out: Path, run: Run, same_weights: bool = True) -> None:
    """Raise ResultsError if `out` already holds items of other settings or tasks, or (`same_weights`) weights.

    A folder without run.json and without items is fine. The checkpoint's label may differ, because the weights decide.
    """
    if not (out / RUN_NAME).exists():
        if any(out.glob("items*.jsonl")):
            raise ResultsError(f"{out}: items without {RUN_NAME}, so of unknown weights; use another --out")
        return
    old = read_run(out)
    if same_weights and old.weights_sha256 != run.weights_sha256:
        had, given = old.weights_sha256[:12], run.weights_sha256[:12]
        raise ResultsError(f"{out}: its items are of weights {had}…, not {given}…; use another --out")
    for part in ("settings", "tasks"):
        if changed := changes(getattr(old, part), getattr(run, part)):
            raise ResultsError(f"{out}: its items are of other {part}: {'; '.join(changed)}; use another --out")


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two values, as text: ["gsm8k.draws is 1, not 4"]."""
    old, new = (json.loads(json_bytes(to_builtins(value))) for value in (old, new))
    found = []
    for key, was, now in differences(old, new, name):
        if was is ABSENT or now is ABSENT:
            found.append(f"{key} is {'added' if was is ABSENT else 'gone'}")
        elif was != now:  # 0 and 0.0 are the same here
            found.append(f"{key} is {json.dumps(was)}, not {json.dumps(now)}")
    return found


def read_firewall(path: Path, tasks: Mapping[str, RunTask]) -> Firewall:
    """The part of a firewall file that concerns `tasks`. Sets that it did not check are missing in `flagged`.

    Raises ScoringError if the file is damaged, checked none of these tasks, or checked other files of one.
    """
    with naming(path):
        data = path.read_bytes()
    listed = decode(data, Listing, str(path), ScoringError)
    common = [name for name in tasks if name in listed.checked]
    if not common:
        raise ScoringError(f"{path}: checked {', '.join(listed.checked) or 'nothing'}, but none of {', '.join(tasks)}")
    for name in common:
        scored = convert(tasks[name].source, Source, f"the source of {name}", ScoringError)
        if _hashes(listed.checked[name].source) != _hashes(scored):
            other = f"its {name} was read from other files than the {name} scored here"
            raise ScoringError(f"{path}: {other}; use one --data-dir")
    flagged = {name: sorted(found.item for found in listed.items if found.set == name) for name in common}
    return Firewall(hashlib.sha256(data).hexdigest(), listed.build_id, flagged)


def _hashes(source: Source) -> list[str]:
    """The files of a source, wherever they came from; a generated task's word lists and phrasings are among them."""
    return sorted(file.sha256 for file in source.files)


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all."""
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Plain data as write_json writes it."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
