"""The rows of one recipe entry, wherever they come from, in segments so that several workers can share a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from chatdata.arrow import to_arrow
from chatdata.disk import file_sha256
from chatdata.errors import SourceError
from chatdata.tasks.task import Task, call_task

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 1024  # rows turned into Python objects at a time: about 3 MB of smoltalk
SEGMENT_BYTES = 4 << 20  # of text: what a worker renders in half a second
ROWS_PER_SEGMENT = 4096  # where rows do not come from our own reading of files
GENERATED_ROW_BYTES = 256  # the assumed size of a generated row
# A row group can only be read from its start. A worker that continues where it stopped does not read it again; with one
# worker for each of 16 parts a group is decoded 8.5 times, 0.04 CPU-seconds per million tokens.
MAX_GROUP_PARTS = 16

Rows: TypeAlias = "list[Any] | pa.RecordBatch"


class Segment(NamedTuple):
    """Consecutive rows of a file."""

    num_rows: int
    num_bytes: int
    offset: int = 0  # bytes before it in a JSONL file
    line: int = 0  # lines before it


@dataclass(frozen=True)
class SourceFile:
    """A file of rows: .parquet, .jsonl, or text, which is one row."""

    path: Path
    name: str  # relative to its dataset, without folders of this machine

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)

    @cached_property
    def segments(self) -> list[Segment]:
        if self.path.suffix == ".parquet":
            return _parquet_segments(self.path)
        if self.path.suffix == ".jsonl":
            return _jsonl_segments(self.path)
        return [Segment(1, size)] if (size := self.path.stat().st_size) else []

    @cached_property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)


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

    @cached_property
    def make_row(self) -> Callable[[int], Any] | None:
        """position → raw row of a generated task, else None."""
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
        row_bytes = GENERATED_ROW_BYTES
        if self.dataset is not None:
            row_bytes = max(1, self.dataset.data.nbytes // len(self.dataset))
        lengths = [min(ROWS_PER_SEGMENT, num_rows - first) for first in range(0, num_rows, ROWS_PER_SEGMENT)]
        return [(length, length * row_bytes) for length in lengths]

    def read(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(row, raw row) for every row where `wanted` (bool [num_rows]) holds, in source order."""
        for rows, raw in self.read_batches(0, wanted):
            yield from zip(rows.tolist(), raw if isinstance(raw, list) else raw.to_pylist(), strict=True)

    def read_batches(self, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
        """(rows, raw rows) in source order, some at a time: the `wanted` ones (bool [n]) of the rows from `first` on.

        rows: int64. Raw rows: a list, or for Parquet a record batch. SourceErrors name the file and the row or line.
        """
        if not self.files or self.dataset is not None:
            rows = np.flatnonzero(wanted) + first
            make_row = self.make_row
            read_row = partial(call_task, self.task, make_row) if make_row else self.dataset.__getitem__
            for start in range(0, len(rows), ROWS_PER_BATCH):
                part = rows[start : start + ROWS_PER_BATCH]
                yield part, [read_row(row) for row in part.tolist()]
            return
        readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl}
        for file, begin, run in self.files_of(first, len(wanted)):
            offset = first + run.start - begin  # of the file's rows in the source
            if wanted[run].any():
                for rows, raw in readers.get(file.path.suffix, _read_text)(file, begin, wanted[run]):
                    yield rows + offset, raw

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
        described: dict[str, Any] = {"options": options, "split": self.split}
        described["option_files"] = {key: file.sha256 for key, file in self.option_files.items()}
        if self.dataset is not None or self.task.generate is not None:
            described |= {"first": first, "files": [file.sha256 for file in self.files]}
            if self.dataset is not None:
                described |= {"name": self.name, "datasets": version("datasets")}
            return described
        files = self.files_of(first, num_rows)
        parts = [[file.sha256, file.path.suffix, begin, run.stop - run.start] for file, begin, run in files]
        return {**described, "files": parts}

    def where(self, row: int) -> str:
        """A row's place for error messages: `identity.jsonl line 3` (blank lines count), `train.parquet row 17`."""
        if not self.files:
            return f"{self.name} row {row}"
        file, row, _ = next(self.files_of(row, 1))
        if file.path.suffix == ".jsonl":
            with file.path.open("rb") as lines:
                filled = (number for number, line in enumerate(lines, start=1) if line.strip())
                return f"{file.name} line {next(number for i, number in enumerate(filled) if i == row)}"
        return f"{file.name} row {row}" if file.path.suffix == ".parquet" else file.name

    def describe(self) -> dict[str, Any]:
        """For the manifest: name, revision, files with bytes and SHA-256; SHA-256 of a user's task, of a dataset."""
        described: dict[str, Any] = {"name": self.name, "revision": self.revision, "files": []}
        for file in (*self.files, *self.option_files.values()):
            size = file.path.stat().st_size
            described["files"].append({"name": file.name, "bytes": size, "sha256": file.sha256})
        if self.task.code_sha256:
            described["task_code_sha256"] = self.task.code_sha256
        if self.dataset is not None:
            digest = hashlib.sha256()
            for row in self.dataset:  # str: dates
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
            described["rows_sha256"] = digest.hexdigest()
        return described


def _read_text(file: SourceFile, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    try:
        yield np.zeros(1, dtype=np.int64), [{"text": file.path.read_bytes().decode("utf-8-sig")}]
    except UnicodeDecodeError as error:
        raise SourceError(f"{file.name}: not UTF-8 at byte {error.start}") from None


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise SourceError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _parquet_segments(path: Path) -> list[Segment]:
    metadata = _open_parquet(path).metadata
    segments = []
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        num_parts = max(1, min(MAX_GROUP_PARTS, group.total_byte_size // SEGMENT_BYTES, group.num_rows))
        cuts = [group.num_rows * i // num_parts for i in range(num_parts + 1)]
        segments += [Segment(b - a, group.total_byte_size // num_parts) for a, b in pairwise(cuts)]
    return segments


# file → (row, batch that starts there, batches after it): where reading a file stopped, if there is more of it
_stopped: dict[tuple[Any, ...], tuple[int, Any, Any]] = {}


def _read_parquet(file: SourceFile, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    stop = first + len(wanted)
    status = file.path.stat()
    key = (file.path, status.st_ino, status.st_mtime_ns, status.st_size)
    at, batch, batches = _stopped.pop(key, (stop, None, None))
    _stopped.clear()
    if batches is None or at > first:  # start with the row group that holds row `first`
        opened = _open_parquet(file.path)
        num_groups = opened.metadata.num_row_groups
        starts = np.cumsum([0, *(opened.metadata.row_group(i).num_rows for i in range(num_groups))])
        group = int(np.searchsorted(starts, first, side="right")) - 1
        at, batch = int(starts[group]), None
        # one thread: the work is parallel over processes
        batches = opened.iter_batches(ROWS_PER_BATCH, row_groups=list(range(group, num_groups)), use_threads=False)
    while True:
        if batch is None:
            batch = next(batches)
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
        if at == stop:
            break
    batch = next(batches, None) if batch is None else batch
    if batch is not None:  # not the end of the file
        _stopped[key] = at, batch, batches


def forget_readers() -> None:
    """Close the file whose reading stopped before its end."""
    _stopped.clear()


def _jsonl_segments(path: Path) -> list[Segment]:
    segments, num_rows, begin, begin_line, offset = [], 0, 0, 0, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            offset += len(line)
            num_rows += bool(line.strip())  # a blank line is not a row
            if offset - begin >= SEGMENT_BYTES:
                segments.append(Segment(num_rows, offset - begin, begin, begin_line))
                num_rows, begin, begin_line = 0, offset, number
    if num_rows:
        segments.append(Segment(num_rows, offset - begin, begin, begin_line))
    return segments


def _read_jsonl(file: SourceFile, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    row = 0
    for segment in file.segments:  # the last one that starts at or before `first`
        if row + segment.num_rows > first:
            break
        row += segment.num_rows
    stop, rows, records = first + len(wanted), [], []
    with file.path.open("rb") as lines:
        lines.seek(segment.offset)
        for number, line in enumerate(lines, start=segment.line + 1):
            if not line.strip():
                continue
            if row >= first and wanted[row - first]:
                rows.append(row)
                records.append(_parse_line(file, number, line))
                if len(rows) == ROWS_PER_BATCH:
                    yield np.array(rows), records
                    rows, records = [], []
            row += 1
            if row >= stop:
                break
    if rows:
        yield np.array(rows), records


def _parse_line(file: SourceFile, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{file.name} line {number}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        reason = getattr(error, "msg", str(error)).removesuffix(" at")  # json's words for where it is
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SourceError(f"{file.name} line {number}: not valid JSON{column}: {reason}") from None
