"""A file of rows: held to its content while it is read, cut into segments, and where each row is in it."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatdata.errors import SourceError
from chatdata.sources.jsonl import SEGMENT_BYTES, Segment, array_segments, jsonl_segments, lines_of

# A row group can only be read from its start. A worker that continues where it stopped does not read it again; with one
# worker for each of 16 parts a group is decoded 8.5 times, 0.04 CPU-seconds per million tokens.
MAX_GROUP_PARTS = 16
TICK_NS = 20_000_000  # of a file system's clock: of two writes in one tick the second leaves no trace
CHANGED = "changed while it was read; build again"

_state_of = attrgetter("st_size", "st_ino", "st_dev", "st_mtime_ns", "st_ctime_ns")  # what changes with any change


class Place(NamedTuple):
    """Where a row is. unit: "line" (from 1, blank ones count), "row" (from 0), or "" where the file is one row."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}" if self.unit else self.file

    def with_reason(self, reason: str) -> dict[str, Any]:
        """For JSON: `file`, `line` or `row` if it has several, `reason`."""
        return {"file": self.file, **({self.unit: self.number} if self.unit else {}), "reason": reason}


@dataclass(frozen=True)
class SourceFile:
    """A file of rows: .parquet, .jsonl, .json, or text, which is one row."""

    path: Path
    name: str  # relative to its dataset, without folders of this machine
    state: list[tuple[int, ...]] = field(default_factory=list, compare=False)  # of the file whose content is known

    @cached_property
    def sha256(self) -> str:
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def open(self) -> Iterator[BufferedReader]:
        """The open file. Raises SourceError if it is not the one that was opened first, or has not its content; at the
        end also if it was replaced or written to meanwhile."""
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not self.state and 0 <= time.time_ns() - status.st_ctime_ns < TICK_NS:
                time.sleep(TICK_NS / 1e9)
            if self.state and self.state[-1] != _state_of(status):
                # only touched, or on another machine whose file system numbers files differently?
                if self.__dict__.get("sha256") != hashlib.file_digest(file, "sha256").hexdigest():
                    raise SourceError(f"{self.name}: {CHANGED}")
                file.seek(0)
            self.state[:] = [_state_of(status)]
            try:
                yield file
            except Exception:  # perhaps only because it changed
                self._check(file)
                raise
            self._check(file)

    def _check(self, file: BufferedReader) -> None:
        if self.state != [_state_of(os.fstat(file.fileno()))]:
            raise SourceError(f"{self.name}: {CHANGED}")

    @cached_property
    def segments(self) -> list[Segment]:
        suffix = self.path.suffix
        with self.open() as file:
            if suffix == ".json" and (segments := array_segments(file, self.name)) is not None:
                return segments
            if suffix in (".json", ".jsonl"):
                return jsonl_segments(file)
            if suffix != ".parquet":
                return [Segment(1, size)] if (size := self.state[0][0]) else []
            segments, metadata = [], open_parquet(self.name, file).metadata
            for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
                num_parts = max(1, min(MAX_GROUP_PARTS, group.total_byte_size // SEGMENT_BYTES, group.num_rows))
                cuts = [group.num_rows * i // num_parts for i in range(num_parts + 1)]
                segments += [Segment(b - a, group.total_byte_size // num_parts, unit="row") for a, b in pairwise(cuts)]
            return segments

    @cached_property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    def places(self, rows: np.ndarray) -> Iterator[Place]:
        """The place of each of `rows` (ascending)."""
        unit = self.segments[0].unit if self.segments else ""
        if unit == "line":
            with self.open() as file:
                yield from (Place(self.name, "line", line) for line in lines_of(file, self.segments, rows))
        else:
            yield from (Place(self.name, unit, row) for row in rows.tolist())


def open_parquet(name: str, file: BufferedReader) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
        names = opened.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{name}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    if twice := {column for column in names if names.count(column) > 1}:
        raise SourceError(f'{name}: two columns are named "{min(twice)}"; remove one of them')
    return opened
