"""`chatdata build FILES…`: the equivalent recipe, and the form of each file's rows."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.errors import UsageError
from chatdata.recipe import Recipe, parse_recipe
from chatdata.records import MESSAGE_KEYS
from chatdata.sources.source import Source
from chatdata.tasks.task import Task

FORMS = (  # name, keys of a row; the first that has all of them
    ("xLAM", ("query", "tools", "answers")),
    ("Alpaca", ("instruction", "output")),
    ("Dolly", ("instruction", "response")),
    *(("prompt/completion", ("prompt", key)) for key in ("completion", "response")),
    *(("question/answer", (q, a)) for q in ("question", "query") for a in ("answer", "response", "answers")),
    ("plain text", ("text",)),
)


def equivalent_recipe(
    files: Sequence[Path], write: Path | None, stage: str, val_share: float | None, tasks: dict[str, Task], **rules: Any
) -> tuple[Recipe, str]:
    """The recipe equivalent to FILEs, parsed and as TOML, for the file `write`. Raises UsageError if that exists."""
    if write and write.exists():
        raise UsageError(f"--write-recipe {write}: already exists; choose another name")
    if write and not write.parent.is_dir():
        raise UsageError(f"--write-recipe {write}: there is no folder {write.parent}")
    path = write or Path(f"{files[0].stem if len(files) == 1 else 'own'}.toml")
    given = {key: value for key, value in rules.items() if value is not None}
    table = recipe_of_files(files, path.parent, stage, val_share) | given
    return parse_recipe(table, "the command line", path, tasks), toml_of(table)


def recipe_of_files(files: Sequence[Path], folder: Path, stage: str, val_share: float | None) -> dict[str, Any]:
    """A recipe in `folder` with an entry per file, as `parse_recipe` takes it. Raises UsageError for a file twice."""
    places = [os.path.realpath(file) for file in files]
    if twice := next((file for i, file in enumerate(files) if places[i] in places[:i]), None):
        raise UsageError(f"{twice}: the same file twice; for two epochs set epochs = 2 in a recipe (--write-recipe)")
    stems = Counter(file.stem for file in files)
    entries = []
    for file in files:
        path = Path(os.path.relpath(file, folder)).as_posix()
        name = file.stem if file.stem and stems[file.stem] == 1 else path
        entry = {"name": name, "task": "text" if stage == "base" else "conversations", "path": path}
        entries.append(entry | ({"val_share": val_share} if val_share is not None else {}))
    return {"stage": stage, "train": entries}


def toml_of(recipe: dict[str, Any]) -> str:
    """A recipe of numbers, texts and entries as TOML."""
    values = {key: value for key, value in recipe.items() if key != "train"}
    blocks = [("", values), *(("\n[[train]]\n", entry) for entry in recipe["train"])]
    return "".join(head + "".join(f"{key} = {_toml(value)}\n" for key, value in of.items()) for head, of in blocks)


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def form_of(source: Source) -> str:
    """The form of a source's first row, in words."""
    _, rows = next(source.read_batches(0, np.ones(1, dtype=bool)))
    row = rows[0] if isinstance(rows, list) else rows.to_pylist()[0]
    if isinstance(row, list):
        return "a list of messages"
    keys = {key for key, value in row.items() if value is not None} if isinstance(row, dict) else set()
    for key in MESSAGE_KEYS:
        if key in keys:
            first = next(iter(row[key]), None) if isinstance(row[key], list) else None
            return "ShareGPT" if isinstance(first, dict) and "from" in first else "OpenAI messages"
    return next((name for name, needed in FORMS if keys.issuperset(needed)), "unknown")
