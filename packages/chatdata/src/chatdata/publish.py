"""How a build appears: it grows in a locked folder beside OUT and takes its place by one rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatdata.errors import BuildError, ChatdataError
from chatdata.shards import read_manifest


def check_out(out: Path, force: bool) -> None:
    """Raise BuildError if `out` may not be written: it exists and is not empty, or with `force` is not a build."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise BuildError(f"{out}: already exists; choose another --out, or --force to replace a build")
    if not out.is_dir():
        raise BuildError(f"{out}: not a folder; --force replaces only a build")
    try:
        read_manifest(out)
    except ChatdataError:
        raise BuildError(f"{out}: not a build (no readable manifest.json); --force replaces only a build") from None


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """The folder beside `out` where the build grows: locked against a second build, removed on any failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    while True:
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise BuildError(f"{out}: another build is writing there") from None
        # the folder may have been published or removed by its owner between opening and locking
        if partial.exists() and partial.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)
    try:
        for leftover in partial.iterdir():  # of a build that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
    finally:
        if partial.exists() and partial.stat().st_ino == os.fstat(handle).st_ino:
            shutil.rmtree(partial, ignore_errors=True)
        os.close(handle)


def publish(partial: Path, out: Path) -> None:
    _sync_folder(partial)
    old = out.parent / f".{out.name}.old"
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
