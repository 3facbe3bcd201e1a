"""Builds at an address: `hf://datasets/OWNER/NAME[@REVISION]`, or a folder of any fsspec store (`s3://`, `gs://` …).

A build is fetched once, into `builds/<build_id>` of the cache, whole or not at all: its files come into
`builds/.tmp-<host>/<build_id>`, each is compared with the manifest's SHA-256, and the folder is renamed. One process
fetches at a time; it takes over the whole files of a fetch that was killed. `builds/.addresses` holds which build was
found last at an address. A push sends the data first and the manifest last; on the Hub, all in one commit.
"""

import fcntl
import hashlib
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from chatdata.disk import CACHE_UNUSABLE, cache_folder, file_sha256, sync, write_whole, writes_to
from chatdata.errors import BuildError, FormatError, MissingSource, UsageError, first_line
from chatdata.progress import Progress, no_progress, say, shown_progress
from chatdata.shards.manifest import build_files, file_problem, read_manifest
from chatdata.sources.hub import commit_of, download, requests_to

# names that files of some build have
OURS = r"(train|val)/(tokens|mask|offsets|index)-\d{5}\.\w+|tokenizer/[^/]+|(manifest|report|firewall)\.json"


class Place(NamedTuple):
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
    if found := re.fullmatch(r"hf://(?:datasets/)?([^/@]+/[^/@]+)(?:@(.+))?", address):
        repo, revision = found[1], found[2] or "main"
        return Place(f"hf://datasets/{repo}@{revision}", repo, revision)
    if address.startswith("hf://") or "://" not in address:
        raise UsageError(f"{address}: must be hf://datasets/OWNER/NAME[@REVISION], or a folder like s3://BUCKET/mid")
    try:
        store, root = url_to_fs(address, **({"auto_mkdir": True} if address.startswith("file:") else {}))
    except (ImportError, ValueError) as error:  # fsspec names the package
        raise UsageError(f"{address}: {first_line(error)}") from None
    return Place(address, store=store, root=root)


def local_build(address: str | Path, expect: str | None = None, *, quiet: bool = False) -> Path:
    """The folder of a build: a local path as it is; a build at an address in the cache, fetched if it is not there yet.

    A branch costs one request, a commit none once its build is there. Without network, the build that was fetched last
    from this address is used, and a line on standard error says so.
    expect: the build_id, or at least its first 12 digits. quiet: show no progress.
    Raises MissingSource if the address cannot be reached and was not fetched before, SourceError if the Hub has no such
    repository, FormatError if there is no build, it is damaged or not the expected one, UsageError.
    """
    folder = _fetched(place_of(str(address)), expect, quiet) if "://" in str(address) else Path(address)
    if expect is not None:
        _require(address, read_manifest(folder), expect)
    return folder


def cached_build(build_id: str) -> Path | None:
    """The build with this id, if it was fetched from some address."""
    folder = cache_folder("builds") / build_id
    return folder if (folder / "manifest.json").is_file() else None


def _require(where: str | Path, manifest: dict[str, Any], expect: str | None) -> None:
    if expect is not None and len(expect) < 12:
        raise UsageError(f'expect "{expect}": give at least the first 12 digits of a build_id')
    if expect is not None and not manifest["build_id"].startswith(expect):
        raise FormatError(f"{where}: build {manifest['build_id']}, but expected {expect}")


def _fetched(place: Place, expect: str | None, quiet: bool) -> Path:
    """The build at an address, in the cache."""
    record = cache_folder("builds") / ".addresses" / hashlib.sha256(place.name.encode()).hexdigest()[:32]
    build_id, *commit = record.read_text().split() if record.is_file() else [""]
    folder = cached_build(build_id)
    try:
        with requests_to(f"{place.name}: ", place.repo, place.revision):
            if place.repo and not re.fullmatch(r"[0-9a-f]{40}", place.revision):
                place = place._replace(revision=commit_of(place.repo, place.revision))
            if folder is None or commit != [place.revision]:
                folder = _fetch(place, expect, quiet)
                write_whole(record, f"{folder.name} {place.revision}".encode())
    except MissingSource as error:
        if folder is None:
            raise
        say(f"{error}; using the build fetched before, {folder.name}", error=True)
    return folder


def _fetch(place: Place, expect: str | None, quiet: bool) -> Path:
    """The folder of the build, fetched unless the cache has it. Raises FormatError for the first damaged file."""
    builds = cache_folder("builds")
    first = builds / f".tmp-{platform.node()}"
    with writes_to(builds / ".addresses", CACHE_UNUSABLE, CACHE_UNUSABLE), (builds / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _get_files(place, {"manifest.json": 0}, first, no_progress)
        try:
            manifest = read_manifest(first)
        except FormatError as error:
            raise FormatError(str(error).replace(str(first), place.name)) from None
        _require(place.name, manifest, expect)
        folder, partial = builds / manifest["build_id"], first / manifest["build_id"]
        if folder.is_dir():
            return folder
        files = {path.relative_to(partial).as_posix(): record for _, path, record in build_files(partial, manifest)}
        del files["manifest.json"]
        wanted = {name: r.get("bytes", 0) for name, r in files.items() if not r or file_problem(partial / name, r)}
        with shown_progress(quiet) as progress:
            _get_files(place, wanted, partial, progress)
        _check_hashes(partial, files, place.name, "fetched")
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the Hub library's notes
        (first / "manifest.json").replace(partial / "manifest.json")
        for path in (*partial.rglob("*"), partial):
            sync(path)
        with suppress(OSError):  # another host with the same cache was faster
            partial.rename(folder)
        shutil.rmtree(first)
    return folder


def _check_hashes(folder: Path, files: dict[str, dict[str, Any]], where: str | Path, done: str) -> None:
    """Raises FormatError for the first file that differs from the manifest's record of it."""
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(file_problem, map(folder.joinpath, files), files.values()))
    for name, problem in zip(files, problems, strict=True):
        if problem:
            raise FormatError(f"{where}/{name}: {problem}; the build was not {done}")


def _get_files(place: Place, sizes: dict[str, int], into: Path, progress: Progress) -> None:
    """Copy files into a folder, and remove those there that are not at the address."""

    def get(name: str) -> None:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            place.store.get_file(f"{place.root}/{name}", str(into / name))

    for name in sizes:
        if (into / name).is_dir():  # stores copy a folder of that name as one
            shutil.rmtree(into / name)
        (into / name).unlink(missing_ok=True)
    if place.repo:
        download(place.repo, list(sizes), place.revision, into=into)
    else:
        transfer("fetch", sizes, get, progress)


def transfer(what: str, sizes: dict[str, int], one: Callable[[str], object], progress: Progress) -> None:
    """Call `one` with each name, in 8 threads; after an error, start no more. sizes: bytes, for the progress."""
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(8) as pool:
        for size, _ in zip(sizes.values(), pool.map(one, sizes), strict=True):
            done += size
            progress(what, done, total, "bytes")


def push(folder: Path, manifest: dict[str, Any], address: str, card: str, progress: Progress) -> dict[str, Any]:
    """Make `address` hold exactly this build, and on the Hub its card as README.md. Files of an older build go.

    folder, manifest: of an open build. A repository that does not exist is made, a private one.
    A push that was killed is taken up again: the Hub says which files it has, and in other stores a file that has the
    right size is read back and compared. Returns address, build_id, bytes, and the names of removed files. Raises
    FormatError if a file here is not what the manifest says, BuildError if something else is at the address,
    MissingSource if it cannot be reached or changes meanwhile, SourceError if you have no access, UsageError for no
    address.
    """
    place = place_of(address)
    found = {path: record for _, path, record in build_files(folder, manifest) if path.is_file()}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    _check_hashes(folder, dict(zip(sizes, found.values(), strict=True)), folder, "pushed")
    with requests_to(f"{place.name}: ", place.repo, place.revision, "cannot be uploaded to"):
        removed = (_push_to_hub if place.repo else _push_to_store)(place, folder, sizes, card, progress)
    return {"address": place.name, "build_id": manifest["build_id"], "removed": removed, "bytes": sum(sizes.values())}


def _push_to_hub(place: Place, folder: Path, sizes: dict[str, int], card: str, progress: Progress) -> list[str]:
    """The names of removed files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented

    disable_progress_bars()  # ours counts all files
    api = HfApi()
    branch: dict[str, Any] = {"repo_id": place.repo, "repo_type": "dataset", "revision": place.revision}
    api.create_repo(place.repo, repo_type="dataset", private=True, exist_ok=True)
    info = api.dataset_info(place.repo, revision=place.revision)
    stale = _stale(place, {file.rfilename for file in info.siblings or ()}, sizes)
    files = {name: CommitOperationAdd(name, folder / name) for name in sizes}
    transfer("push", sizes, lambda name: api.preupload_lfs_files(additions=[files[name]], **branch), progress)
    others: list[Any] = [CommitOperationAdd("README.md", card.encode()), *map(CommitOperationDelete, stale)]
    what: dict[str, Any] = {"commit_message": "A chatdata build", "parent_commit": info.sha}
    api.create_commit(operations=[*files.values(), *others], **branch, **what)
    return stale


def _push_to_store(place: Place, folder: Path, sizes: dict[str, int], card: str, progress: Progress) -> list[str]:
    """The names of removed files."""
    store, root = place.store, place.root
    there = {path[len(root) :].strip("/"): info["size"] for path, info in store.find(root, detail=True).items()}
    stale = _stale(place, set(there), sizes)

    def send(name: str) -> None:
        if there.get(name) == sizes[name]:
            with store.open(f"{root}/{name}", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == file_sha256(folder / name):
                    return
        store.put_file(str(folder / name), f"{root}/{name}")

    transfer("push", {name: size for name, size in sizes.items() if name != "manifest.json"}, send, progress)
    send("manifest.json")
    for name in stale:
        store.rm_file(f"{root}/{name}")
    return stale


def _stale(place: Place, there: set[str], sizes: dict[str, int]) -> list[str]:
    """Files at the address that a build may have and this one has not. Raises BuildError if there is no build."""
    ours = {name for name in there if re.fullmatch(OURS, name)}
    others = sorted(there - {"README.md", ".gitattributes"} - ours | there & {"manifest.json"})
    if others and not {"manifest.json", "train/tokens-00000.npy"} <= there:
        raise BuildError(f"{place.name}: not a build, it holds {others[0]}; choose another address")
    return sorted(ours - sizes.keys())
