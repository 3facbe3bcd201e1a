"""Recipes: what goes into a stage, as TOML. Named ones are package data; `--recipe` takes a name or a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from chatdata.errors import ChatdataError, RecipeError, nearest
from chatdata.tasks.task import Task

STAGES = ("base", "mid", "sft")
OVERFLOW = ("keep", "truncate", "drop", "error")
ZERO_SUPERVISED = ("keep", "drop", "error")
MAX_ROWS = 100_000_000  # a row costs about 17 bytes of memory before it is rendered
RECIPE_FOLDERS = (Path(__file__).with_name("recipes"), Path(__file__).with_name("demo"))


@dataclass(frozen=True)
class Entry:
    """One line of the expanded recipe: a task, a split, and the positions taken from it."""

    task: str
    split: str
    subset: str
    start: int | None = None
    stop: int | None = None
    rows: int | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    file_options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.task, self.subset, self.split) if part)


@dataclass(frozen=True)
class Recipe:
    """What goes into a stage, read and checked: docs/recipes.md has the keys."""

    name: str
    stage: str
    seed: int
    max_tokens: int | None
    overflow: str
    zero_supervised: str
    shuffle: Mapping[str, bool]
    splits: Mapping[str, tuple[Entry, ...]]  # "train", and "val" if the recipe has one
    folder: Path  # relative paths start here

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data for the manifest: defaults filled in, epochs expanded, files without folders."""
        return {
            "stage": self.stage,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "overflow": self.overflow,
            "zero_supervised": self.zero_supervised,
            "shuffle": {split: self.shuffle[split] for split in self.splits},
            **{split: [_resolved_entry(entry) for entry in entries] for split, entries in self.splits.items()},
        }


def file_label(path: str) -> str:
    """How a file of a recipe is named in manifest and messages: as written below the recipe's folder, else by name."""
    outside = Path(path).is_absolute() or ".." in Path(path).parts
    return path if "://" in path or not outside else Path(path).name


def _resolved_entry(entry: Entry) -> dict[str, Any]:
    values = {
        key: getattr(entry, key) for key in ("task", "split", "subset", "start", "stop", "rows", "repo", "revision")
    }
    path = {"path": file_label(entry.path)} if entry.path else {}
    options = {key: file_label(value) if key in entry.file_options else value for key, value in entry.options.items()}
    return {**values, **path, **options}


_TOP_KEYS: dict[str, Any] = {
    "stage": str,
    "seed": int,
    "max_tokens": int,
    "overflow": str,
    "zero_supervised": str,
    "shuffle": dict,
    "train": list,
    "val": list,
}
_ENTRY_KEYS: dict[str, Any] = {
    "task": str,
    "split": str,
    "subset": str,
    "rows": int,
    "start": int,
    "stop": int,
    "epochs": int,
    "path": str,
    "repo": str,
    "revision": str,
}


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with chatdata."""
    found = {path.stem: path for folder in RECIPE_FOLDERS for path in folder.glob("*.toml") if path.stem != "persona"}
    return dict(sorted(found.items()))


def load_recipe(name_or_path: str, tasks: Mapping[str, Task]) -> Recipe:
    """Load a named recipe or a file.

    Raises RecipeError naming file, key and the nearest valid name for anything unknown or of the wrong type.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise RecipeError(
            f'no recipe "{name_or_path}" (neither a file nor a name){nearest(name_or_path, list(shipped))}'
        )
    shown = path.name if name_or_path in shipped else str(path)
    return parse_recipe(read_toml(path, shown, RecipeError), shown, path, tasks)


def read_toml(path: Path, shown: str, wrong: type[ChatdataError]) -> dict[str, Any]:
    """The table of a TOML file. Raises `wrong` naming the file as `shown` if it is not TOML in UTF-8."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        raise wrong(f"{shown}: not valid TOML: {error}") from None


def override(recipe: Recipe, *, max_tokens: int | None, overflow: str | None) -> Recipe:
    """The recipe with the command line's `--max-tokens` and `--overflow` in place of its own.

    Raises RecipeError if a limit and a rule do not go together.
    """
    if overflow == "keep" and max_tokens is None:
        return replace(recipe, max_tokens=None, overflow="keep")
    changed = replace(recipe, max_tokens=max_tokens or recipe.max_tokens, overflow=overflow or recipe.overflow)
    _check_overflow(changed.overflow, changed.max_tokens, "command line")
    return changed


def parse_recipe(table: dict[str, Any], shown: str, path: Path, tasks: Mapping[str, Task]) -> Recipe:
    """The recipe of a TOML table. shown: the file's name in messages; path: its place, where relative paths start.

    Raises RecipeError as `load_recipe`.
    """
    check_keys(table, _TOP_KEYS, shown)
    if "stage" not in table:
        raise RecipeError(f'{shown}: no key "stage"; one of {", ".join(STAGES)}')
    for key, valid in (("stage", STAGES), ("overflow", OVERFLOW), ("zero_supervised", ZERO_SUPERVISED)):
        if key in table and table[key] not in valid:
            raise RecipeError(f'{shown}, key "{key}": {table[key]!r}{nearest(str(table[key]), valid)}')
    if "max_tokens" in table and table["max_tokens"] < 2:
        raise RecipeError(f'{shown}, key "max_tokens": {table["max_tokens"]}; a document has at least 2 tokens')
    overflow = table.get("overflow", "keep")
    _check_overflow(overflow, table.get("max_tokens"), shown)
    if table.get("val") == []:
        raise RecipeError(f"{shown}: val is empty; leave it out, or give [[val]] entries")
    if table.get("seed", 0) < 0:
        raise RecipeError(f'{shown}, key "seed": {table["seed"]}; at least 0')
    if not table.get("train"):
        raise RecipeError(f"{shown}: no [[train]] entry")
    splits: dict[str, tuple[Entry, ...]] = {
        split: _parse_entries(table[split], f"{shown}, [[{split}]]", tasks)
        for split in ("train", "val")
        if split in table
    }
    for split, entries in splits.items():
        for entry in entries:
            _check_stage(entry, table["stage"], tasks, f"{shown}, [[{split}]]")
    shuffle = table.get("shuffle", {})
    check_keys(shuffle, dict.fromkeys(splits, bool), f"{shown}, [shuffle]")
    return Recipe(
        name=path.stem,
        stage=table["stage"],
        seed=table.get("seed", 42),
        max_tokens=table.get("max_tokens"),
        overflow=overflow,
        zero_supervised=table.get("zero_supervised", "keep"),
        shuffle={"train": True, "val": True, **shuffle},
        splits=splits,
        folder=path.parent,
    )


def scored_entry(task: Task, name: str) -> Entry:
    """The rows of the task's scored set `name`, as an entry: what chateval asks, and what the firewall looks for."""
    assert task.scoring is not None
    scored = task.scoring.sets[name]
    options = {key: option.default for key, option in task.options.items()} | dict(scored.options)
    files = tuple(key for key, option in task.options.items() if option.is_file)
    return Entry(task.name, scored.split, scored.subset, rows=scored.rows, options=options, file_options=files)


def _parse_entries(tables: list[Any], where: str, tasks: Mapping[str, Task]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for number, table in enumerate(tables, start=1):
        here = f"{where} entry {number}"
        if not isinstance(table, dict) or "task" not in table:
            raise RecipeError(f'{here}: no key "task"')
        check_keys({"task": table["task"]}, _ENTRY_KEYS, here)
        if table["task"] not in tasks:
            raise RecipeError(
                f'{here}, key "task": unknown task "{table["task"]}"{nearest(str(table["task"]), list(tasks))}'
            )
        task = tasks[table["task"]]
        check_keys(table, _ENTRY_KEYS | {key: option.type for key, option in task.options.items()}, here)
        entry = _parse_entry(table, task, here)
        epochs = table.get("epochs", 1)
        if epochs < 1:
            raise RecipeError(f'{here}, key "epochs": {epochs}; at least 1')
        entries.extend([entry] * epochs)
    return tuple(entries)


def _parse_entry(table: dict[str, Any], task: Task, here: str) -> Entry:
    if task.scored_only:
        raise RecipeError(f'{here}: "{task.name}" is only for scoring, never in a build')
    if task.splits and "path" not in table:
        subset = table.get("subset", next(iter(task.splits)))
        if subset not in task.splits:
            raise RecipeError(f'{here}, key "subset": "{subset}"{nearest(subset, list(task.splits))}')
        split = table.get("split", "train")
        if split not in task.splits[subset]:
            raise RecipeError(f'{here}, key "split": "{split}"{nearest(split, list(task.splits[subset]))}')
    else:
        subset, split = table.get("subset", ""), table.get("split", "train")
    if task.generate or "path" in table:
        without_use = ("path", "repo", "revision") if task.generate else ("repo", "revision", "subset", "split")
        idle = [key for key in without_use if key in table]
        if idle:
            source = "is generated" if task.generate else 'reads its "path"'
            raise RecipeError(f'{here}, key "{idle[0]}": does nothing, because "{task.name}" {source}')
    if any(abs(table.get(key, 0)) > MAX_ROWS for key in ("rows", "start", "stop")):
        raise RecipeError(f"{here}: rows, start and stop lie below {MAX_ROWS:,}")
    for key in ("start", "stop"):
        if task.generate and table.get(key, 0) < 0:
            raise RecipeError(f'{here}, key "{key}": {table[key]}; a generated task has no end to count from')
    if table.get("rows", 1) < 1:
        raise RecipeError(f'{here}, key "rows": {table["rows"]}; at least 1')
    if task.generate and "rows" not in table and "stop" not in table:
        raise RecipeError(f'{here}: "{task.name}" is generated and needs the key "rows"')
    for key, option in task.options.items():
        if option.required and key not in table:
            raise RecipeError(f'{here}: "{task.name}" needs the key "{key}"')
    options = {key: table.get(key, option.default) for key, option in task.options.items()}
    common = {key: table.get(key) for key in ("start", "stop", "rows", "path", "repo", "revision")}
    files = tuple(key for key, option in task.options.items() if option.is_file)
    return Entry(task=task.name, split=split, subset=subset, options=options, file_options=files, **common)


def check_keys(
    table: dict[str, Any], types: Mapping[str, Any], where: str, wrong: type[ChatdataError] = RecipeError
) -> None:
    """Raise `wrong` for a key that is not in `types`, naming the nearest one that is, or a value of another type."""
    for key, value in table.items():
        if key not in types:
            raise wrong(f'{where}: unknown key "{key}"{nearest(key, list(types))}')
        expected = get_args(types[key]) or (types[key],)
        # bool is an int in Python, but `rows = true` is a mistake; 1 is a fine float
        if type(value) not in expected and not (expected == (float,) and type(value) is int):
            names = " or ".join(kind.__name__ for kind in expected)
            what = f'{where}, key "{key}": must be {names}, not {type(value).__name__} {value!r}'
            raise wrong(f"{what}; write [[{key}]]" if type(value) is dict and list in expected else what)


def _check_overflow(overflow: str, max_tokens: int | None, where: str) -> None:
    if overflow != "keep" and max_tokens is None:
        raise RecipeError(f'{where}: overflow = "{overflow}" needs max_tokens')
    if overflow == "keep" and max_tokens is not None:
        raise RecipeError(
            f'{where}: max_tokens = {max_tokens} does nothing with overflow = "keep"; choose truncate, drop or error'
        )


def _check_stage(entry: Entry, stage: str, tasks: Mapping[str, Task], where: str) -> None:
    kind = tasks[entry.task].kind
    if (kind == "text") != (stage == "base"):
        right = "plain text" if stage == "base" else "conversations"
        raise RecipeError(f'{where}: task "{entry.task}" is {kind}, but stage {stage} is made of {right}')
