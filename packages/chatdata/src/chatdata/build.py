"""`chatdata build`: recipe → plan → rendered units → shards in mixture order → manifest, published by one rename.

Rows are rendered once each, in units that are kept in the cache; the mixture then only gathers from them. So a row that
stands in two entries is rendered once, a build that was killed goes on where it was, and memory holds counts, not text.
OUT appears when everything is written.
"""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from chatdata import firewall, shards
from chatdata.cache import find_units, remove_abandoned, take_unit, units_folder
from chatdata.contract import Rules, check_documents, raise_defect
from chatdata.engine import ENGINES, render_units
from chatdata.errors import BuildError, MissingSource, RecipeError, UsageError
from chatdata.manifest import FORMAT, VERSION, build_id_of
from chatdata.mixture import permutation, select
from chatdata.progress import Progress
from chatdata.publish import check_out, partial_folder, publish
from chatdata.recipe import Entry, Recipe
from chatdata.sources import Locations, Source, resolve
from chatdata.splits import GATHER_TOKENS, write_splits
from chatdata.store import Documents, RowMap
from chatdata.tasks import Task
from chatdata.tokenizer import Tokenizer
from chatdata.tokenizer_files import save_tokenizer
from chatdata.units import Rendered, Renderer, Unit, cut_units, read_unit

MAX_ENTRIES = 2**15  # the index numbers entries in int16
MASK_MEANING = "1 = supervised: the loss of sft is computed on this token as a target; aligned with tokens, not shifted"

_T = TypeVar("_T")


@dataclass(frozen=True)
class PlannedEntry:
    """An entry with its task, the source its rows come from, and the positions it takes of it."""

    entry: Entry
    task: Task
    source: Source
    positions: range


@dataclass(frozen=True)
class Plan:
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


def make_plan(
    recipe: Recipe, tasks: dict[str, Task], tokenizer: Tokenizer, locations: Locations, limit: int | None = None
) -> Plan:
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
    return Plan(recipe, tokenizer, splits, limit, tasks, locations)


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


def build(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    workers: int = 1,
    engine: str = "local",
    encoder: str = "auto",
    decontaminate: str = "report",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build `plan` into the folder `out` and return its manifest: the same bytes for any workers, engine and encoder.

    `out` is untouched until the end, and stays so after any error or interruption; rendered units stay in the cache.
    decontaminate: "report" lists training documents that hold scored items (firewall.py) beside `out`, "drop" leaves
    them out as well, "off" does not look for them.
    Raises UsageError for an unknown engine, encoder or `decontaminate`; BuildError if `out` exists (with `force`: if it
    is not a build), if another build writes there, if a policy of the recipe is "error" or leaves nothing, or if the
    disk is full; EncoderError, and the named error of the first row that cannot be rendered. With `workers` over 1 a
    script needs `if __name__ == "__main__":` around the call.
    """
    for value, known in ((engine, ENGINES), (decontaminate, firewall.CHOICES)):
        if value not in known:
            raise UsageError(f"{value!r}: give one of {', '.join(known)}")
    out = out.resolve()  # through links: the folder they lead to is written, not the link
    check_out(out, force)
    started = time.perf_counter()
    report: dict[str, Any] = {"workers": workers, "engine": engine, "tool_calls": {}}
    seconds: dict[str, float] = {}
    writing = units_folder()
    try:
        with partial_folder(out) as partial:

            def prepare() -> firewall.Scored | None:
                nonlocal writing
                writing = out
                save_tokenizer(plan.tokenizer, partial / "tokenizer")
                writing = units_folder()
                return firewall.read_scored(plan) if decontaminate != "off" else None

            documents, row_maps, scored = _render(plan, encoder, engine, workers, report, progress, prepare)
            seconds["render"] = time.perf_counter() - started
            findings = firewall.check(plan, scored, documents, row_maps, workers) if scored else None
            dropped = findings.documents if findings and decontaminate == "drop" else np.zeros(0, dtype=np.int64)
            if findings:
                report["firewall"] = {"decontaminate": decontaminate, **firewall.summary(findings)}
                seconds["firewall"] = time.perf_counter() - started - seconds["render"]
            writing = out
            with ThreadPoolExecutor(1) if workers > 1 else nullcontext() as threads:
                splits = write_splits(plan, documents, row_maps, dropped, partial, report, progress, threads)
            manifest = _complete_manifest(plan, splits, partial, decontaminate)
            seconds["total"] = time.perf_counter() - started
            shards.write_json(partial / "report.json", _report(report, seconds, manifest))
            shards.write_json(partial / "manifest.json", manifest)
            check_out(out, force)
            listing = out.with_name(f".{out.name}-firewall.partial")  # written before, so that a full disk shows now
            if findings:
                shards.write_json(listing, firewall.listing(findings, manifest["build_id"]))
            publish(partial, out)
            if findings:
                listing.replace(firewall.firewall_path(out))
            else:
                firewall.firewall_path(out).unlink(missing_ok=True)  # of a build that was replaced
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            if writing != out:
                raise BuildError(
                    f"{writing}: no space left on the disk for rendered units; CHATDATA_CACHE may name another one"
                ) from None
            raise BuildError(f"{out}: no space left on the disk; nothing was written there") from None
        raise
    return manifest


def _render(
    plan: Plan,
    encoder: str,
    engine: str,
    workers: int,
    report: dict[str, Any],
    progress: Progress | None,
    prepare: Callable[[], _T],
) -> tuple[Documents, dict[Source, RowMap], _T]:
    """All documents of the plan, rendered where the cache does not have them yet, where rows are among them, and what
    `prepare` returned, which this process calls while others start."""
    renderer = Renderer(tuple(plan.sources), plan.tokenizer, encoder, units_folder())
    units: list[Unit] = []
    row_maps: dict[Source, RowMap] = {}
    num_documents = 0
    for number, source in enumerate(renderer.sources):
        ranges = [e.positions for entries in plan.splits.values() for e in entries if e.source is source]
        num_rows = max(r.stop for r in ranges) if source.make_row else source.num_rows
        row_at = (permutation(num_rows) if source.task.permuted else np.arange(num_rows)).astype(np.int32)
        wanted = np.zeros(num_rows, dtype=bool)
        for positions in ranges:
            wanted[row_at[positions.start : positions.stop]] = True
        document_of = np.full(num_rows, -1, dtype=np.int32)
        document_of[wanted] = np.arange(wanted.sum()) + num_documents
        num_documents += int(wanted.sum())
        row_maps[source] = RowMap(row_at, document_of)
        units += cut_units(renderer, number, wanted)
    paths, prepared = _render_missing(renderer, units, engine, workers, report, progress, prepare)
    blocks = [block for unit in units for block in read_unit(paths[unit.key], plan.tokenizer.dtype)]

    def where(document: int) -> str:
        for source, row_map in row_maps.items():
            rows = np.flatnonzero(row_map.document_of == document)
            if len(rows):
                return source.where(int(rows[0]))
        raise IndexError(document)

    documents = Documents(blocks, plan.recipe, where)
    _check_cut(plan, documents)
    return documents, row_maps, prepared


def _check_cut(plan: Plan, documents: Documents) -> None:
    """Hold the truncated documents to the contract; whole ones were held to it when they were rendered (units.py)."""
    rules = Rules(plan.tokenizer.special_ids, plan.tokenizer.vocab_size, plan.recipe.stage, plan.recipe.max_tokens)
    rules = replace(rules, overflow="truncate")
    cut = np.flatnonzero(documents.truncated)
    for first, last in shards.shard_bounds(documents.num_tokens[cut], GATHER_TOKENS):
        part = cut[first:last]
        offsets = np.concatenate([[0], np.cumsum(documents.num_tokens[part], dtype=np.int64)])
        findings = check_documents(*documents.gather(part), offsets, {"truncated": documents.truncated[part]}, rules)
        raise_defect(findings, part, documents.where)


def _render_missing(
    renderer: Renderer,
    units: list[Unit],
    engine: str,
    workers: int,
    report: dict[str, Any],
    progress: Progress | None,
    prepare: Callable[[], _T],
) -> tuple[dict[str, Path], _T]:
    """key → path of every unit, and what `prepare` returned; what the cache lacks, or has damaged, is rendered."""
    totals = [0] * len(renderer.sources)
    for unit in units:
        totals[unit.source] += unit.num_rows
    done = [0] * len(renderer.sources)

    def on_rows(unit: Unit, num_rows: int) -> None:
        done[unit.source] += num_rows
        if progress:
            progress(renderer.sources[unit.source].name, done[unit.source], totals[unit.source])
            if len(totals) > 1:
                progress("all sources", sum(done), sum(totals))

    remove_abandoned(renderer.folder)
    cached = find_units(renderer.folder)
    there = {unit.key: cached[unit.key] for unit in units if unit.key in cached}
    paths = {key: path for key, path in there.items() if take_unit(path)}
    missing = [unit for unit in units if unit.key not in paths]
    for unit in units:
        if unit.key in paths:
            on_rows(unit, unit.num_rows)
    checked = {"texts": 0, "texts_checked": 0}

    def on_unit(unit: Unit, rendered: Rendered) -> None:
        paths[unit.key] = rendered.path
        checked["texts"] += rendered.num_texts
        checked["texts_checked"] += rendered.num_checked

    damaged = len(there) - len(paths)
    report["units"] = {"rendered": len(missing), "cached": len(paths), "damaged": damaged}
    prepared = render_units(renderer, missing, engine, workers, on_rows, on_unit, prepare)
    if missing:
        report["encoder"] = {"name": renderer.encoder.name, "version": renderer.encoder.version, **checked}
        renderer.forget()
    return paths, prepared


def _complete_manifest(plan: Plan, splits: dict[str, Any], partial: Path, decontaminate: str) -> dict[str, Any]:
    tokenizer = plan.tokenizer
    dropping = {"decontaminate": "drop"} if decontaminate == "drop" else {}  # a report changes no byte
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: shards.file_sha256(partial / "tokenizer" / name) for name in names}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "stage": plan.recipe.stage,
        "recipe": plan.recipe.resolved() | {"limit": plan.limit} | dropping,
        "sources": [source.describe() for source in plan.sources],
        "tokenizer": {
            "files": files,
            "canary_sha256": tokenizer.canary_sha256,
            "vocab_size": tokenizer.vocab_size,
            "special_ids": tokenizer.special_ids,
        },
        "dtype": tokenizer.dtype.str,
        "mask": MASK_MEANING,
        "splits": splits,
    }
    return {**manifest, "build_id": build_id_of(manifest)}


def _report(report: dict[str, Any], seconds: dict[str, float], manifest: dict[str, Any]) -> dict[str, Any]:
    """Everything that may differ between two runs of the same build."""
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    tools = ("chatdata", "numpy", "pyarrow", "tiktoken", "huggingface_hub")
    return {
        **report,
        "build_id": manifest["build_id"],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "duration_s": {key: round(value, 3) for key, value in seconds.items()},
        "tokens_per_s": round(tokens / seconds["total"]),
        "host": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {tool: version(tool) for tool in tools},
    }
