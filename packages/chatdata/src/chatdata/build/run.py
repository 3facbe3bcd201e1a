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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from chatdata.build.cache import find_units, remove_abandoned, take_unit, units_folder
from chatdata.build.engines import ENGINES, render_units
from chatdata.build.mixture import permutation
from chatdata.build.plan import BuildPlan
from chatdata.build.publish import check_out, partial_folder, publish
from chatdata.build.splits import GATHER_TOKENS, write_splits
from chatdata.build.unit_file import read_unit
from chatdata.build.units import Rendered, Renderer, Unit, cut_units
from chatdata.disk import file_sha256, write_json
from chatdata.document import shard_bounds
from chatdata.errors import BuildError, UsageError
from chatdata.firewall.listing import CHOICES, firewall_path, listing, summary
from chatdata.firewall.scored import Scored, read_scored
from chatdata.firewall.search import check
from chatdata.progress import Progress
from chatdata.render.contract import Rules, check_documents, raise_defect
from chatdata.render.documents import RenderedDocuments, RowMap
from chatdata.shards.manifest import FORMAT, VERSION, build_id_of
from chatdata.sources.source import Source
from chatdata.tokenizer.formats import save_tokenizer

MASK_MEANING = "1 = supervised: the loss of sft is computed on this token as a target; aligned with tokens, not shifted"

_T = TypeVar("_T")


def build(
    plan: BuildPlan,
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
    for value, known in ((engine, ENGINES), (decontaminate, CHOICES)):
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

            def prepare() -> Scored | None:
                nonlocal writing
                writing = out
                save_tokenizer(plan.tokenizer, partial / "tokenizer")
                writing = units_folder()
                return (
                    read_scored(plan.splits["train"], plan.tasks, plan.locations, plan.tokenizer)
                    if decontaminate != "off"
                    else None
                )

            documents, row_maps, scored = _render(plan, encoder, engine, workers, report, progress, prepare)
            seconds["render"] = time.perf_counter() - started
            findings = (
                check(plan.splits["train"], plan.tokenizer, scored, documents, row_maps, workers) if scored else None
            )
            dropped = findings.documents if findings and decontaminate == "drop" else np.zeros(0, dtype=np.int64)
            if findings:
                report["firewall"] = {"decontaminate": decontaminate, **summary(findings)}
                seconds["firewall"] = time.perf_counter() - started - seconds["render"]
            writing = out
            with ThreadPoolExecutor(1) if workers > 1 else nullcontext() as threads:
                splits = write_splits(plan, documents, row_maps, dropped, partial, report, progress, threads)
            manifest = _complete_manifest(plan, splits, partial, decontaminate)
            seconds["total"] = time.perf_counter() - started
            write_json(partial / "report.json", _report(report, seconds, manifest))
            write_json(partial / "manifest.json", manifest)
            check_out(out, force)
            listed = out.with_name(f".{out.name}-firewall.partial")  # written before, so that a full disk shows now
            if findings:
                write_json(listed, listing(findings, manifest["build_id"]))
            publish(partial, out)
            if findings:
                listed.replace(firewall_path(out))
            else:
                firewall_path(out).unlink(missing_ok=True)  # of a build that was replaced
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
    plan: BuildPlan,
    encoder: str,
    engine: str,
    workers: int,
    report: dict[str, Any],
    progress: Progress | None,
    prepare: Callable[[], _T],
) -> tuple[RenderedDocuments, dict[Source, RowMap], _T]:
    """All documents of the plan, rendered where the cache does not have them yet, where rows are among them, and what
    `prepare` returned, which this process calls while others start."""
    renderer = Renderer(tuple(plan.sources), plan.tokenizer, encoder, units_folder())
    units: list[Unit] = []
    row_maps: dict[Source, RowMap] = {}
    num_documents = 0
    for number, source in enumerate(renderer.sources):
        ranges = [e.task_positions for entries in plan.splits.values() for e in entries if e.source is source]
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

    documents = RenderedDocuments(blocks, plan.recipe, where)
    _check_cut(plan, documents)
    return documents, row_maps, prepared


def _check_cut(plan: BuildPlan, documents: RenderedDocuments) -> None:
    """Hold the truncated documents to the contract; whole ones were held to it when they were rendered (units.py)."""
    rules = Rules(plan.tokenizer.special_ids, plan.tokenizer.vocab_size, plan.recipe.stage, plan.recipe.max_tokens)
    rules = replace(rules, overflow="truncate")
    cut = np.flatnonzero(documents.truncated)
    for first, last in shard_bounds(documents.num_tokens[cut], GATHER_TOKENS):
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
            name = renderer.sources[unit.source].name
            progress(name, done[unit.source], totals[unit.source], "rows", part=True)
            if len(totals) > 1:
                progress("all sources", sum(done), sum(totals), "rows")

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


def _complete_manifest(plan: BuildPlan, splits: dict[str, Any], partial: Path, decontaminate: str) -> dict[str, Any]:
    tokenizer = plan.tokenizer
    dropping = {"decontaminate": "drop"} if decontaminate == "drop" else {}  # a report changes no byte
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: file_sha256(partial / "tokenizer" / name) for name in names}
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
