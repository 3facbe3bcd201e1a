"""The cache folder, and the rendered units in it: `units/<what it is made from>-<what it holds>.arrow`.

Both halves of a name are hashes, so a damaged file is seen when it is read, and two builds that render the same unit
write the same file. The folder `urls` beside it holds files fetched by URL (hub.py).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chatdata.disk import cache_folder, file_sha256

UNIT_SUFFIX, PARTIAL_SUFFIX = ".arrow", ".tmp"
DAY_S = 86_400
ABANDONED_S = DAY_S  # a temporary file this old belongs to a build that was killed: no unit takes an hour


@dataclass(frozen=True)
class CachedUnit:
    """A unit on disk, or what is left of one."""

    path: Path
    num_bytes: int
    last_used: float  # seconds since 1970


def units_folder() -> Path:
    return cache_folder() / "units"


def cached_units(folder: Path) -> list[CachedUnit]:
    """All units of the cache, and what killed builds left of others; least recently used first."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.endswith((UNIT_SUFFIX, PARTIAL_SUFFIX)):
            with suppress(FileNotFoundError):  # another build renamed or pruned it a moment ago
                stat = entry.stat()
                found.append(CachedUnit(Path(entry.path), stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda unit: (unit.last_used, unit.path))


def find_units(folder: Path) -> dict[str, Path]:
    """key → path of every unit that is there."""
    paths = (unit.path for unit in cached_units(folder) if unit.path.suffix == UNIT_SUFFIX)
    return {path.name.partition("-")[0]: path for path in paths}


def take_unit(path: Path) -> bool:
    """Whether the unit is whole. Then it is marked as used now; otherwise it is removed."""
    whole = False
    try:
        whole = file_sha256(path)[:32] == path.stem.partition("-")[2]
        os.utime(path) if whole else path.unlink()
    except OSError:  # pruned a moment ago, a cache that is shared and read-only, a file we may not read
        return path.is_file() and whole
    return whole


def remove_abandoned(folder: Path) -> None:
    """Remove what processes of this machine that have ended left half written. Another machine's, `prune` removes."""
    for unit in cached_units(folder):
        if unit.path.suffix == PARTIAL_SUFFIX:
            host, _, pid = unit.path.stem.partition(".")[2].rpartition("-")
            if host == os.uname().nodename and pid.isdigit() and not _is_running(int(pid)):
                unit.path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def partial_name(key: str) -> str:
    """Where this process writes a unit until it is whole."""
    return f"{key}.{os.uname().nodename}-{os.getpid()}{PARTIAL_SUFFIX}"


def prune(folder: Path, unused_days: float) -> list[CachedUnit]:
    """Remove the units that no build has used for `unused_days`, and what killed builds left. Returns what went."""
    now, removed = time.time(), []
    for unit in cached_units(folder):
        age_s = ABANDONED_S if unit.path.suffix == PARTIAL_SUFFIX and unused_days else unused_days * DAY_S
        if now - unit.last_used >= age_s:
            unit.path.unlink(missing_ok=True)
            removed.append(unit)
    return removed
