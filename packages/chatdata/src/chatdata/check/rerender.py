"""`chatdata verify --level semantic`: does the recipe, applied to the sources again, give this build?

The order of all documents is computed from the recipe; a share of them, and of those the policies dropped, is
rendered with the one-conversation renderer and tiktoken. This uses none of the code that takes rows to shards in a
build, because a fault there would repeat itself here.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from chatdata.build.plan import BuildPlan, make_build_plan, mixture_order, permutation
from chatdata.check.diff import differences
from chatdata.check.verify import shortened, verify_full
from chatdata.document import Document
from chatdata.errors import ChatdataError, MissingSource, RecipeError
from chatdata.progress import Progress, no_progress
from chatdata.recipe import RULES, Recipe, file_label, load_recipe, parse_recipe, shipped_recipes
from chatdata.render import specification as render
from chatdata.render.format import NANOCHAT, PYTHON
from chatdata.render.model_batch import render_row
from chatdata.shards.read import Build, Split, open_build
from chatdata.sources.find import Locations, PlannedEntry
from chatdata.sources.hub import fetch_url, nothing_fetched
from chatdata.sources.source import Source
from chatdata.tasks.task import Task, call_task

# of the index, compared with a rendering
RECORDED = ("original_tokens", "num_turns", "num_tool_calls", "untrained_turns", "spans")
REPLACED = ("max_tokens", "overflow", "invalid", "chat_format")  # keys of a recipe that options of build replace
LEAST_DOCUMENTS = 100  # rendered again per split, however small the share


class _Chosen(NamedTuple):
    """A document to render again: its number in the split (None if a policy dropped it) and its row of the index."""

    split: Split
    planned: PlannedEntry
    row: int
    doc: int | None
    recorded: Mapping[str, Any]


def verify_semantic(
    path: Path,
    locations: Locations,
    tasks: Mapping[str, Task],
    *,
    recipe: str | None = None,
    share: float = 0.01,
    progress: Progress = no_progress,
) -> list[str]:
    """Everything of full; then sources, order, and `share` of each split (at least 100 documents, one per entry).

    Stops after full if that finds problems. recipe, errors: see `plan_of_build`.
    """
    if problems := verify_full(path, progress):
        return problems
    build = open_build(path)
    plan = plan_of_build(build, locations, tasks, recipe)
    problems = source_problems(build, plan)
    chosen: list[_Chosen] = []
    for name in plan.splits:
        found, wrong = _check_order(build[name], plan, share)
        chosen += found
        problems += wrong
    return problems + shortened([*_check_rendering(plan, chosen, progress)], "differences from what is rendered again")


def plan_of_build(build: Build, locations: Locations, tasks: Mapping[str, Task], recipe: str | None) -> BuildPlan:
    """The plan that gives a build again: its recipe, its tokenizer, its sources at the commits that it used.

    recipe: NAME or FILE, says only where the files it names are; by default `recipe_of_build`, of whose addresses none
    is requested that only the manifest names.
    Raises MissingSource for sources that cannot be found, RecipeError if `recipe` is not the build's.
    """
    loaded = recipe_of_build(build.manifest, tasks, recipe)
    if recipe is None:
        _check_addresses(loaded, tasks, locations)
    used = {(source["name"], source["revision"]) for source in build.manifest["sources"]}
    times, limit = Counter(name for name, _ in used), build.manifest["recipe"].get("limit")
    commits = {name: revision for name, revision in used if times[name] == 1}
    locations = replace(locations, recipe_folder=loaded.folder, commits=commits)
    try:
        return make_build_plan(loaded, dict(tasks), build.tokenizer, locations, limit)
    except MissingSource as error:
        raise MissingSource(f"{error}; pass --recipe (paths start at it), --data-dir, --identity or --words") from None


def recipe_of_build(manifest: dict[str, Any], tasks: Mapping[str, Task], given: str | None = None) -> Recipe:
    """The recipe `given`, or the shipped one that a build was made with, or else the one in its manifest, with files
    relative to here.

    Raises RecipeError if `given` is another one, or if this chatdata does not understand the manifest's recipe (a
    --task-file may be missing).
    """
    wanted = manifest["recipe"]
    rules = {key: wanted.get(key) for key in REPLACED}
    for name in [given] if given else shipped_recipes():
        try:
            return _same_recipe(manifest, load_recipe(name, tasks, **rules))
        except RecipeError:
            if given:
                raise
    table: dict[str, Any] = {key: wanted[key] for key in (*RULES, "shuffle") if wanted.get(key) is not None}
    for split in manifest["splits"]:
        # the rows that val_share gives to val are no entry of a recipe
        entries = [entry for entry in wanted[split] if split == "train" or "val_share" not in entry]
        table |= {split: [_entry_table(entry, tasks) for entry in entries]} if entries else {}
    return _same_recipe(manifest, parse_recipe(table, "the build's recipe", Path("recipe.toml"), tasks))


def _check_addresses(recipe: Recipe, tasks: Mapping[str, Task], locations: Locations) -> None:
    """Raise MissingSource for an address that no task has as its default and that is not in the cache."""
    for entry in (entry for entries in recipe.splits.values() for entry in entries):
        for key in entry.file_options:
            given, value = key == "words" and locations.words is not None, entry.options[key]
            if not given and "://" in value and value != tasks[entry.task].options[key].default:
                with nothing_fetched():
                    fetch_url(value, "only the build names it: pass --words with a file, or with this address")


def _entry_table(entry: dict[str, Any], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """An entry of a resolved recipe as a TOML file would have it: without nulls, implied keys and files of chatdata."""
    if entry.get("task") not in tasks:
        raise RecipeError(f"the build's task {entry.get('task')!r} is not a shipped one: pass its --task-file")
    implied = {"split", "subset"} if "path" in entry else set()
    files = {key: file_label(str(o.default)) for key, o in tasks[entry["task"]].options.items() if o.is_file}
    implied |= {key for key, name in files.items() if entry.get(key) == name}
    return {key: value for key, value in entry.items() if value is not None and key not in implied}


def _same_recipe(manifest: dict[str, Any], recipe: Recipe) -> Recipe:
    """`recipe`, if it is the build's. Raises RecipeError naming the first difference."""
    wanted = {k: v for k, v in manifest["recipe"].items() if k not in ("limit", "decontaminate", "scored", "against")}
    for key, there, here in differences(wanted, recipe.resolved()):
        raise RecipeError(f"{recipe.name} is not the recipe of this build: {key} is {there} in the build, {here} here")
    return recipe


def source_problems(build: Build, plan: BuildPlan) -> list[str]:
    """Sources whose content is not the build's; where they are and what they are called may differ."""
    recorded = build.manifest["sources"]
    if len(plan.sources) != len(recorded):
        return [f"{build.path}: {len(recorded)} sources in the manifest, but its recipe has {len(plan.sources)}"]
    problems = []
    for source, record in zip(plan.sources, recorded, strict=True):
        here = source.describe()
        if len(here["files"]) != len(record["files"]):
            problems.append(f"source {record['name']}: {len(here['files'])} files, not {len(record['files'])}")
            continue
        files = zip(here["files"], record["files"], strict=True)
        changed = [file["name"] for file, old in files if file["sha256"] != old["sha256"]]
        others = (("task_code_sha256", "the task file"), ("rows_sha256", "the list of its rows"))
        changed += [what for key, what in others if here.get(key) != record.get(key)]
        problems += [f"source {record['name']}: {what} has another SHA-256 than the build's" for what in changed]
    return problems


def _check_order(split: Split, plan: BuildPlan, share: float) -> tuple[list[_Chosen], list[str]]:
    """The documents to render again, and where (row, position, entry) of the index is not the recipe's mixture.

    A place is a number in the concatenation of all entries' positions: `rows` and `entry` are by place.
    """
    folder, entries = split.build.path / split.name, plan.splits[split.name]
    index = {name: split.index[name].to_numpy().astype(np.int64) for name in ("row", "task_position", "entry")}
    counts = [len(planned.taken) for planned in entries]
    rows = np.concatenate([_rows_of(planned) for planned in entries])
    entry = np.repeat(np.arange(len(entries)), counts)
    order = mixture_order(counts, plan.recipe.seed, plan.recipe.shuffle[split.name])
    keys = np.concatenate([planned.task_positions for planned in entries]) + (entry << 32)  # ascending
    sought = index["task_position"] + (index["entry"] << 32)
    places = np.searchsorted(keys, sought)
    strange = keys[np.minimum(places, len(keys) - 1)] != sought
    if strange.any():
        return [], [f"{folder}: document {np.argmax(strange)} has a task position that its entry does not take"]
    mixed = np.empty(len(order), dtype=np.int64)  # place → its number in the mixture
    mixed[order] = np.arange(len(order))
    unordered = np.flatnonzero(np.diff(mixed[places], prepend=-1) <= 0)[:1]  # the first one, if any
    problems = [f"{folder}: document {first} is not in the order of the recipe's mixture" for first in unordered]
    for first in np.flatnonzero(rows[places] != index["row"])[:1]:
        expected = f"task position {index['task_position'][first]:,} of its entry is row {rows[places][first]:,}"
        problems.append(f"{folder}: document {first} has row {index['row'][first]:,}, but {expected}")
    dropped = order[~np.isin(order, places)]
    ledger = split.build.manifest["splits"][split.name]["entries"]
    for number, count in enumerate(np.bincount(entry[dropped], minlength=len(entries)).tolist()):
        recorded = sum(ledger[number]["dropped"].values())
        if count != recorded:
            lacking = f"entry {number} ({ledger[number]['task']}) lacks {count:,} documents of the mixture"
            problems.append(f"{folder}: {lacking}, but the manifest says {recorded:,} were dropped")
    docs = choose(index["entry"], share)
    recorded = split.index[docs].select(RECORDED).rows(named=True)
    chosen = list(zip(docs.tolist(), places[docs].tolist(), recorded, strict=True))
    chosen += [(None, place, {}) for place in dropped[choose(entry[dropped], share)].tolist()]
    return [_Chosen(split, entries[entry[p]], int(rows[p]), doc, record) for doc, p, record in chosen], problems


def _rows_of(planned: PlannedEntry) -> np.ndarray:
    """The row at each of an entry's positions."""
    positions = planned.task_positions
    return permutation(planned.source.num_rows)[positions] if planned.task.permuted else positions


def choose(entry: np.ndarray, share: float) -> np.ndarray:
    """Numbers of the documents to render again, ascending (int64): `share` of them, at least 100 and one per entry.

    entry: [documents], the entry of each. Chosen by a hash of the number: always the same ones, evenly spread.
    """
    number = np.arange(len(entry), dtype=np.uint64)
    number = (number + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's last step; wraps
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(number ^ (number >> np.uint64(31)), kind="stable")
    count = min(len(entry), max(LEAST_DOCUMENTS, math.ceil(share * len(entry))))
    _, first = np.unique(entry[order], return_index=True)  # per entry, the document of the lowest hash
    return np.unique(np.concatenate([order[:count], order[first]]))


def _check_rendering(plan: BuildPlan, chosen: list[_Chosen], progress: Progress) -> Iterator[str]:
    for source in plan.sources:
        of_row: dict[int, list[_Chosen]] = {}
        for document in chosen:
            if document.planned.source is source:
                of_row.setdefault(document.row, []).append(document)
        ranges = [e.taken for entries in plan.splits.values() for e in entries if e.source is source]
        wanted = np.zeros(max(r.stop for r in ranges) if source.make_row else source.num_rows, dtype=bool)
        wanted[list(of_row)] = True
        for done, (row, raw) in enumerate(source.read(wanted), start=1):
            try:
                expected, facts = _render_row(source, raw, plan)
            except ChatdataError as error:
                if source.reading.invalid == "error":
                    yield f"{source.where(row)}: cannot be rendered: {error}"
                    continue
                expected, facts = None, {}
            for document in of_row[row]:
                yield from _compare(document, expected, facts, source.where(row))
            progress(source.name, done, len(of_row), "rows", part=True)


def _render_row(source: Source, raw: Any, plan: BuildPlan) -> tuple[Document | None, dict[str, Any]]:
    """A row rendered again, None if the recipe's policies drop it; and what the index has of it (RECORDED)."""
    if plan.model_format:
        document, counts, _ = render_row(plan.model_format, source, raw)
    else:
        converted = call_task(source.task, source.task.to_conversation, raw)
        if source.task.kind == "text":
            document = render.render_text(plan.tokenizer, converted)
        else:
            document = render.render_conversation(plan.tokenizer, converted, source.reading)
        delimiters = (NANOCHAT.user.opening, NANOCHAT.assistant_start, NANOCHAT.assistant_end)
        user, start, end = (document.tokens == plan.tokenizer.special_ids[token] for token in delimiters)
        counts = Counter(num_turns=int((user | start).sum()), untrained_turns=int((document.mask[end] == 0).sum()))
        counts["num_tool_calls"] = sum(span.role == PYTHON for span in document.spans)
    expected = _after_policies(document, plan.recipe)
    spans = [] if expected is None else [span._asdict() for span in expected.spans]
    return expected, {**counts, "original_tokens": len(document), "spans": spans}


def _after_policies(document: Document, recipe: Recipe) -> Document | None:
    """What the recipe's policies leave of a document; None if they drop it."""
    limit = recipe.max_tokens
    if limit is not None and len(document) > limit and recipe.overflow != "keep":
        if recipe.overflow != "truncate":
            return None
        spans = (s._replace(length=min(s.length, limit - s.start)) for s in document.spans if s.start < limit)
        document = Document(document.tokens[:limit], document.mask[:limit], tuple(spans))
    return None if document.num_supervised == 0 and recipe.zero_supervised != "keep" else document


def _compare(chosen: _Chosen, expected: Document | None, facts: Mapping[str, Any], where: str) -> Iterator[str]:
    folder = chosen.split.build.path / chosen.split.name
    if chosen.doc is None:
        # what the firewall dropped depends on the scored sets it found then: only its number is checked
        if expected is not None and chosen.split.build.manifest["recipe"].get("decontaminate") != "drop":
            yield f"{folder}: {where} was dropped, but the recipe's policies keep it"
        return
    here = f"{folder}: document {chosen.doc} ({where})"
    if expected is None:
        yield f"{here}: the recipe's policies drop it"
        return
    found = chosen.split[chosen.doc]
    if len(found) != len(expected):
        yield f"{here}: {len(found):,} tokens, but rendered again {len(expected):,}"
    length = min(len(found), len(expected))
    for what, one, other in (("id", found.tokens, expected.tokens), ("mask", found.mask, expected.mask)):
        for i in np.flatnonzero(one[:length] != other[:length])[:1]:  # the first one, if any
            yield f"{here}: {what} at position {i:,} is {one[i]}, but rendered again {other[i]}"
    for name in RECORDED:
        if chosen.recorded[name] != facts[name]:
            yield f"{here}: {name} is {chosen.recorded[name]} in the index, but rendered again {facts[name]}"
