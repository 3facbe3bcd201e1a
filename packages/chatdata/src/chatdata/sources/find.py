"""Where rows come from: a path in the recipe, `--data-dir` (a folder of Hub clones), then the Hub.

`resolve` finds the files of one recipe entry, or raises MissingSource with the command that downloads them. A build
reads no row before it has found every source; sources/source.py then reads them.
"""

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from chatdata.disk import home_path
from chatdata.errors import MissingSource, SourceError
from chatdata.recipe import Entry, file_label
from chatdata.sources import hub
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source
from chatdata.tasks.task import Task

_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAKE_IDENTITY = "; `chatdata identity PERSONA --out FILE` makes one"


class Locations(Struct, frozen=True):
    """Where to look: the command line's folders and files."""

    recipe_folder: Path
    data_dir: Path | None = None
    identity: Path | None = None
    words: str | None = None
    commits: Mapping[str, str | None] = {}  # of sources by name, where the recipe gives none: `main` may have moved


class PlannedEntry(Struct, frozen=True):
    """An entry with its task, the source of its rows, and which of the source's task positions it takes.

    side: int32, ascending, the task positions on its side of a source that is divided by val_share. taken: of these,
    or else of all task positions.
    """

    entry: Entry
    task: Task
    source: Source
    taken: range
    side: np.ndarray | None = None

    @property
    def task_positions(self) -> np.ndarray:
        """int32 [len(taken)], ascending."""
        if self.side is not None:
            return self.side[self.taken.start : self.taken.stop]
        return np.arange(self.taken.start, self.taken.stop, dtype=np.int32)


def resolve(entry: Entry, task: Task, locations: Locations) -> Source:
    """The source of `entry`.

    Raises MissingSource if it is neither here nor can be downloaded, SourceError if it is empty or has the wrong form.
    """
    if task.generate is not None:
        options, option_files = _resolve_options(entry, locations)
        source = Source(entry.label, task, split=entry.split, options=options, option_files=option_files)
        source.make_row  # noqa: B018 - a word list that cannot be used is an error before anything is rendered
        return source
    try:
        source = _resolve_files(entry, task, locations)
        if source.num_rows == 0:
            raise SourceError(f"{source.name} has no rows")
        return source
    except SourceError as error:
        raise error.at(entry.label) from error.__cause__


def _resolve_files(entry: Entry, task: Task, locations: Locations) -> Source:
    if task.name == "identity" and locations.identity is not None:
        return _local_source(locations.identity, locations.identity.name, entry, task)
    if entry.path is not None:
        return _local_source(locations.recipe_folder / home_path(entry.path), file_label(entry.path), entry, task)
    repo = entry.repo or task.hub
    if repo is None:
        identity = task.name == "identity"
        flag = "pass --identity FILE" if identity else "give it `path` or `repo` in the recipe"
        form = f"(JSONL or Parquet, a conversation per line{MAKE_IDENTITY if identity else ''})"
        raise MissingSource(f"no file given: {flag} {form}")
    name = " ".join(part for part in (repo, entry.subset, entry.split) if part)
    entry = replace(entry, revision=entry.revision or locations.commits.get(name))
    pattern = f"{escape(entry.subset or 'data')}/{escape(entry.split)}-*.parquet"
    clone = locations.data_dir / repo if locations.data_dir is not None else None
    is_usual = clone is not None and any(clone.glob(pattern))
    any_layout = task.hub is None and task.kind == "conversation" and not is_usual
    if any_layout:  # all of the repository; `datasets` finds the files of the split
        pattern = "*"
    looked, remedy, revision = "", f"; {_fetch_command(repo, entry.revision, pattern)}", None
    if clone is not None and (is_usual or (any_layout and clone.is_dir())):
        folder, place = clone, str(clone)
    else:
        if clone is not None:
            looked = f"no folder {clone}; " if any_layout else f"no {pattern} in {clone}; "
        folder, revision = _snapshot(repo, pattern, entry, looked, remedy)
        place, remedy = f"{repo} at {revision[:12]}", ""
    files, dataset = sorted(folder.glob(pattern)), None
    if any_layout:
        _check_repository(folder, place, remedy)
        try:
            files, dataset = hub.load_split(folder, entry.subset, entry.split)
        except SourceError as error:
            raise error.at(repo) from error.__cause__
        folder = folder.resolve()
    elif not files:
        raise MissingSource(f"{looked}{place} has no file {pattern}")
    else:
        check_complete(files, place, remedy)
    named = tuple(_source_file(path, path.relative_to(folder).as_posix()) for path in files)
    return Source(name, task, named, revision, dataset, reading=entry.reading)


def check_complete(files: list[Path], what: str, remedy: str = "") -> None:
    """Raise MissingSource if a set of `…-00001-of-00004…` files has gaps, or if two sets are mixed."""
    numbered = [match for file in files if (match := _NUMBERED.search(file.name))]
    totals = sorted({int(match[2]) for match in numbered})
    numbers = {int(match[1]) for match in numbered}
    if len(totals) > 1 or len(numbers) < len(numbered):
        kinds = " and ".join(f"-of-{total:05d}" for total in totals)
        raise MissingSource(f"{what} mixes files of different versions ({kinds}): {files[0].name}, …, {files[-1].name}")
    if numbered and len(numbered) < len(files):
        other = next(file.name for file in files if not _NUMBERED.search(file.name))
        raise MissingSource(f"{what} has {other} next to numbered files: it would be read as one of them")
    if missing := sorted(set(range(totals[0])) - numbers) if totals else []:
        some = f"{totals[0]} files missing (number {', '.join(f'{number:05d}' for number in missing[:5])})"
        raise MissingSource(f"{what} is incomplete: {len(missing)} of {some}{remedy}")


def _check_repository(folder: Path, what: str, remedy: str = "") -> None:
    """`check_complete` for every numbered set in a repository."""
    sets: dict[tuple[Path, str], list[Path]] = {}
    for path in sorted(folder.rglob("*-of-*")):
        place = path.relative_to(folder)
        match = _NUMBERED.search(path.name)
        if match and not any(part.startswith(".") for part in place.parts):
            sets.setdefault((place.with_name(path.name[: match.start()]), path.suffix), []).append(path)
    for (place, _), files in sets.items():
        check_complete(files, f"{what}: {place.as_posix()}", remedy)


def _fetch_command(repo: str, revision: str | None, pattern: str) -> str:
    pinned = f"--revision {revision} " if revision else ""
    include = f"--include '{pattern}' " if pattern != "*" else ""
    return f"hf download {repo} --repo-type dataset {pinned}{include}--local-dir DIR/{repo}, then --data-dir DIR"


def _snapshot(repo: str, pattern: str, entry: Entry, looked: str, remedy: str) -> tuple[Path, str]:
    try:
        return hub.snapshot(repo, pattern, entry.revision)
    except SourceError as error:  # no command would download what the Hub has not
        way_out = remedy if isinstance(error, MissingSource) else ""
        raise MissingSource(f"{looked}{error}{way_out}") from error.__cause__


def _local_source(path: Path, label: str, entry: Entry, task: Task) -> Source:
    files = [path]
    if "*" in path.name:  # only * is a wildcard, only in the name, and as in a shell not for a dot at its start
        found = sorted(path.parent.glob(escape(path.name).replace("[*]", "*")))
        files = [file for file in found if path.name[0] == "." or file.name[0] != "."]
    if wrong := next((file for file in files if not file.is_file()), None if files else path):
        make = MAKE_IDENTITY if task.name == "identity" else ""
        instead = f"{path} takes files only" if wrong != path else f"name a file, or {path}/*.jsonl"
        raise MissingSource(f"{wrong}: a folder; {instead}{make}" if wrong.is_dir() else f"{wrong}: no such file{make}")
    suffixes = (".jsonl", ".json", ".parquet", *((".txt",) if task.kind == "text" else ()))
    for file in files:
        if file.suffix not in suffixes:
            hint = "; plain text is for stage base" if file.suffix == ".txt" else ""
            raise SourceError(f"{file}: expected {', '.join(suffixes[:-1])} or {suffixes[-1]}{hint}")
    folder = label.rpartition("/")[0]
    named = tuple(_source_file(file, f"{folder}/{file.name}" if folder else file.name) for file in files)
    return Source(label, task, named, reading=entry.reading)


def _source_file(path: Path, name: str) -> SourceFile:
    """A file of rows or options. Raises SourceError for a name that no manifest can hold, and for a file of Git LFS."""
    if name != name.encode("utf-8", "replace").decode():
        raise SourceError(f"{name!a}: the name is not UTF-8; rename the file")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise SourceError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` where you cloned it")
    return SourceFile(path, name)


def _resolve_options(entry: Entry, locations: Locations) -> tuple[dict[str, Any], dict[str, SourceFile]]:
    """The task's options with paths in place of file names, and those files, for the manifest."""
    options, files = dict(entry.options), {}
    for key in entry.file_options:
        value = options[key]
        if key == "words" and locations.words is not None:
            value = locations.words
        elif "://" not in value:
            value = str(locations.recipe_folder / home_path(value))
        flag = f"pass --words FILE or set {key} in the recipe" if key == "words" else f"set {key} in the recipe"
        path = hub.fetch_url(value, flag) if "://" in value else Path(value)
        if not path.is_file():
            raise MissingSource(f"{entry.label}: {path}: no such file; {flag}")
        file = _source_file(path, path.name)
        pinned = options.get(f"{key}_sha256")
        if pinned and file.sha256 != pinned:
            again = f"; to download it again delete {path}" if "://" in value else ""
            recipe = f"the recipe pins {key}_sha256 = {pinned}{again}"
            raise SourceError(f"{entry.label}: {file.name} has SHA-256 {file.sha256}, but {recipe}")
        options[key], files[key] = path, file
    return options, files
