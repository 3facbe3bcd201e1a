"""Where rows come from: a path in the recipe, `--data-dir` (a folder of Hub clones), then the Hub.

`resolve` finds the files of one recipe entry, or raises MissingSource with the command that fetches them; no row is
read before every source of a build is found. `Source.read` then streams the wanted rows in file order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatdata import hub
from chatdata.errors import MissingSource, SourceError
from chatdata.recipe import Entry, file_label
from chatdata.shards import file_sha256
from chatdata.tasks import Task

ROWS_PER_BATCH = 1024  # rows turned into Python objects at a time: about 3 MB of smoltalk


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # relative to its dataset, no machine's folders in it

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Source:
    """The rows of one entry: files (Parquet, JSONL, text), a Hub dataset read by `datasets`, or a generator."""

    name: str
    task: Task
    files: tuple[SourceFile, ...] = ()
    revision: str | None = None
    dataset: Any = None
    make_row: Callable[[int], Any] | None = None
    option_files: Mapping[str, SourceFile] = field(default_factory=dict)

    @cached_property
    def file_rows(self) -> list[int]:
        """Rows per file (for a generated or `datasets` source: one number)."""
        if self.dataset is not None:
            return [len(self.dataset)]
        return [_count_rows(file.path) for file in self.files]

    @cached_property
    def num_rows(self) -> int:
        return sum(self.file_rows)

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(row, raw row) for every row where `wanted` (bool [num_rows]) holds, in source order."""
        if self.make_row is not None:
            for row in np.flatnonzero(wanted).tolist():
                yield row, self.make_row(row)
            return
        if self.dataset is not None:
            for row in np.flatnonzero(wanted).tolist():
                yield row, self.dataset[row]
            return
        first = 0
        for file, num_rows in zip(self.files, self.file_rows, strict=True):
            part = wanted[first : first + num_rows]
            if part.any():
                for row, record in _read_file(file, part):
                    yield first + row, record
            first += num_rows

    def where(self, row: int) -> str:
        """A row's place for error messages: `identity.jsonl line 3`, `train-00000-of-00001.parquet row 17`."""
        if not self.files:
            return f"{self.name} row {row}"
        for file, num_rows in zip(self.files, self.file_rows, strict=True):
            if row < num_rows:
                if file.path.suffix == ".jsonl":
                    return f"{file.name} line {_line_of_row(file.path, row)}"
                return f"{file.name} row {row}" if file.path.suffix == ".parquet" else file.name
            row -= num_rows
        raise IndexError(row)

    def describe(self) -> dict[str, Any]:
        """For the manifest: name, revision, and per file its name, bytes and SHA-256."""
        files = [*self.files, *self.option_files.values()]
        described: dict[str, Any] = {"name": self.name, "revision": self.revision}
        described["files"] = [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in files]
        if self.task.code_sha256:
            described["task_code_sha256"] = self.task.code_sha256
        if self.dataset is not None:
            described["rows_sha256"] = _hash_rows(self.dataset)
        return described


@dataclass(frozen=True)
class Locations:
    """Where to look: the command line's folders and files."""

    recipe_folder: Path
    data_dir: Path | None = None
    identity: Path | None = None
    words: str | None = None


def resolve(entry: Entry, task: Task, locations: Locations) -> Source:
    """The source of `entry`. Raises MissingSource if it is not at hand and cannot be fetched, SourceError if empty."""
    if task.generate is not None:
        options, option_files = _resolve_options(entry, task, locations)
        make_row = task.generate(entry.split, options)
        return Source(entry.label, task, make_row=make_row, option_files=option_files)
    source = _resolve_files(entry, task, locations)
    if source.num_rows == 0:
        raise SourceError(f"{entry.label}: {source.name} has no rows")
    return source


def _resolve_files(entry: Entry, task: Task, locations: Locations) -> Source:
    if task.name == "identity" and locations.identity is not None:
        return _local_source(locations.identity, locations.identity.name, entry, task)
    if entry.path is not None:
        return _local_source(locations.recipe_folder / entry.path, file_label(entry.path), entry, task)
    repo = entry.repo or task.hub
    if repo is None:
        flag = "pass --identity FILE" if task.name == "identity" else "give it `path` or `repo` in the recipe"
        raise MissingSource(f"{entry.label}: no file given: {flag} (JSONL or Parquet, a conversation per line)")
    pattern = f"{entry.subset or 'data'}/{entry.split}-*.parquet"
    fetch = _fetch_command(repo, entry.revision, f"--include '{pattern}' ")
    looked = ""
    if locations.data_dir is not None:
        clone = locations.data_dir / repo
        files = sorted(clone.glob(pattern))
        if files:
            hub.check_complete(files, f"{entry.label}: {clone}", f"; {fetch}")
            return _hub_source(repo, entry, task, clone, files, None)
        looked = f"no {pattern} in {clone}; "
    if task.hub is None and task.kind == "conversation":
        return _chat_source(repo, entry, task, locations)
    folder, revision = _snapshot(repo, pattern, entry, looked, fetch)
    files = sorted(folder.glob(pattern))
    if not files:
        raise MissingSource(f"{entry.label}: {looked}{repo} at {revision[:12]} has no file {pattern}")
    hub.check_complete(files, f"{entry.label}: {repo} at {revision[:12]}")
    return _hub_source(repo, entry, task, folder, files, revision)


def _chat_source(repo: str, entry: Entry, task: Task, locations: Locations) -> Source:
    """A dataset of any layout `datasets` understands: the whole repository is fetched, `datasets` finds the split."""
    clone = locations.data_dir / repo if locations.data_dir is not None else None
    fetch = _fetch_command(repo, entry.revision, "")
    if clone is not None and clone.is_dir():
        folder, revision = clone, None
        hub.check_all_complete(folder, f"{entry.label}: {clone}", f"; {fetch}")
    else:
        looked = f"no folder {clone}; " if clone is not None else ""
        folder, revision = _snapshot(repo, "*", entry, looked, fetch)
        hub.check_all_complete(folder, f"{entry.label}: {repo} at {revision[:12]}")
    try:
        files, dataset = hub.load_split(folder, entry.subset, entry.split)
    except SourceError as error:
        raise error.at(f"{entry.label}: {repo}") from error.__cause__
    return _hub_source(repo, entry, task, folder.resolve(), files, revision, dataset)


def _fetch_command(repo: str, revision: str | None, include: str) -> str:
    pinned = f"--revision {revision} " if revision else ""
    return f"hf download {repo} --repo-type dataset {pinned}{include}--local-dir DIR/{repo}, then --data-dir DIR"


def _snapshot(repo: str, pattern: str, entry: Entry, looked: str, fetch: str) -> tuple[Path, str]:
    try:
        return hub.snapshot(repo, pattern, entry.revision)
    except MissingSource as error:
        raise MissingSource(f"{entry.label}: {looked}{error}; {fetch}") from error.__cause__
    except SourceError as error:  # the Hub has no such thing: no command would fetch it
        raise MissingSource(f"{entry.label}: {looked}{error}") from None


def _hub_source(
    repo: str, entry: Entry, task: Task, root: Path, files: list[Path], revision: str | None, dataset: Any = None
) -> Source:
    named = tuple(SourceFile(path, path.relative_to(root).as_posix()) for path in files)
    name = " ".join(part for part in (repo, entry.subset, entry.split) if part)
    return Source(name, task, named, revision, dataset)


def _local_source(path: Path, label: str, entry: Entry, task: Task) -> Source:
    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    absent = [file for file in files if not file.is_file()]
    if absent or not files:
        raise MissingSource(f"{entry.label}: {path}: no such file")
    for file in files:
        if file.suffix not in (".jsonl", ".parquet", *((".txt",) if task.kind == "text" else ())):
            raise SourceError(f"{file}: expected .jsonl or .parquet{' or .txt' if task.kind == 'text' else ''}")
    folder = label.rpartition("/")[0]
    named = tuple(SourceFile(file, f"{folder}/{file.name}" if folder else file.name) for file in files)
    return Source(label, task, named)


def _resolve_options(entry: Entry, task: Task, locations: Locations) -> tuple[dict[str, Any], dict[str, SourceFile]]:
    """The task's options with files in place of names; the files, to be recorded in the manifest."""
    options, files = dict(entry.options), {}
    for key, option in task.options.items():
        if not option.is_file:
            continue
        value = options[key]
        if key == "words" and locations.words is not None:
            value = locations.words
        elif "://" not in value:
            value = str(locations.recipe_folder / value)
        flag = f"pass --words FILE or set {key} in the recipe" if key == "words" else f"set {key} in the recipe"
        path = hub.fetch_url(value, flag) if "://" in value else Path(value)
        if not path.is_file():
            raise MissingSource(f"{entry.label}: {path}: no such file; {flag}")
        file = SourceFile(path, path.name)
        pinned = options.get(f"{key}_sha256")
        if pinned and file.sha256 != pinned:
            again = f"; to download it again delete {path}" if "://" in value else ""
            raise SourceError(
                f"{entry.label}: {file.name} has SHA-256 {file.sha256}, "
                f"but the recipe pins {key}_sha256 = {pinned}{again}"
            )
        options[key], files[key] = path, file
    return options, files


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    return 1 if path.stat().st_size else 0


def _read_file(file: SourceFile, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
    if file.path.suffix == ".parquet":
        yield from _read_parquet(file.path, wanted)
    elif file.path.suffix == ".jsonl":
        yield from _read_jsonl(file, wanted)
    else:
        try:
            yield 0, {"text": file.path.read_bytes().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise SourceError(f"{file.name}: not UTF-8 at byte {error.start}") from None


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _read_parquet(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
    first = 0
    for batch in _open_parquet(path).iter_batches(batch_size=ROWS_PER_BATCH):
        rows = np.flatnonzero(wanted[first : first + batch.num_rows])
        if len(rows):
            try:
                records = batch.take(rows).to_pylist()
            except UnicodeDecodeError:
                raise SourceError(f"{path.name}: text that is not UTF-8 in rows {first} … {rows[-1] + first}") from None
            yield from zip((rows + first).tolist(), records, strict=True)
        first += batch.num_rows


def _read_jsonl(file: SourceFile, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
    row = 0
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():  # a blank line is not a row
                continue
            if wanted[row]:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
                    reason = getattr(error, "msg", str(error))
                    column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                    raise SourceError(f"{file.name} line {number}: not valid JSON{column}: {reason}") from None
                yield row, record
            row += 1


def _line_of_row(path: Path, row: int) -> int:
    with path.open("rb") as lines:
        filled = (number for number, line in enumerate(lines, start=1) if line.strip())
        return next(number for i, number in enumerate(filled) if i == row)


def _hash_rows(dataset: Any) -> str:
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")  # str: dates
    return digest.hexdigest()
