"""The rows of one recipe entry, wherever they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from chatdata.recipe import Entry
from chatdata.sources.files import ROWS_PER_BATCH, Rows, SourceFile, read_file, records_of
from chatdata.tasks.task import Task, call_task

ROWS_PER_SEGMENT = 4096  # of a source that is not read from files by us
GENERATED_ROW_BYTES = 256  # what a generated row is taken to weigh beside rows of files


@dataclass(frozen=True, eq=False)
class Source:
    """The rows of one entry: files (Parquet, JSONL, text), a Hub dataset read by `datasets`, or a generator.

    Entries that differ only in their positions share one, so a source is equal to nothing but itself. Can be pickled:
    workers read from their own copy.
    """

    name: str
    task: Task
    files: tuple[SourceFile, ...] = ()
    revision: str | None = None
    dataset: Any = None
    split: str = ""  # split and options are a generated task's, with files in place of names
    options: Mapping[str, Any] = field(default_factory=dict)
    option_files: Mapping[str, SourceFile] = field(default_factory=dict)

    @cached_property
    def make_row(self) -> Callable[[int], Any] | None:
        """position → raw row of a generated task, else None."""
        return self.task.generate(self.split, self.options) if self.task.generate else None

    def __getstate__(self) -> dict[str, Any]:
        # a worker makes a generator that is a closure anew; a partial travels, with the word list it has read
        travels = isinstance(self.__dict__.get("make_row"), partial)
        return {key: value for key, value in self.__dict__.items() if key != "make_row" or travels}

    @cached_property
    def num_rows(self) -> int:
        return len(self.dataset) if self.dataset is not None else sum(file.num_rows for file in self.files)

    def segments(self, num_rows: int) -> list[tuple[int, int]]:
        """(rows, bytes) of consecutive runs of rows that can be read each by itself, `num_rows` in all."""
        if self.dataset is None and self.make_row is None:
            return [(segment.num_rows, segment.num_bytes) for file in self.files for segment in file.segments]
        row_bytes = GENERATED_ROW_BYTES
        if self.dataset is not None:
            row_bytes = max(1, self.dataset.data.nbytes // len(self.dataset))
        lengths = [min(ROWS_PER_SEGMENT, num_rows - first) for first in range(0, num_rows, ROWS_PER_SEGMENT)]
        return [(length, length * row_bytes) for length in lengths]

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(row, raw row) for every row where `wanted` (bool [num_rows]) holds, in source order."""
        for rows, raw in self.read_batches(0, wanted):
            yield from zip(rows.tolist(), records_of(raw), strict=True)

    def read_batches(self, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
        """(rows, raw rows) in source order, some at a time: of the rows from `first` on those that are `wanted`.

        wanted: bool [rows]. rows: int64. Raw rows are a list, or for Parquet a record batch.
        """
        if not self.files or self.dataset is not None:
            rows = np.flatnonzero(wanted) + first
            for start in range(0, len(rows), ROWS_PER_BATCH):
                part = rows[start : start + ROWS_PER_BATCH]
                yield part, [self._row(row) for row in part.tolist()]
            return
        for file, begin, run in self.files_of(first, len(wanted)):
            offset = first + run.start - begin  # of the file's rows in the source
            for rows, records in read_file(file, begin, wanted[run]):
                yield rows + offset, records

    def files_of(self, first: int, num_rows: int) -> Iterator[tuple[SourceFile, int, slice]]:
        """The files that hold rows [first, first + num_rows): each file's first row among them, and which of them."""
        before = 0
        for file in self.files:
            begin, end = max(first - before, 0), min(first + num_rows - before, file.num_rows)
            if begin < end:
                yield file, begin, slice(begin + before - first, end + before - first)
            before += file.num_rows

    def _row(self, row: int) -> Any:
        if self.dataset is not None:
            return self.dataset[row]
        make_row = self.make_row
        assert make_row is not None, self.name  # no files and no dataset: a generator
        return call_task(self.task, make_row, row)

    def content(self, first: int, num_rows: int) -> Any:
        """What rows [first, first + num_rows) are made from, as plain data without paths: equal means equal rows."""
        options = {key: str(value) for key, value in self.options.items() if key not in self.option_files}
        described: dict[str, Any] = {"options": options, "split": self.split}
        described["option_files"] = {key: file.sha256 for key, file in self.option_files.items()}
        if self.dataset is not None or self.make_row is not None:
            described |= {"first": first, "files": [file.sha256 for file in self.files]}
            if self.dataset is not None:
                from importlib.metadata import version

                described |= {"name": self.name, "datasets": version("datasets")}
            return described
        parts = [
            [file.sha256, file.path.suffix, begin, run.stop - run.start]
            for file, begin, run in self.files_of(first, num_rows)
        ]
        return {**described, "files": parts}

    def where(self, row: int) -> str:
        """A row's place for error messages: `identity.jsonl line 3`, `train-00000-of-00001.parquet row 17`."""
        if not self.files:
            return f"{self.name} row {row}"
        file, row_in_file, _ = next(self.files_of(row, 1))
        return file.where(row_in_file)

    def describe(self) -> dict[str, Any]:
        """For the manifest: name, revision, and per file its name, bytes and SHA-256.

        And where they are part of what decides the rows, the SHA-256 of a user's task file and of a dataset's rows.
        """
        files = [*self.files, *self.option_files.values()]
        described: dict[str, Any] = {"name": self.name, "revision": self.revision}
        described["files"] = [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in files]
        if self.task.code_sha256:
            described["task_code_sha256"] = self.task.code_sha256
        if self.dataset is not None:
            described["rows_sha256"] = _hash_rows(self.dataset)
        return described


def _hash_rows(dataset: Any) -> str:
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")  # str: dates
    return digest.hexdigest()


@dataclass(frozen=True)
class PlannedEntry:
    """An entry with its task, the source its rows come from, and the positions it takes of it."""

    entry: Entry
    task: Task
    source: Source
    task_positions: range
