"""`chatdata build`: plan, find missing work units, render them, look for scored items, write splits, publish.

Each row is rendered once, in a work unit that stays in the cache; the mixture then only gathers from the units. So a
row in two entries is rendered once, an interrupted build resumes, and memory holds counts, not text.
OUT grows in a locked folder next to it and appears by one rename, when everything is written.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chatdata import version_of
from chatdata.build.engines import ENGINES, OnRows, start_workers
from chatdata.build.plan import BuildPlan, invalid_rows, number_documents, place_of, rows_in_order
from chatdata.build.units import FAST_ENCODER_BYTES, Renderer, Unit, cut_units, find_units, load_encoder, read_unit
from chatdata.disk import CACHE_UNUSABLE, cache_folder, check_free, check_replaceable, sync, write_json, writes_to
from chatdata.errors import BuildError, ChatdataError, UsageError
from chatdata.firewall.listing import CHOICES, listing, summary
from chatdata.firewall.scored import read_scored
from chatdata.firewall.search import check
from chatdata.progress import Progress, no_progress
from chatdata.render.documents import RenderedDocuments, check_cut
from chatdata.render.model_format import check_canaries
from chatdata.shards.manifest import FORMAT, MARK, VERSION, build_id_of, other_files, read_manifest
from chatdata.shards.write import write_split
from chatdata.sources.source import forget_readers
from chatdata.tokenizer.files import save_tokenizer

MASK_MEANING = "1 = supervised: the loss of sft is computed on this token as a target; aligned with tokens, not shifted"
CACHE_FULL = f" for rendered units{CACHE_UNUSABLE}"
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
    against: Sequence[str] = (),
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Build `plan` into the folder `out` and return its manifest: the same bytes for any workers, engine and encoder.

    `out` is untouched until the end, also by an error or an interruption; rendered units stay in the cache.
    decontaminate: "report" lists training documents that hold scored items in OUT/firewall.json, "drop" leaves them
    out as well, "off" does not look for them. against: files of your own scored items, FILE[:QUESTION[,CHOICES...]].
    Raises UsageError for an unknown engine, encoder or `decontaminate`, and for `against` with "off"; BuildError if
    `out` exists (with `force`: if it is not a build), if another build writes there, if a policy of the recipe is
    "error" or leaves nothing, or if the disk is full; EncoderError, and the named error of the first row that cannot be
    rendered or searched for. With `workers` over 1 a script needs `if __name__ == "__main__":` around the call.
    """
    for value, known in ((engine, ENGINES), (decontaminate, CHOICES)):
        if value not in known:
            raise UsageError(f"{value!r}: give one of {', '.join(known)}")
    if against and decontaminate == "off":
        raise UsageError("--against is given, but --decontaminate off searches for nothing")
    out = out.resolve()  # through links: the folder they lead to is written, not the link
    row_maps = number_documents(plan)
    rows = {split: rows_in_order(plan, split, row_maps) for split in plan.splits}
    cache = cache_folder("units")
    started = time.perf_counter()
    report: dict[str, Any] = {"workers": workers, "engine": engine, "tool_calls": {}, "invalid": {}}
    seconds: dict[str, float] = {}
    with new_folder(out, partial(check_out, force=force)) as growing:
        if plan.model_format:
            check_canaries(plan.model_format)

        # find missing work units
        units = []
        for number, (source, row_map) in enumerate(row_maps.items()):
            units += cut_units(number, source, plan.tokenizer, row_map.document_of >= 0, plan.chat_format)
        paths, num_damaged = find_units(cache, {unit.key for unit in units})
        missing = [unit for unit in units if unit.key not in paths]
        report["units"] = {"rendered": len(missing), "cached": len(paths), "damaged": num_damaged}

        # render them; while workers start, do what does not depend on them
        if encoder == "auto" and sum(unit.num_bytes for unit in missing) < FAST_ENCODER_BYTES:
            encoder = "tiktoken"
        renderer = Renderer(plan.sources, plan.tokenizer, encoder, cache, plan.recipe.chat_format)
        unusable = CACHE_UNUSABLE if missing else ""
        with writes_to(cache, CACHE_FULL, unusable), start_workers(renderer, missing, engine, workers) as render:
            with writes_to(out, NOTHING_WRITTEN):
                save_tokenizer(plan.tokenizer, growing / "tokenizer")
            scored = None
            if decontaminate != "off":
                scored = read_scored(plan.splits["train"], plan.tasks, plan.locations, plan.tokenizer, against)
            rendered = render(_show_rows(plan, units, paths.keys(), progress))
        if rendered and not plan.model_format:
            used = load_encoder(encoder, plan.tokenizer)
            texts = {"texts": sum(u.num_texts for u in rendered), "texts_checked": sum(u.num_checked for u in rendered)}
            report["encoder"] = {"name": used.name, "version": used.version, **texts}
            load_encoder.cache_clear()  # gigatoken keeps up to 200 MB of pieces it has met
        paths |= {unit.key: unit.path for unit in rendered}
        batches = [batch for unit in units for batch in read_unit(paths[unit.key], plan.tokenizer.dtype)]
        documents = RenderedDocuments(batches, plan.recipe, partial(place_of, row_maps))
        check_cut(documents, plan.recipe, plan.tokenizer)
        seconds["render"] = time.perf_counter() - started

        # look for scored items
        findings, dropped, dropping = None, np.zeros(0, dtype=np.int64), {}
        if scored:
            findings = check(plan.splits["train"], scored, documents, row_maps, workers)
            report["firewall"] = {"decontaminate": decontaminate, **summary(findings)}
            seconds["firewall"] = time.perf_counter() - started - seconds["render"]
            if decontaminate == "drop":
                dropped = findings.documents
                dropping = {"decontaminate": "drop", **scored.decided_by}

        # write splits
        splits: dict[str, Any] = {}
        with ThreadPoolExecutor(1) if workers > 1 else nullcontext() as threads:
            for name, entries in plan.splits.items():
                left_out = dropped if name == "train" else dropped[:0]
                report["invalid"][name] = invalid_rows(documents, row_maps, rows[name]["document"])
                splits[name], report["tool_calls"][name] = write_split(
                    growing / name, entries, rows.pop(name), documents, left_out, plan.tokenizer, progress, threads
                )

        # write the manifest and the report
        manifest = _manifest(plan, splits, growing / "tokenizer", dropping)
        forget_readers()  # no row is read from here on
        seconds["total"] = time.perf_counter() - started
        report |= _run_facts(seconds, splits)
        if findings:
            write_json(growing / "firewall.json", listing(findings, manifest["build_id"]))
        write_json(growing / "report.json", report | {"build_id": manifest["build_id"]})
        write_json(growing / "manifest.json", manifest)
        # new_folder publishes it
    return manifest


def _show_rows(plan: BuildPlan, units: list[Unit], cached: Container[str], progress: Progress) -> OnRows:
    """Shows how many rows are rendered, starting with those of units whose keys are `cached`."""
    total, done = Counter[int](), Counter[int]()
    for unit in units:
        total[unit.source] += unit.num_rows

    def on_rows(unit: Unit, num_rows: int) -> None:
        done[unit.source] += num_rows
        progress(plan.sources[unit.source].name, done[unit.source], total[unit.source], "rows", part=True)
        if len(total) > 1:
            progress("all sources", done.total(), total.total(), "rows")

    for unit in units:
        if unit.key in cached:
            on_rows(unit, unit.num_rows)
    return on_rows


def _manifest(plan: BuildPlan, splits: dict[str, Any], folder: Path, dropping: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a build. folder: of the tokenizer's files.

    dropping: what decided which documents the firewall dropped. A report of them changes no byte.
    """
    tokenizer = plan.tokenizer
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "stage": plan.recipe.stage,
        "chat_format": plan.chat_format,
        "recipe": plan.recipe.resolved() | {"limit": plan.limit} | dropping,
        "sources": [source.describe() for source in plan.sources],
        "tokenizer": {
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()},
            **{key: getattr(tokenizer, key) for key in ("canary_sha256", "vocab_size", "special_ids")},
        },
        "dtype": tokenizer.dtype.str,
        "mask": MASK_MEANING,
        "splits": splits,
    }
    return {**manifest, "build_id": build_id_of(manifest)}


def _run_facts(seconds: dict[str, float], splits: dict[str, Any]) -> dict[str, Any]:
    """For report.json: what two runs of the same build may differ in."""
    packages = ("chatdata", "numpy", "pyarrow", "tiktoken", "huggingface_hub")
    return {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "duration_s": {key: round(value, 3) for key, value in seconds.items()},
        "tokens_per_s": round(sum(split["tokens"] for split in splits.values()) / seconds["total"]),
        "host": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version_of(name) for name in packages},
    }


def check_out(out: Path, force: bool) -> None:
    """Raise BuildError if `out` may not be written: it exists and is not empty, or with `force` is not only a build."""
    if out.is_symlink() and not out.exists():
        raise BuildError(f"{out}: a link to nowhere; remove it or choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise BuildError(f"{out}: already exists; choose another --out, or --force to replace a build")
    if not out.is_dir():
        raise BuildError(f"{out}: not a folder; --force replaces only a build")
    try:
        others = other_files(out, read_manifest(out))
    except ChatdataError as error:
        raise BuildError(f"{error}; --force replaces only a build that this chatdata can read") from None
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise BuildError(f"{out}: holds more than a build: {others[0].relative_to(out)}{more}; --force would delete it")


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """The folder next to `out` where the build grows: locked against a second build, removed on any failure.

    First cleans up after a build that was killed: its partial folder is cleared, and an old build that was moved aside
    comes back, or is removed if the new one is complete. Raises BuildError if another build holds the folder, or if
    the folder is not a build's.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    while True:
        if partial.exists() and any(partial.iterdir()) and not (partial / MARK).exists():
            raise BuildError(f"{partial}: in the way and not a build's; move it or choose another --out")
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BuildError(f"{out}: another build is writing there; wait for it, or choose another --out") from None
        # the folder may have been published or removed by its owner between opening and locking
        if partial.exists() and partial.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)
    try:
        (partial / MARK).touch()
        for leftover in partial.iterdir():
            if leftover.name != MARK:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        _settle(out)
        yield partial
    finally:
        if partial.exists() and partial.stat().st_ino == os.fstat(handle).st_ino:
            _remove(partial)
        os.close(handle)


@contextmanager
def new_folder(out: Path, check: Callable[[Path], None] = check_free) -> Iterator[Path]:
    """A folder to fill, which is published as `out` at the end. `check` says before and after whether `out` may be
    written: by default, it raises BuildError if `out` exists and is not empty."""
    check(out)
    check_replaceable(out)
    with writes_to(out, NOTHING_WRITTEN), partial_folder(out.resolve()) as growing:  # through links
        yield growing
        check(out)
        publish(growing, out.resolve())


def publish(partial: Path, out: Path) -> None:
    """Rename the finished `partial` to `out`. An old build is moved aside first, and comes back if anything fails.

    If the process is killed at any moment, MARK tells what the folders are: it is in a partial folder until that is
    `out`, and in an old build that was moved aside. Raises BuildError if the name to move it to is taken.
    """
    sync(partial)
    old = out.with_name(f".{out.name}.old")
    replacing = out.exists() and any(out.iterdir())
    try:
        if replacing:
            if old.exists():
                raise BuildError(f"{old}: in the way and not a build's; move it or choose another --out")
            (out / MARK).touch()
            out.rename(old)
        partial.rename(out)
    except BaseException:
        _settle(out)
        raise
    sync(out.parent)
    _settle(out)


def _settle(out: Path) -> None:
    """Finish or undo a replacement that stopped halfway, and remove the marks."""
    old = out.with_name(f".{out.name}.old")
    if (old / MARK).exists():
        if not out.exists():
            old.rename(out)
        elif (out / "manifest.json").is_file():
            _remove(old)
    (out / MARK).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Delete a folder of ours, its mark last: until then the rest is known to be ours."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MARK):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with suppress(OSError):  # a file could not be deleted: the next build tries again
        folder.rmdir()
