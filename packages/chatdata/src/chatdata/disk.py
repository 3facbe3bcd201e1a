"""Writing files: whole or not at all, synced to the disk, and one clear line when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatdata.errors import BuildError, UsageError


def check_file(out: Path) -> None:
    """Raise UsageError if `out` is a folder, or if its folder does not exist."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")


def write_whole(path: Path, data: bytes) -> None:
    """Write to a hidden name next to `path`, sync, rename. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with sorted keys, whole or not at all."""
    write_whole(path, (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode())


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache, which is `$CHATDATA_CACHE` or else `chatdata` in the XDG cache folder."""
    if os.environ.get("CHATDATA_CACHE"):
        return Path(os.environ["CHATDATA_CACHE"], name)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatdata", name)


# what to do about an error, which the system's own words do not say
REMEDIES = {
    errno.EACCES: "choose another path, or change its permissions",
    errno.EDQUOT: "free some space, then call again",
    errno.EEXIST: "choose another path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path: its folder must be there",
    errno.ENOSPC: "free some space, then call again",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EROFS: "choose a path that can be written to",
}


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def describe_os_error(error: OSError) -> str:
    """The file, the system's own words, and what to do: "a/b: file exists; choose another path"."""
    if error.errno is None or not error.strerror:
        return str(error)
    path = error.filename if error.filename2 is None else error.filename2  # of two names: what was to be written
    where = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes, os.PathLike)) else ""
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}{remedy}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file or folder being written to an error of the disk: `write` does not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in DISK_ERRORS:
            error.filename = str(path)
        raise


@contextmanager
def writes_to(folder: Path, full: str) -> Iterator[None]:
    """What is inside writes to `folder`: a full disk is a BuildError that names it and ends with `full`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"{folder}: no space left on the disk{full}") from None
        raise
