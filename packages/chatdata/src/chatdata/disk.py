"""Files that are whole or not there, and on the disk when we say so."""

from __future__ import annotations

import os
from pathlib import Path

from chatdata.errors import UsageError


def check_file(out: Path) -> None:
    """Raise UsageError if `out` is a folder or would lie in none."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file to a hidden name beside `path`, sync it, rename it. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or to a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
