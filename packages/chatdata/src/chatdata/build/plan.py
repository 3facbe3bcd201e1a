"""What a build will do, decided before any row is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chatdata.build.mixture import select
from chatdata.errors import MissingSource, RecipeError
from chatdata.recipe import Entry, Recipe
from chatdata.sources.find import Locations, resolve
from chatdata.sources.source import PlannedEntry, Source
from chatdata.tasks.task import Task
from chatdata.tokenizer.bpe import Tokenizer

MAX_ENTRIES = 2**15  # the index numbers entries in int16


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do, before any row is read."""

    recipe: Recipe
    tokenizer: Tokenizer
    splits: dict[str, list[PlannedEntry]]
    limit: int | None
    tasks: Mapping[str, Task] = field(default_factory=dict)  # all, for the firewall: also those that are only scored
    locations: Locations = field(default_factory=lambda: Locations(Path()))

    @property
    def sources(self) -> list[Source]:
        """Distinct sources, in the order the recipe names them."""
        return list(dict.fromkeys(planned.source for entries in self.splits.values() for planned in entries))


def make_build_plan(
    recipe: Recipe, tasks: dict[str, Task], tokenizer: Tokenizer, locations: Locations, limit: int | None = None
) -> BuildPlan:
    """Find every source and choose every entry's positions.

    Raises MissingSource naming all missing sources at once, SourceError for an empty one, RecipeError for rows that
    are not there.
    """
    sources: dict[Any, Source] = {}
    missing: list[str] = []
    if max(len(entries) for entries in recipe.splits.values()) > MAX_ENTRIES:
        raise RecipeError(
            f"{recipe.name}: more than {MAX_ENTRIES:,} entries in a split (epochs make many); the index has int16"
        )
    for entry in (entry for entries in recipe.splits.values() for entry in entries):
        key = _source_key(entry)
        if key in sources:
            continue
        try:
            sources[key] = resolve(entry, tasks[entry.task], locations)
        except MissingSource as error:
            if str(error) not in missing:
                missing.append(str(error))
    if len(missing) == 1:
        raise MissingSource(missing[0])
    if missing:
        listed = "; ".join(f"({i}) {message}" for i, message in enumerate(missing, start=1))
        raise MissingSource(f"{len(missing)} sources are missing: {listed}")
    splits = {
        split: [_plan_entry(entry, tasks[entry.task], sources[_source_key(entry)], limit) for entry in entries]
        for split, entries in recipe.splits.items()
    }
    return BuildPlan(recipe, tokenizer, splits, limit, tasks, locations)


def _source_key(entry: Entry) -> Any:
    """Entries that differ only in which positions they take share a source."""
    bare = replace(entry, start=None, stop=None, rows=None, options={})
    return (repr(bare), repr(sorted(entry.options.items())))


def _plan_entry(entry: Entry, task: Task, source: Source, limit: int | None) -> PlannedEntry:
    num_rows = source.num_rows
    if task.generate is not None:
        num_rows = entry.stop if entry.stop is not None else (entry.start or 0) + (entry.rows or 0)
    try:
        positions = select(num_rows, entry.start, entry.stop, entry.rows, limit)
    except RecipeError as error:
        raise error.at(f"{entry.label} ({source.name})") from None
    return PlannedEntry(entry, task, source, positions)
