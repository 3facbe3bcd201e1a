"""Recipes: what goes into a stage, as TOML. Named ones are package data; `--recipe` takes a name or a file."""

import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta, Struct, defstruct
from msgspec.structs import asdict, replace

from chatdata.conversation import AS_WRITTEN, REFUSED_KEYS, Consecutive, Invalid, Reading, Reasoning
from chatdata.disk import MAX_COUNT, convert, decode
from chatdata.errors import RecipeError, nearest
from chatdata.records import COLUMN_KEYS
from chatdata.tasks.task import Task

Stage = Literal["base", "mid", "sft"]
Overflow = Literal["keep", "truncate", "drop", "error"]
ZeroSupervised = Literal["keep", "drop", "error"]
STAGES, OVERFLOW, ZERO_SUPERVISED = get_args(Stage), get_args(Overflow), get_args(ZeroSupervised)
MAX_FLOAT = sys.float_info.max
MAX_ROWS = 100_000_000  # of a split: a row takes 33 bytes of memory before it is rendered, 100 in all
MAX_ENTRIES = 2**15  # of a split, epochs expanded: the index numbers them in int16
RECIPE_FOLDERS = (Path(__file__).with_name("recipes"), Path(__file__).with_name("demo"))
NATIVE = "nanochat"  # the chat format that needs no library

Above0 = Annotated[float, Meta(gt=0, description="a number above 0")]
Place = Annotated[int, Meta(ge=-MAX_ROWS, le=MAX_ROWS)]


class Shuffle(Struct, frozen=True, forbid_unknown_fields=True):
    train: bool = True
    val: bool = True


class Rules(Struct, frozen=True, kw_only=True):
    """What holds for the whole of a stage."""

    stage: Stage
    seed: Annotated[int, Meta(ge=0)] = 42
    max_tokens: Annotated[int, Meta(ge=2)] | None = None  # bos and one more
    overflow: Overflow = "keep"
    zero_supervised: ZeroSupervised = "keep"
    reasoning: Reasoning = "keep"
    consecutive: Consecutive = "error"
    invalid: Invalid = "error"
    chat_format: str = NATIVE  # "nanochat", a name of the library renderers, or "template"


RULES = Rules.__struct_fields__


class RecipeTable(Rules, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe file."""

    train: Annotated[list[dict[str, Any]], Meta(min_length=1, description="one or more [[train]] entries")]
    val: Annotated[list[dict[str, Any]], Meta(min_length=1, description="one or more [[val]] entries")] = []
    shuffle: Shuffle = Shuffle()


class EntryHead(Struct, frozen=True):
    task: str


class EntryKeys(EntryHead, frozen=True):
    """What is taken from a task."""

    split: str = "train"
    subset: str = ""
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)] | None = None
    start: Place | None = None
    stop: Place | None = None
    epochs: Above0 = 1
    share: Above0 | None = None
    val_share: Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")] | None = None
    name: Annotated[str, Meta(min_length=1, description="a text that is not empty")] = ""
    path: str | None = None
    repo: str | None = None
    revision: str | None = None


class EntryTable(EntryKeys, frozen=True, forbid_unknown_fields=True):
    """An entry of a recipe file, without its task's options."""

    ignore: list[str] = []
    columns: dict[str, str] = {}


class Entry(EntryKeys, frozen=True):
    """One line of the expanded recipe: a task, a split, and the positions taken from it.

    epochs: 1, or below 1 for the first part of the positions. val_share: the rows are divided by a hash of their
    content (build/divide.py); in_val tells which side these are. name: the task's if the recipe gives none.
    """

    reading: Reading = AS_WRITTEN
    options: Mapping[str, Any] = {}
    file_options: tuple[str, ...] = ()
    in_val: bool = False

    @property
    def label(self) -> str:
        unnamed = self.name in ("", self.task)
        return " ".join(part for part in (self.task, self.subset, self.split) if part) if unnamed else self.name

    def resolved(self) -> dict[str, Any]:
        """The entry as plain data for the manifest: files are named without the folders of this machine."""
        keys = ("task", "name", "split", "subset", "start", "stop", "rows", "repo", "revision")
        more: dict[str, Any] = {"path": file_label(self.path or ""), "share": self.share, "val_share": self.val_share}
        more |= {"ignore": list(self.reading.ignore), "columns": dict(self.reading.columns)}
        more["epochs"] = self.epochs if self.epochs != 1 else None
        given = {key: value for key, value in more.items() if value}
        options = {key: file_label(value) if key in self.file_options else value for key, value in self.options.items()}
        return {**{key: getattr(self, key) for key in keys}, **given, **options}


class Recipe(Rules, frozen=True, kw_only=True):
    """What goes into a stage, read and checked: docs/recipes.md has the keys."""

    name: str
    shuffle: Mapping[str, bool]
    splits: Mapping[str, tuple[Entry, ...]]  # "train", and "val" if the recipe has one
    folder: Path  # relative paths start here

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data for the manifest: defaults filled in, epochs expanded, files without folders."""
        rules = {key: getattr(self, key) for key in RULES}
        shuffle = {split: self.shuffle[split] for split in self.splits}
        entries = {split: [entry.resolved() for entry in entries] for split, entries in self.splits.items()}
        return {**rules, "shuffle": shuffle, **entries}


def file_label(path: str) -> str:
    """How a file of a recipe is named in manifest and messages: as written below the recipe's folder, else by name."""
    outside = Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts
    return path if "://" in path or not outside else Path(path).name


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with chatdata."""
    found = {path.stem: path for folder in RECIPE_FOLDERS for path in folder.glob("*.toml") if path.stem != "persona"}
    return dict(sorted(found.items()))


def load_recipe(name_or_path: str, tasks: Mapping[str, Task], **rules: Any) -> Recipe:
    """Load a named recipe or a file. `rules` (max_tokens, overflow, …) replace its own, where they are not None.

    Raises RecipeError naming file, key and the nearest valid name for anything unknown or of the wrong type.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = nearest(name_or_path, list(shipped))
        raise RecipeError(f'no recipe "{name_or_path}" (neither a file nor a name){near}')
    shown = path.name if name_or_path in shipped else str(path)
    table: dict[str, Any] = decode(path.read_bytes(), dict, shown, RecipeError, "toml")
    if rules.get("overflow") == "keep":
        table.pop("max_tokens", None)
    table |= {key: value for key, value in rules.items() if value is not None}
    return parse_recipe(table, shown, path, tasks)


def parse_recipe(table: dict[str, Any], shown: str, path: Path, tasks: Mapping[str, Task]) -> Recipe:
    """The recipe of a TOML table. shown: the file's name in messages; path: the file, where relative paths start.

    Raises RecipeError as `load_recipe`.
    """
    read = convert(table, RecipeTable, shown, RecipeError)
    _check_numbers(table, shown)
    if read.overflow != "keep" and read.max_tokens is None:
        raise RecipeError(f'{shown}: overflow = "{read.overflow}" needs max_tokens')
    if read.overflow == "keep" and read.max_tokens is not None:
        advice = "choose truncate, drop or error"
        raise RecipeError(f'{shown}: max_tokens = {read.max_tokens} does nothing with overflow = "keep"; {advice}')
    if read.stage == "base" and read.chat_format != NATIVE:
        raise RecipeError(f'{shown}: chat_format = "{read.chat_format}" is for conversations, not for stage base')
    splits: dict[str, tuple[Entry, ...]] = {}
    held_out: list[Entry] = []  # the other sides of entries with val_share
    for split, tables in (("train", read.train), ("val", read.val)):
        entries: list[Entry] = []
        for number, entry in enumerate(tables, start=1):
            here = f"{shown}, [[{split}]] entry {number}"
            parsed = _parse_entry(entry, read, tasks, here)
            if len(entries) + parsed.epochs > MAX_ENTRIES:
                raise RecipeError(f"{here}: more than {MAX_ENTRIES:,} entries in a split; each epoch is one")
            if parsed.val_share and split == "val":
                raise RecipeError(f'{here}, key "val_share": is for [[train]] entries; val gets its rows by itself')
            other = replace(parsed, start=None, stop=None, rows=None, epochs=1, share=None, in_val=True)
            if parsed.val_share and other not in held_out:
                held_out.append(other)
            whole, rest = divmod(Fraction(str(parsed.epochs)), 1)  # as it is written: 2.3 is 2 and 0.3
            entries += [replace(parsed, epochs=1)] * whole + [replace(parsed, epochs=float(rest))] * (rest > 0)
        entries += held_out if split == "val" else []
        without = sum(entry.share is None for entry in entries)
        if 0 < without < len(entries):
            missing = f'"share" is missing in {without} of {len(entries)} entries of {split}'
            raise RecipeError(f"{shown}: {missing}; give all of them one, or none")
        if entries:
            splits[split] = tuple(entries)
    if "val" in table.get("shuffle", {}) and "val" not in splits:
        raise RecipeError(f'{shown}, key "shuffle.val": does nothing without a [[val]] entry')
    rules = {key: getattr(read, key) for key in RULES}
    return Recipe(name=path.stem, folder=path.parent, shuffle=asdict(read.shuffle), splits=splits, **rules)


def _check_numbers(table: dict[str, Any], shown: str) -> None:
    """Raise RecipeError for a number that a manifest cannot hold, at any depth."""
    waiting: list[tuple[str, Any]] = [("", table)]
    for key, value in waiting:  # it grows
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}".lstrip("."), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{key}[{i}]", inner) for i, inner in enumerate(value)]
        elif isinstance(value, int | float) and not abs(value) <= (MAX_COUNT if isinstance(value, int) else MAX_FLOAT):
            raise RecipeError(f"{shown}, key {json.dumps(key)}: must be a number from -{MAX_COUNT:,} to {MAX_COUNT:,}")


def _parse_entry(table: dict[str, Any], recipe: RecipeTable, tasks: Mapping[str, Task], here: str) -> Entry:
    name = convert(table, EntryHead, here, RecipeError).task
    if name not in tasks:
        raise RecipeError(f'{here}, key "task": unknown task "{name}"{nearest(name, list(tasks))}')
    task, stage = tasks[name], recipe.stage
    options: list[Any] = [(key, o.type, *(() if o.required else (None,))) for key, o in task.options.items()]
    keys: type[EntryTable] = defstruct("Entry", options, bases=(EntryTable,), kw_only=True)  # type: ignore[assignment]
    read = convert(table, keys, here, RecipeError)
    idle = ("path", "repo", "revision", "val_share") if task.generate else ("repo", "revision", "subset", "split")
    unused = next((key for key in idle if key in table), None) if task.generate or "path" in table else None
    strange = next((key for key in read.columns if key not in COLUMN_KEYS), "")
    refused = next((key for key in read.ignore if key in REFUSED_KEYS), "")
    unread = next((key for key in ("ignore", "columns") if key in table and not task.rows_are_conversations), None)
    too_many = read.share and table.keys() & {"rows", "epochs"}
    twice = len(set(read.columns.values())) < len(read.columns)
    lowest = min(read.start or 0, read.stop or 0)
    subsets = {} if "path" in table else task.splits
    subset = read.subset or next(iter(subsets), "")
    known = list(subsets.get(subset, ()))  # splits
    rows = "is generated" if task.generate else 'reads its "path"'
    kind = "plain text" if stage == "base" else "conversations"
    for wrong, text in (
        (task.scored_only, f': "{name}" is only for scoring, never in a build'),
        ((task.kind == "text") != (stage == "base"), f': "{name}" is {task.kind}, but stage {stage} takes {kind}'),
        (unused, f', key "{unused}": does nothing, because "{name}" {rows}'),
        (unread, f', key "{unread}": does nothing with "{name}"'),
        (too_many, ', key "share": decides the rows, in place of rows and epochs'),
        (strange, f', key "columns": "{strange}"{nearest(strange, COLUMN_KEYS)}'),
        (twice, ', key "columns": the same key of the rows under two names'),
        (refused, f', key "ignore": "{refused}" {REFUSED_KEYS.get(refused)}'),
        (task.generate and lowest < 0, ": start and stop of a generated task cannot be negative"),
        (task.generate and not table.keys() & {"rows", "stop"}, f': "{name}" is generated and needs the key "rows"'),
        (subsets and subset not in subsets, f', key "subset": "{subset}"{nearest(subset, list(subsets))}'),
        (subsets and read.split not in known, f', key "split": "{read.split}"{nearest(read.split, known)}'),
    ):
        if wrong:
            raise RecipeError(here + text)
    rules: dict[str, Any] = {key: getattr(recipe, key) for key in ("reasoning", "consecutive", "invalid")}
    rules["tools"] = "signatures" if recipe.chat_format == NATIVE else "given"
    reading = Reading(tuple(sorted(set(read.ignore))), tuple(sorted(read.columns.items())), **rules)
    taken = {key: getattr(read, key) for key in EntryKeys.__struct_fields__}
    taken |= {"subset": subset, "name": read.name or name}
    return Entry(**taken, reading=reading, **_options(task, {key: table[key] for key in task.options if key in table}))


def scored_entry(task: Task, name: str) -> Entry:
    """The rows of the task's scored set `name`, as an entry: what chateval asks, and what the firewall looks for."""
    assert task.scoring is not None
    scored = task.scoring.sets[name]
    return Entry(task.name, scored.split, scored.subset, rows=scored.rows, **_options(task, scored.options))


def _options(task: Task, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an entry: those `given`, or else the task's defaults; and which of them are files."""
    options = {key: option.default for key, option in task.options.items()} | dict(given)
    return {"options": options, "file_options": tuple(key for key, option in task.options.items() if option.is_file)}
