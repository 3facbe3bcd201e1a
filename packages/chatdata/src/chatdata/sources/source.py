"""The rows of one recipe entry, wherever they come from, in segments so that several workers can share a file."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BufferedReader
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from chatdata.arrow import to_arrow, without_nulls
from chatdata.conversation import AS_WRITTEN, Reading
from chatdata.errors import SourceError, first_line
from chatdata.sources.file import Place, SourceFile, open_parquet
from chatdata.sources.jsonl import ROWS_PER_BATCH, read_segments, read_text
from chatdata.tasks.task import Task, call_task

ROWS_PER_SEGMENT = 4096  # where rows do not come from our own reading of files
GENERATED_ROW_BYTES = 256  # the assumed size of a generated row

Rows: TypeAlias = list[Any] | pa.RecordBatch
Batches = Iterator[tuple[np.ndarray, Rows]]


@dataclass(frozen=True, eq=False)
class Source:
    """Files (Parquet, JSONL, text), a Hub dataset read by `datasets`, or a generator. Can be pickled, for workers.

    Entries that differ only in their positions share one, so a source equals nothing but itself.
    """

    name: str
    task: Task
    files: tuple[SourceFile, ...] = ()
    revision: str | None = None
    dataset: Any = None
    split: str = ""  # split and options are a generated task's, with files in place of their names
    options: Mapping[str, Any] = field(default_factory=dict)
    option_files: Mapping[str, SourceFile] = field(default_factory=dict)
    reading: Reading = AS_WRITTEN

    @cached_property
    def make_row(self) -> Callable[[int], Any] | None:
        """position → raw row of a generated task, else None."""
        with ExitStack() as files:
            for file in self.option_files.values():
                files.enter_context(file.open())
            return self.task.generate(self.split, self.options) if self.task.generate else None

    def __getstate__(self) -> dict[str, Any]:
        # a worker makes its own generator if it is a closure; a partial travels, with the word list it has read
        return {key: value for key, value in self.__dict__.items() if key != "make_row" or isinstance(value, partial)}

    @cached_property
    def num_rows(self) -> int:
        return len(self.dataset) if self.dataset is not None else sum(file.num_rows for file in self.files)

    def segments(self, num_rows: int) -> list[tuple[int, int]]:
        """(rows, bytes) of consecutive runs of rows that can be read on their own, `num_rows` in all."""
        if self.dataset is None and self.task.generate is None:
            return [(segment.num_rows, segment.num_bytes) for file in self.files for segment in file.segments]
        row_bytes = max(1, self.dataset.data.nbytes // len(self.dataset)) if self.dataset else GENERATED_ROW_BYTES
        lengths = [min(ROWS_PER_SEGMENT, num_rows - first) for first in range(0, num_rows, ROWS_PER_SEGMENT)]
        return [(length, length * row_bytes) for length in lengths]

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(row, raw row) for every row where `wanted` (bool [num_rows]) holds, in source order."""
        for rows, raw in self.read_batches(0, wanted):
            yield from zip(rows.tolist(), self.rows_of(rows, raw), strict=True)

    def rows_of(self, rows: np.ndarray, raw: Rows) -> list[Any]:
        """Raw rows (numbered `rows`) as Python objects. In conversations from Arrow a null is no key: it fills structs
        with nulls.

        Text that is not UTF-8 raises SourceError; with `invalid = "drop"` that is the row's value.
        """
        try:
            found = raw if isinstance(raw, list) else raw.to_pylist()
        except UnicodeDecodeError:
            if self.reading.invalid == "error":
                raise SourceError(f"{self.where(int(rows[0]))} … {rows[-1]}: text that is not UTF-8") from None
            if len(raw) == 1:
                return [SourceError("text that is not UTF-8")]
            return [row for i in range(len(raw)) for row in self.rows_of(rows[i : i + 1], raw[i : i + 1])]
        from_arrow = self.dataset is not None or not isinstance(raw, list)
        return without_nulls(found) if from_arrow and self.task.rows_are_conversations else found

    def read_batches(self, first: int, wanted: np.ndarray) -> Batches:
        """(rows, raw rows) in source order, some at a time: the `wanted` ones (bool [n]) of the rows from `first` on.

        rows: int64. Raw rows: a list, or for Parquet a record batch. SourceErrors name the file and the row or line;
        with `invalid = "drop"` that of a row which cannot be parsed is raised by `call_task`, being its value.
        """
        if not self.files or self.dataset is not None:
            rows = np.flatnonzero(wanted) + first
            make_row = self.make_row
            read_row = partial(call_task, self.task, make_row) if make_row else self.dataset.__getitem__
            for start in range(0, len(rows), ROWS_PER_BATCH):
                part = rows[start : start + ROWS_PER_BATCH]
                raw = [read_row(row) for row in part.tolist()]
                yield part, self._without_ignored(raw) if self.reading.ignore else raw
            return
        for file, begin, run in self.files_of(first, len(wanted)):
            offset = first + run.start - begin  # of the file's rows in the source
            if wanted[run].any():
                with file.open() as opened:
                    if file.path.suffix == ".parquet":
                        batches = _read_parquet(file, opened, begin, wanted[run])
                    else:
                        read = read_segments if file.path.suffix in (".jsonl", ".json") else read_text
                        batches = read(opened, file.segments, begin, wanted[run])
                    for rows, raw in batches:
                        if self.reading.invalid == "error" and SourceError in (kinds := list(map(type, raw))):
                            bad = kinds.index(SourceError)
                            raise raw[bad].at(self.where(int(rows[bad]) + offset))
                        yield rows + offset, self._without_ignored(raw) if self.reading.ignore else raw

    def _without_ignored(self, raw: Rows) -> Rows:
        if not isinstance(raw, list):
            return raw.select([name for name in raw.schema.names if name not in self.reading.ignore])
        ignored = self.reading.ignore
        return [{key: row[key] for key in row if key not in ignored} if isinstance(row, dict) else row for row in raw]

    def files_of(self, first: int, num_rows: int) -> Iterator[tuple[SourceFile, int, slice]]:
        """The files that hold rows [first, first + num_rows): each file's first row among them, and which of them."""
        before = 0
        for file in self.files:
            begin, end = max(first - before, 0), min(first + num_rows - before, file.num_rows)
            if begin < end:
                yield file, begin, slice(begin + before - first, end + before - first)
            before += file.num_rows

    def content(self, first: int, num_rows: int) -> Any:
        """What decides rows [first, first + num_rows), as plain data without paths: equal means equal rows."""
        options = {key: str(value) for key, value in self.options.items() if key not in self.option_files}
        described: dict[str, Any] = {"options": options, "split": self.split, "reading": self.reading._asdict()}
        described["option_files"] = {key: file.sha256 for key, file in self.option_files.items()}
        if self.dataset is not None or self.task.generate is not None:
            return described | {"first": first, "rows": self.rows_sha256}
        files = self.files_of(first, num_rows)
        parts = [[file.sha256, file.path.suffix, begin, run.stop - run.start] for file, begin, run in files]
        return {**described, "files": parts}

    def where(self, row: int) -> str:
        """A row's place for error messages."""
        return str(next(self.places(np.array([row]))))

    def places(self, rows: np.ndarray) -> Iterator[Place]:
        """The place of each of `rows` (ascending). Reads no more than the segments of a JSONL file that hold them."""
        first = 0
        for file in self.files:
            yield from file.places(rows[(rows >= first) & (rows < first + file.num_rows)] - first)
            first += file.num_rows
        if not self.files:
            yield from (Place(self.name, "row", row) for row in rows.tolist())

    @cached_property
    def rows_sha256(self) -> str | None:
        """SHA-256 of all rows that `datasets` reads, else None."""
        if self.dataset is None:
            return None
        digest = hashlib.sha256()
        for row in self.dataset:  # str: dates
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the manifest: name, revision, files with bytes and SHA-256; SHA-256 of a user's task, of a dataset."""
        read = (*self.files, *self.option_files.values())
        files = [{"name": file.name, "sha256": file.sha256, "bytes": file.state[0][0]} for file in read]
        more = {"task_code_sha256": self.task.code_sha256, "rows_sha256": self.rows_sha256}
        given = {key: value for key, value in more.items() if value}
        return {"name": self.name, "revision": self.revision, "files": files, **given}


# file → (row, batch that starts there, batches after it): where reading a file stopped, if there is more of it
_stopped: dict[tuple[Any, ...], tuple[int, Any, Any]] = {}


def _read_parquet(file: SourceFile, opened: BufferedReader, first: int, wanted: np.ndarray) -> Batches:
    stop, key = first + len(wanted), (file.path, *file.state)
    at, batch, batches = _stopped.pop(key, (stop, None, None))
    _stopped.clear()
    if batches is None or at > first:  # start with the row group that holds row `first`
        parquet = open_parquet(file.name, os.fdopen(os.dup(opened.fileno()), "rb"))  # open for longer than `opened`
        num_groups = parquet.metadata.num_row_groups
        starts = np.cumsum([0, *(parquet.metadata.row_group(i).num_rows for i in range(num_groups))])
        group = int(np.searchsorted(starts, first, side="right")) - 1
        at, batch = int(starts[group]), None
        # one thread: the work is parallel over processes
        batches = parquet.iter_batches(ROWS_PER_BATCH, row_groups=list(range(group, num_groups)), use_threads=False)
    while True:
        try:
            batch = next(batches, None) if batch is None else batch
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file.name}: cannot be read from row {at} on: {first_line(error)}") from None
        if at == stop:
            break
        if batch is None:
            raise SourceError(f"{file.name}: ends after {at} rows, {stop - at} too early")
        begin, end = max(at, first), min(at + batch.num_rows, stop)
        if begin < end:
            rows = np.flatnonzero(wanted[begin - first : end - first]) + begin
            if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
                yield rows, batch.slice(int(rows[0]) - at, len(rows))
            elif len(rows):
                yield rows, batch.take(to_arrow(rows - at))
        if at + batch.num_rows > stop:  # its last rows are the next part's first
            break
        at, batch = at + batch.num_rows, None
    if batch is not None:  # not the end of the file
        _stopped[key] = at, batch, batches


def forget_readers() -> None:
    """Close the file whose reading stopped before its end."""
    _stopped.clear()
