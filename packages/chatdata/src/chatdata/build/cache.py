"""The cache of work units: files `units/<key>-<hash of the content>.arrow` below the cache folder.

The second hash shows a damaged file when it is read, and makes two builds that render the same unit write the same
file. Next to `units`, the folder `urls` holds files downloaded by URL (sources/hub.py).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chatdata.disk import file_sha256

UNIT_SUFFIX, PARTIAL_SUFFIX = ".arrow", ".tmp"
DAY_S = 86_400
ABANDONED_S = DAY_S  # a temporary file this old was left by a build that was killed: no unit takes an hour


@dataclass(frozen=True)
class CachedUnit:
    """A unit on disk, or a half-written one."""

    path: Path
    num_bytes: int
    last_used: float  # seconds since 1970


def cached_units(folder: Path) -> list[CachedUnit]:
    """All units of the cache, half-written ones included, least recently used first."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.endswith((UNIT_SUFFIX, PARTIAL_SUFFIX)):
            with suppress(FileNotFoundError):  # another build renamed or pruned it a moment ago
                stat = entry.stat()
                found.append(CachedUnit(Path(entry.path), stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda unit: (unit.last_used, unit.path))


def find_units(folder: Path, keys: set[str]) -> tuple[dict[str, Path], int]:
    """key → path of the units with these keys that are in the cache and whole; how many were damaged.

    Half-written units of this machine's ended processes are removed.
    """
    found = {}
    for unit in cached_units(folder):
        key, _, rest = unit.path.stem.partition("-" if unit.path.suffix == UNIT_SUFFIX else ".")
        if unit.path.suffix == UNIT_SUFFIX:
            found[key] = unit.path
        else:  # <key>.<host>-<process id>; those of other machines are left to `prune`
            host, _, pid = rest.rpartition("-")
            if host == os.uname().nodename and pid.isdigit() and not _is_running(int(pid)):
                unit.path.unlink(missing_ok=True)
    there = found.keys() & keys
    paths = {key: found[key] for key in there if take_unit(found[key])}
    return paths, len(there) - len(paths)


def take_unit(path: Path) -> bool:
    """Whether the unit is whole. If it is, it is marked as used now; if not, it is removed."""
    whole = False
    try:
        whole = file_sha256(path)[:32] == path.stem.partition("-")[2]
        os.utime(path) if whole else path.unlink()
    except OSError:  # pruned a moment ago, in a shared cache that is read-only, or not readable for us
        return path.is_file() and whole
    return whole


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def prune(folder: Path, unused_days: float) -> list[CachedUnit]:
    """Remove units that no build has used for `unused_days`, and half-written ones a day old. Returns those removed."""
    now, removed = time.time(), []
    for unit in cached_units(folder):
        age_s = ABANDONED_S if unit.path.suffix == PARTIAL_SUFFIX and unused_days else unused_days * DAY_S
        if now - unit.last_used >= age_s:
            unit.path.unlink(missing_ok=True)
            removed.append(unit)
    return removed
