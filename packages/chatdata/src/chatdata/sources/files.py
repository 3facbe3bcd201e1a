"""Rows of one file: Parquet, JSONL or text. In segments, so that several workers read parts of one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from chatdata.disk import file_sha256
from chatdata.errors import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 1024  # rows turned into Python objects at a time: about 3 MB of smoltalk
SEGMENT_BYTES = 4 << 20  # of text: what a worker renders in half a second
# A row group can only be read from its start. A worker that goes on where it stopped need not, so each decodes a group
# once; with one worker for each of 16 parts that makes 8.5 times, 0.04 CPU-seconds per million tokens.
MAX_GROUP_PARTS = 16

Rows: TypeAlias = "list[Any] | pa.RecordBatch"


class Segment(NamedTuple):
    """Rows of a file that follow each other. `offset` and `line` say where a JSONL segment starts."""

    num_rows: int
    num_bytes: int
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class SourceFile:
    """A file of rows: .parquet, .jsonl, or text, which is one row."""

    path: Path
    name: str  # relative to its dataset, no machine's folders in it

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def segments(self) -> list[Segment]:
        if self.path.suffix == ".parquet":
            return _parquet_segments(self.path)
        if self.path.suffix == ".jsonl":
            return _jsonl_segments(self.path)
        return [Segment(1, self.num_bytes)] if self.num_bytes else []

    @cached_property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    def where(self, row: int) -> str:
        """A row's place for error messages; in JSONL its line, counted from 1, blank ones too."""
        if self.path.suffix == ".jsonl":
            with self.path.open("rb") as lines:
                filled = (number for number, line in enumerate(lines, start=1) if line.strip())
                return f"{self.name} line {next(number for i, number in enumerate(filled) if i == row)}"
        return f"{self.name} row {row}" if self.path.suffix == ".parquet" else self.name


def read_file(file: SourceFile, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    """(rows, raw rows), some at a time, of the rows from `first` on that are `wanted` (bool). See Source.read.

    Raises SourceError if the file cannot be read, naming it and the row or line.
    """
    if not wanted.any():
        return
    if file.path.suffix == ".parquet":
        yield from _read_parquet(file.path, first, wanted)
    elif file.path.suffix == ".jsonl":
        yield from _read_jsonl(file, first, wanted)
    else:
        try:
            yield np.zeros(1, dtype=np.int64), [{"text": file.path.read_bytes().decode("utf-8-sig")}]
        except UnicodeDecodeError as error:
            raise SourceError(f"{file.name}: not UTF-8 at byte {error.start}") from None


def records_of(rows: Rows) -> list[Any]:
    """Raw rows as Python objects."""
    return rows if isinstance(rows, list) else rows.to_pylist()


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
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        num_parts = max(1, min(MAX_GROUP_PARTS, group.total_byte_size // SEGMENT_BYTES, group.num_rows))
        cuts = [group.num_rows * i // num_parts for i in range(num_parts + 1)]
        segments += [Segment(b - a, group.total_byte_size // num_parts) for a, b in pairwise(cuts)]
    return segments


def _read_parquet(path: Path, first: int, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    from chatdata.arrow import to_arrow

    stop = first + len(wanted)
    status = path.stat()
    key = (path, status.st_ino, status.st_mtime_ns, status.st_size)
    at, batch, batches = _stopped.pop(key, (stop, None, None))
    _stopped.clear()
    if batches is None or at > first:
        at, batch, batches = _open_batches(path, first)
    while True:
        if batch is None:
            batch = next(batches)
        begin, end = max(at, first), min(at + batch.num_rows, stop)
        if begin < end:
            rows = np.flatnonzero(wanted[begin - first : end - first]) + begin
            if len(rows) == batch.num_rows:
                yield rows, batch
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


# file → (row, batch that starts there, batches behind it): where the last part of a file ended, if there is more of it
_stopped: dict[tuple[Any, ...], tuple[int, Any, Any]] = {}


def forget_readers() -> None:
    """Close the file that a last part may still be read from."""
    _stopped.clear()


def _open_batches(path: Path, first: int) -> tuple[int, None, Iterator[Any]]:
    """(row, None, record batches from that row on), starting with the row group that holds row `first`."""
    file = _open_parquet(path)
    starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))])
    group = int(np.searchsorted(starts, first, side="right")) - 1
    groups = list(range(group, file.metadata.num_row_groups))
    # one thread: the work is parallel over processes
    return int(starts[group]), None, file.iter_batches(ROWS_PER_BATCH, row_groups=groups, use_threads=False)


def _jsonl_segments(path: Path) -> list[Segment]:
    segments, num_rows, begin, begin_line, offset = [], 0, 0, 0, 0
    with path.open("rb") as lines:
        number = 0
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
        reason = getattr(error, "msg", str(error)).removesuffix(" at")  # json's words for where it stands
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SourceError(f"{file.name} line {number}: not valid JSON{column}: {reason}") from None
