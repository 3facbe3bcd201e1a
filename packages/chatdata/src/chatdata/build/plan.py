"""What a build will do, decided before any row is read: the sources, each entry's rows, and the order of them all."""

import math
import random
from array import array
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from chatdata.build.divide import in_val_rows
from chatdata.disk import MAX_COUNT
from chatdata.errors import MissingSource, RecipeError, UsageError, general
from chatdata.recipe import MAX_ROWS, NATIVE, Entry, Recipe
from chatdata.render.documents import RenderedDocuments, RowMap
from chatdata.render.model_format import ModelFormat, load_format
from chatdata.sources.find import Locations, PlannedEntry, resolve
from chatdata.sources.source import Source
from chatdata.tasks.task import Task
from chatdata.tokenizer.bpe import Tokenizer

MAX_LISTED = 1_000  # bad rows in report.json: reading their places and the file takes seconds


class BuildPlan(NamedTuple):
    """The recipe with every source found and every entry's task positions chosen."""

    recipe: Recipe
    tokenizer: Tokenizer
    splits: dict[str, list[PlannedEntry]]
    sources: tuple[Source, ...]  # distinct, in the order the recipe names them
    limit: int | None
    tasks: Mapping[str, Task]  # all of them: the firewall also needs the scored ones
    locations: Locations

    @property
    def model_format(self) -> ModelFormat | None:
        """The recipe's chat format; None for nanochat's. Raises what `load_format` raises."""
        return load_format(self.recipe.chat_format, self.tokenizer)

    @property
    def chat_format(self) -> str:
        """As in the manifest."""
        return self.model_format.identity if self.model_format else NATIVE


def make_build_plan(
    recipe: Recipe, tasks: dict[str, Task], tokenizer: Tokenizer, locations: Locations, limit: int | None = None
) -> BuildPlan:
    """Find every source and choose every entry's task positions.

    Raises MissingSource naming all missing sources at once, SourceError for an empty one, RecipeError for rows that
    do not exist.
    """
    if limit is not None and not 0 < limit <= MAX_COUNT:
        raise UsageError(f"limit = {limit:,}: must be from 1 to {MAX_COUNT:,}")
    found: dict[str, Source] = {}
    missing: list[str] = []
    named: list[tuple[str, Entry, Source]] = []
    for split, entry in ((split, entry) for split, entries in recipe.splits.items() for entry in entries):
        # entries that differ only in which positions they take share a source
        alike: dict[str, Any] = dict.fromkeys(("start", "stop", "rows", "share", "val_share"))
        same = replace(entry, **alike, epochs=1, name="", in_val=False, options={})
        key = repr((same, sorted(entry.options.items())))
        try:
            if key not in found:
                found[key] = resolve(entry, tasks[entry.task], locations)
            named.append((split, entry, found[key]))
        except MissingSource as error:
            if str(error) not in missing:
                missing.append(str(error))
    if missing:
        listed = "; ".join(f"({i}) {message}" for i, message in enumerate(missing, start=1))
        raise MissingSource(f"{len(missing)} sources are missing: {listed}" if len(missing) > 1 else missing[0])
    divided = cache(sides)
    splits: dict[str, list[PlannedEntry]] = {split: [] for split in recipe.splits}
    for split, entry, source in named:
        task, side = tasks[entry.task], None
        if task.generate is not None:
            num_rows = entry.stop if entry.stop is not None else (entry.start or 0) + (entry.rows or 0)
        elif entry.val_share is not None:
            side = divided(source, entry.val_share)[entry.in_val]
            num_rows = len(side)
        else:
            num_rows = source.num_rows
        try:
            taken = select(entry, num_rows, limit)
        except RecipeError as error:
            raise error.at(f"{entry.label} ({source.name})") from None
        splits[split].append(PlannedEntry(entry, task, source, taken, side))
    for split, planned in splits.items():
        if any(entry.entry.share for entry in planned):
            counts = share_rows([len(p.taken) for p in planned], [p.entry.share or 0 for p in planned])
            planned[:] = [replace(p, taken=p.taken[:count]) for p, count in zip(planned, counts, strict=True)]
            if none := next((p for p in planned if not p.taken), None):
                raise RecipeError(f"{none.entry.label} ({none.source.name}): its share of {sum(counts):,} rows is none")
        total = sum(len(entry.taken) for entry in planned)
        if total > MAX_ROWS:
            raise RecipeError(f"{recipe.name}: {total:,} documents in {split}; at most {MAX_ROWS:,} fit a split")
        if total == 0:  # only val_share leaves a side empty
            num_rows = sum({p.source: p.source.num_rows for p in planned}.values())
            given, other = planned[0].entry.val_share, "a larger" if split == "val" else "a smaller"
            advice = f"choose {other} share, or give val files of its own in a recipe"
            raise RecipeError(f"{split} is empty: val_share = {given:g} gives it none of {num_rows:,} rows; {advice}")
    return BuildPlan(recipe, tokenizer, splits, tuple(found.values()), limit, tasks, locations)


def select(entry: Entry, num_rows: int, limit: int | None) -> range:
    """Task positions an entry takes: [start, stop) (negative counts from the end), the first `rows`, then `limit`;
    of n that are left the first floor(n * epochs), if epochs is below 1.

    Raises RecipeError for rows that do not exist: a mixture is never silently smaller than its recipe.
    """
    low, high = entry.start or 0, num_rows if entry.stop is None else entry.stop
    low, high = (low + num_rows if low < 0 else low), (high + num_rows if high < 0 else high)
    for key, bound, value in (("start", low, entry.start), ("stop", high, entry.stop)):
        if not 0 <= bound <= num_rows:
            raise RecipeError(f"{key} = {value} is outside the source's {num_rows:,} rows")
    if high <= low and num_rows:  # a divided source may have an empty side
        raise RecipeError(f"start = {entry.start}, stop = {entry.stop} selects no rows of {num_rows:,}")
    if entry.rows is not None:
        if entry.rows > high - low:
            raise RecipeError(f"rows = {entry.rows:,}, but only {high - low:,} are there")
        high = low + entry.rows
    if limit is not None:
        high = min(high, low + limit)
    part = math.floor(Fraction(str(entry.epochs)) * (high - low))
    if part == 0 and high > low:
        raise RecipeError(f"epochs: {entry.epochs:g} of {high - low:,} rows is less than one row")
    return range(low, low + part)


def share_rows(available: list[int], shares: list[float]) -> list[int]:
    """floor(N * share / sum of shares) for each entry, N being the largest number that repeats no row of any."""
    exact = [Fraction(str(share)) / sum(Fraction(str(share)) for share in shares) for share in shares]
    largest = min(math.ceil((rows + 1) / part) for rows, part in zip(available, exact, strict=True)) - 1
    return [math.floor(largest * part) for part in exact]


def permutation(num_rows: int) -> np.ndarray:
    """Task position → raw row (int64), as `datasets` shuffles with seed 42 (karpathy/nanochat@790f3be:tasks/*.py)."""
    return np.random.default_rng(42).permutation(num_rows)


def sides(source: Source, val_share: float) -> tuple[np.ndarray, np.ndarray]:
    """The task positions (int32, ascending) of a source's rows for training, and of those for validation."""
    in_val = in_val_rows(source, val_share)
    if source.task.permuted:
        in_val = in_val[permutation(len(in_val))]
    return np.flatnonzero(~in_val).astype(np.int32), np.flatnonzero(in_val).astype(np.int32)


def mixture_order(lengths: list[int], seed: int, shuffle: bool) -> np.ndarray:
    """Order of all (entry, place in entry) pairs, as indices into their concatenation (int32 [sum(lengths)]).

    `random.Random(seed).shuffle` moves places, not values, so shuffling indices gives the order of the pairs
    (karpathy/nanochat@790f3be:tasks/common.py, TaskMixture).
    """
    order = array("i", range(sum(lengths)))  # a list of Python's integers takes ten times the memory
    if shuffle:
        random.Random(seed).shuffle(order)
    return np.frombuffer(order, dtype=np.int32)


def number_documents(plan: BuildPlan) -> dict[Source, RowMap]:
    """Where each source's rows are among the documents of the build: those an entry takes, in source and row order."""
    row_maps: dict[Source, RowMap] = {}
    num_documents = 0
    for source in plan.sources:
        takers = [p for entries in plan.splits.values() for p in entries if p.source is source]
        num_rows = source.num_rows if source.task.generate is None else max(p.taken.stop for p in takers)
        row_at = (permutation(num_rows) if source.task.permuted else np.arange(num_rows)).astype(np.int32)
        document_of = np.full(num_rows, -1, dtype=np.int32)
        for planned in takers:
            document_of[row_at[planned.task_positions]] = 0
        wanted = document_of == 0
        last = num_documents + int(wanted.sum())
        document_of[wanted] = np.arange(num_documents, last)
        row_maps[source], num_documents = RowMap(row_at, document_of), last
    return row_maps


def place_of(row_maps: Mapping[Source, RowMap], document: int) -> str:
    """A document's source and row, for error messages."""
    found = ((source, np.flatnonzero(row_map.document_of == document)) for source, row_map in row_maps.items())
    return next(source.where(int(rows[0])) for source, rows in found if len(rows))


def invalid_rows(documents: RenderedDocuments, row_maps: Mapping[Source, RowMap], chosen: np.ndarray) -> dict[str, Any]:
    """The rows of the `chosen` documents (which may repeat) that cannot be used: how many `rows`, how many for each of
    the `reasons` (see `general`), and the first MAX_LISTED with place and reason."""
    bad = np.unique(chosen[np.isin(chosen, np.array(list(documents.invalid), dtype=np.int32))])
    listed: list[dict[str, Any]] = []
    for source, row_map in row_maps.items() if len(bad) else ():
        rows = np.flatnonzero(np.isin(row_map.document_of, bad))[: MAX_LISTED - len(listed)]
        for document, place in zip(row_map.document_of[rows].tolist(), source.places(rows), strict=True):
            listed.append(place.with_reason(documents.invalid[document]))
    reasons = Counter(general(documents.invalid[document]) for document in bad.tolist())
    return {"rows": len(bad), "reasons": dict(reasons.most_common(MAX_LISTED)), "listed": listed}


def rows_in_order(plan: BuildPlan, split: str, row_maps: Mapping[Source, RowMap]) -> dict[str, np.ndarray]:
    """The mixture of a split as columns [n]: `document` of the build, `row` of its source, `task_position`
    (int32 each), and `entry` of the split (int16)."""
    entries = plan.splits[split]
    taken = [planned.task_positions for planned in entries]
    order = mixture_order([len(positions) for positions in taken], plan.recipe.seed, plan.recipe.shuffle[split])
    maps = [row_maps[planned.source] for planned in entries]
    rows = [row_map.row_at[positions] for row_map, positions in zip(maps, taken, strict=True)]
    # a column at a time: together they are what a large build needs most memory for
    return {
        "document": np.concatenate([row_map.document_of[r] for row_map, r in zip(maps, rows, strict=True)])[order],
        "row": np.concatenate(rows)[order],
        "task_position": np.concatenate(taken)[order],
        "entry": np.concatenate([np.full(len(p), i, dtype=np.int16) for i, p in enumerate(taken)])[order],
    }
