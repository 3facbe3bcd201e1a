"""Builds at an address: `hf://datasets/OWNER/NAME[@REVISION]`, or a folder of any fsspec store (`s3://`, `gs://` …).

A build is fetched once, into `builds/<build_id>` of the cache, whole or not at all: its files come into
`builds/.tmp-<machine>/<build_id>`, each is compared with the manifest's SHA-256, and the folder is renamed. One process
fetches at a time; it takes over the whole files of a fetch that was killed. `builds/.addresses` holds which build was
found last at an address.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatdata.disk import CACHE_UNUSABLE, DAY_S, MACHINE, cache_folder, sync, write_whole, writes_to
from chatdata.errors import FormatError, MissingSource, UsageError, first_line
from chatdata.progress import Progress, no_progress, say, shown_progress
from chatdata.shards.manifest import build_files, file_problem, read_manifest
from chatdata.sources.hub import commit_of, download, requests_to

AT_ONCE = 8  # files transferred at the same time
ABANDONED_S = 7 * DAY_S  # what another machine has not finished by then is removed


@dataclass(frozen=True)
class Place:
    """Where an address leads: a dataset repository on the Hub, or a folder of a store."""

    name: str  # the address, in full
    repo: str = ""  # OWNER/NAME on the Hub
    revision: str = ""
    store: Any = None  # fsspec.AbstractFileSystem
    root: str = ""  # the folder in it


def place_of(address: str) -> Place:
    """Raises UsageError if this is no address, or if the package for its store is missing."""
    from fsspec.core import url_to_fs

    address = address.rstrip("/")
    if address.startswith("hf://"):
        found = re.fullmatch(r"hf://(?:datasets/)?([^/@]+/[^/@]+)(?:@(.+))?", address)
        if found is None:
            raise UsageError(f"{address}: must be hf://datasets/OWNER/NAME[@REVISION]")
        repo, revision = found[1], found[2] or "main"
        return Place(f"hf://datasets/{repo}@{revision}", repo, revision)
    options = {"auto_mkdir": True} if address.startswith("file:") else {}
    try:
        store, root = url_to_fs(address, **options)
    except (ImportError, ValueError) as error:  # fsspec names the package
        raise UsageError(f"{address}: {first_line(error)}") from None
    return Place(address, store=store, root=root)


def is_address(path: str | Path) -> bool:
    return "://" in str(path)


def local_build(address: str | Path, expect: str | None = None, *, quiet: bool = False) -> Path:
    """The folder of a build: a local path as it is; a build at an address in the cache, fetched if it is not there yet.

    A branch costs one request, a commit none once its build is there. Without network, the build that was fetched last
    from this address is used, and a line on standard error says so.
    expect: the build_id, or at least its first 12 digits. quiet: show no progress.
    Raises MissingSource if the address cannot be reached and was not fetched before, SourceError if the Hub has no such
    repository, FormatError if there is no build, it is damaged or not the expected one, UsageError.
    """
    if is_address(address):
        return _fetched(place_of(str(address)), expect, quiet)
    if expect is not None:
        _require(address, read_manifest(Path(address))["build_id"], expect)
    return Path(address)


def cached_build(build_id: str) -> Path | None:
    """The build with this id, if it was fetched from some address."""
    folder = cache_folder("builds") / build_id
    return folder if (folder / "manifest.json").is_file() else None


def _require(where: str | Path, build_id: str, expect: str | None) -> None:
    if expect is not None and (len(expect) < 12 or not build_id.startswith(expect)):
        raise FormatError(f"{where}: build {build_id}, but expected {expect}")


def _fetched(place: Place, expect: str | None, quiet: bool) -> Path:
    """The build at an address, in the cache."""
    record = cache_folder("builds") / ".addresses" / hashlib.sha256(place.name.encode()).hexdigest()[:32]
    build_id, *commit = record.read_text().split() if record.is_file() else [""]
    folder = cached_build(build_id)
    try:
        with requests_to(f"{place.name}: ", place.repo, place.revision):
            if place.repo and not re.fullmatch(r"[0-9a-f]{40}", place.revision):
                place = replace(place, revision=commit_of(place.repo, place.revision))
            if folder is None or commit != [place.revision]:
                folder = _fetch(place, expect, quiet)
                write_whole(record, f"{folder.name} {place.revision}".encode())
    except MissingSource as error:
        if folder is None:
            raise
        say(f"{error}; using the build fetched before, {folder.name}", error=True)
    _require(place.name, folder.name, expect)
    return folder


def _fetch(place: Place, expect: str | None, quiet: bool) -> Path:
    """The folder of the build, fetched unless the cache has it."""
    builds = cache_folder("builds")
    first = builds / f".tmp-{MACHINE}"
    with writes_to(builds / ".addresses", CACHE_UNUSABLE, CACHE_UNUSABLE), (builds / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in builds.glob(".tmp-*"):
            if time.time() - old.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(old, ignore_errors=True)
        first.mkdir(exist_ok=True)
        _get_files(place, {"manifest.json": 0}, first, no_progress)
        try:
            manifest = read_manifest(first)
        except FormatError as error:
            raise FormatError(str(error).replace(str(first), place.name)) from None
        _require(place.name, manifest["build_id"], expect)
        folder = builds / manifest["build_id"]
        if not folder.is_dir():
            partial = first / folder.name
            _fill(place, manifest, partial, quiet)
            (first / "manifest.json").replace(partial / "manifest.json")
            for path in (*partial.rglob("*"), partial):
                sync(path)
            with suppress(FileExistsError):  # another machine with the same cache was faster
                partial.rename(folder)
            shutil.rmtree(first)
    return folder


def _fill(place: Place, manifest: dict[str, Any], partial: Path, quiet: bool) -> None:
    """Fetch all files of a build but its manifest. Raises FormatError for the first that is not what that says."""
    for name in ("tokenizer", *manifest["splits"]):
        (partial / name).mkdir(parents=True, exist_ok=True)
    files = {path.relative_to(partial).as_posix(): record for _, path, record in build_files(partial, manifest)}
    del files["manifest.json"]
    wanted = {n: r.get("bytes", 0) for n, r in files.items() if not r or file_problem(partial / n, r)}
    with shown_progress(quiet) as progress:
        fetched = _get_files(place, wanted, partial, progress)
    for name, record in files.items():
        if problem := file_problem(partial / name, record):
            if fetched:
                (fetched / name).resolve().unlink(missing_ok=True)  # in the Hub's cache it would stay damaged
            raise FormatError(f"{place.name}/{name}: {problem}; the build was not fetched")


def _get_files(place: Place, sizes: dict[str, int], into: Path, progress: Progress) -> Path | None:
    """Files that are at an address, linked or copied into a folder. Returns where they are in the Hub's cache."""
    source = download(place.repo, list(sizes), place.revision) if place.repo else None

    def get(name: str) -> None:
        target = into / name
        target.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            if source is None:
                place.store.get_file(f"{place.root}/{name}", str(target))
                return
            try:
                os.link((source / name).resolve(), target)
            except OSError:  # another disk
                shutil.copyfile(source / name, target)

    transfer("fetch", sizes, get, progress)
    return source


def transfer(what: str, sizes: dict[str, int], one: Callable[[str], object], progress: Progress) -> None:
    """Call `one` with each name, in AT_ONCE threads; after an error, start no more. sizes: bytes, for the progress."""
    done, total = 0, sum(sizes.values())
    progress(what, done, total, "bytes")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for size, _ in zip(sizes.values(), pool.map(one, sizes), strict=True):
            done += size
            progress(what, done, total, "bytes")
