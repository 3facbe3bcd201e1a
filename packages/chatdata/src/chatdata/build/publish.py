"""How a build appears: it grows in a locked folder next to OUT and becomes OUT by one rename."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chatdata.disk import sync, write_json
from chatdata.errors import BuildError, ChatdataError
from chatdata.shards.manifest import read_manifest

MARK = ".chatdata-build"  # in every folder of ours that is not OUT: no other folder is ever cleared
OUR_NAMES = {"manifest.json", "report.json", "tokenizer", "train", "val", MARK}


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
        read_manifest(out)
    except ChatdataError:
        raise BuildError(f"{out}: not a build (no readable manifest.json); --force replaces only a build") from None
    others = sorted(path.name for path in out.iterdir() if path.name not in OUR_NAMES)
    if others:
        raise BuildError(f"{out}: holds more than a build ({', '.join(others[:3])}); --force would delete it too")


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


def publish(partial: Path, out: Path, scored_items: dict[str, Any] | None = None) -> None:
    """Rename the finished `partial` to `out`. An old build is moved aside first, and comes back if anything fails.

    scored_items: the list written next to `out`; without one, an old build's list is removed.
    If the process is killed at any moment, MARK tells what the folders are: it is in a partial folder until that is
    `out`, and in an old build that was moved aside. Raises BuildError if the name to move it to is taken.
    """
    sync(partial)
    old, listed = out.with_name(f".{out.name}.old"), out.with_name(f".{out.name}-firewall.partial")
    replacing = out.exists() and any(out.iterdir())
    try:
        if scored_items:  # written first: a full disk leaves no build without its list
            write_json(listed, scored_items)
        if replacing:
            if old.exists():
                raise BuildError(f"{old}: in the way and not a build's; move it or choose another --out")
            (out / MARK).touch()
            out.rename(old)
        partial.rename(out)
    except BaseException:
        listed.unlink(missing_ok=True)
        _settle(out)
        raise
    sync(out.parent)
    _settle(out)
    if scored_items:
        listed.replace(firewall_path(out))
    else:
        firewall_path(out).unlink(missing_ok=True)


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


def firewall_path(out: Path) -> Path:
    """Where the scored items found in the build `out` are listed: next to it, because a build holds only itself."""
    return out.with_name(f"{out.name}-firewall.json")
