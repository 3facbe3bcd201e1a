"""`chatdata build`: plan, find missing work units, render them, look for scored items, write splits, publish.

Each row is rendered once, in a work unit that stays in the cache; the mixture then only gathers from the units. So a
row in two entries is rendered once, an interrupted build resumes, and memory holds counts, not text.
OUT appears by one rename, when everything is written.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.build.cache import find_units
from chatdata.build.engines import ENGINES, OnRows, start_workers
from chatdata.build.plan import BuildPlan, number_documents, place_of, rows_in_order
from chatdata.build.publish import check_out, partial_folder, publish
from chatdata.build.splits import write_split
from chatdata.build.units import FAST_ENCODER_BYTES, Renderer, Unit, cut_units, load_encoder, read_unit
from chatdata.disk import cache_folder, file_sha256, write_json, writes_to
from chatdata.errors import UsageError
from chatdata.firewall.listing import CHOICES, listing, summary
from chatdata.firewall.scored import read_scored
from chatdata.firewall.search import check
from chatdata.progress import Progress
from chatdata.render.documents import RenderedDocuments, check_cut
from chatdata.shards.manifest import FORMAT, VERSION, build_id_of
from chatdata.sources.source import forget_readers
from chatdata.tokenizer.files import save_tokenizer

MASK_MEANING = "1 = supervised: the loss of sft is computed on this token as a target; aligned with tokens, not shifted"
CACHE_FULL = " for rendered units; CHATDATA_CACHE may name another one"
NOTHING_WRITTEN = "; nothing was written there"


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

    `out` is untouched until the end, also by an error or an interruption; rendered units stay in the cache.
    decontaminate: "report" lists training documents that hold scored items in OUT-firewall.json, "drop" leaves them
    out as well, "off" does not look for them.
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
    cache = cache_folder("units")
    started = time.perf_counter()
    report: dict[str, Any] = {"workers": workers, "engine": engine, "tool_calls": {}}
    seconds: dict[str, float] = {}
    with writes_to(out, NOTHING_WRITTEN), partial_folder(out) as growing:
        # find missing work units
        row_maps = number_documents(plan)
        units = []
        for number, (source, row_map) in enumerate(row_maps.items()):
            units += cut_units(number, source, plan.tokenizer, row_map.document_of >= 0)
        paths, num_damaged = find_units(cache, {unit.key for unit in units})
        missing = [unit for unit in units if unit.key not in paths]
        report["units"] = {"rendered": len(missing), "cached": len(paths), "damaged": num_damaged}

        # render them; while workers start, do what does not depend on them
        if encoder == "auto" and sum(unit.num_bytes for unit in missing) < FAST_ENCODER_BYTES:
            encoder = "tiktoken"
        renderer = Renderer(plan.sources, plan.tokenizer, encoder, cache)
        on_rows = _show_rows(plan, units, missing, progress) if progress else None
        with writes_to(cache, CACHE_FULL), start_workers(renderer, missing, engine, workers) as render:
            with writes_to(out, NOTHING_WRITTEN):
                save_tokenizer(plan.tokenizer, growing / "tokenizer")
            scored = None
            if decontaminate != "off":
                scored = read_scored(plan.splits["train"], plan.tasks, plan.locations, plan.tokenizer)
            rendered = render(on_rows)
        if rendered:
            used = load_encoder(encoder, plan.tokenizer)
            num_texts, num_checked = sum(r.num_texts for r in rendered), sum(r.num_checked for r in rendered)
            counts = {"texts": num_texts, "texts_checked": num_checked}
            report["encoder"] = {"name": used.name, "version": used.version, **counts}
            load_encoder.cache_clear()  # gigatoken keeps up to 200 MB of pieces it has met
        paths |= {unit.key: unit.path for unit in rendered}
        batches = [batch for unit in units for batch in read_unit(paths[unit.key], plan.tokenizer.dtype)]
        documents = RenderedDocuments(batches, plan.recipe, partial(place_of, row_maps))
        if documents.truncated.any():
            check_cut(documents, plan.recipe, plan.tokenizer)
        seconds["render"] = time.perf_counter() - started

        # look for scored items
        findings, dropped = None, np.zeros(0, dtype=np.int64)
        if scored:
            findings = check(plan.splits["train"], plan.tokenizer, scored, documents, row_maps, workers)
            report["firewall"] = {"decontaminate": decontaminate, **summary(findings)}
            seconds["firewall"] = time.perf_counter() - started - seconds["render"]
            if decontaminate == "drop":
                dropped = findings.documents

        # write splits
        splits: dict[str, Any] = {}
        with ThreadPoolExecutor(1) if workers > 1 else nullcontext() as threads:
            for name, entries in plan.splits.items():
                rows = rows_in_order(plan, name, row_maps)
                left_out = dropped if name == "train" else dropped[:0]
                splits[name], report["tool_calls"][name] = write_split(
                    growing / name, entries, rows, documents, left_out, plan.tokenizer, progress, threads
                )

        # write the manifest and the report
        sources = [source.describe() for source in plan.sources]
        forget_readers()  # no row is read from here on
        seconds["total"] = time.perf_counter() - started
        report |= _run_facts(seconds, splits)
        manifest = _manifest(plan, sources, splits, growing / "tokenizer", decontaminate)
        write_json(growing / "report.json", report | {"build_id": manifest["build_id"]})
        write_json(growing / "manifest.json", manifest)

        # publish
        check_out(out, force)
        publish(growing, out, listing(findings, manifest["build_id"]) if findings else None)
    return manifest


def _show_rows(plan: BuildPlan, units: list[Unit], missing: list[Unit], progress: Progress) -> OnRows:
    """Shows how many rows are rendered, starting with those that were cached."""
    total, done = Counter[int](), Counter[int]()
    for unit in units:
        total[unit.source] += unit.num_rows

    def on_rows(unit: Unit, num_rows: int) -> None:
        done[unit.source] += num_rows
        progress(plan.sources[unit.source].name, done[unit.source], total[unit.source], "rows", part=True)
        if len(total) > 1:
            progress("all sources", done.total(), total.total(), "rows")

    not_cached = {unit.key for unit in missing}
    for unit in units:
        if unit.key not in not_cached:
            on_rows(unit, unit.num_rows)
    return on_rows


def _manifest(
    plan: BuildPlan, sources: list[Any], splits: dict[str, Any], tokenizer_folder: Path, decontaminate: str
) -> dict[str, Any]:
    tokenizer = plan.tokenizer
    dropping = {"decontaminate": "drop"} if decontaminate == "drop" else {}  # a report changes no byte
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "stage": plan.recipe.stage,
        "recipe": plan.recipe.resolved() | {"limit": plan.limit} | dropping,
        "sources": sources,
        "tokenizer": {
            "files": {name: file_sha256(tokenizer_folder / name) for name in names},
            "canary_sha256": tokenizer.canary_sha256,
            "vocab_size": tokenizer.vocab_size,
            "special_ids": tokenizer.special_ids,
        },
        "dtype": tokenizer.dtype.str,
        "mask": MASK_MEANING,
        "splits": splits,
    }
    return {**manifest, "build_id": build_id_of(manifest)}


def _run_facts(seconds: dict[str, float], splits: dict[str, Any]) -> dict[str, Any]:
    """For report.json: what two runs of the same build may differ in."""
    tools = ("chatdata", "numpy", "pyarrow", "tiktoken", "huggingface_hub")
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "duration_s": {key: round(value, 3) for key, value in seconds.items()},
        "tokens_per_s": round(sum(split["tokens"] for split in splits.values()) / seconds["total"]),
        "host": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {tool: version(tool) for tool in tools},
    }
