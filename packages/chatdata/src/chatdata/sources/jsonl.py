"""JSONL and text files: where they can be cut, and their rows.

msgspec parses a line in half of json's time. What it refuses, and what may hold a key twice, is parsed by json, which
then names the line: what json takes is what is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from chatdata.disk import each_key_once
from chatdata.errors import SourceError

ROWS_PER_BATCH = 1024  # rows turned into Python objects at a time: about 3 MB of smoltalk
SEGMENT_BYTES = 4 << 20  # of text: what a worker renders in half a second
_QUOTE, _BACKSLASH = b'"\\'
_decode = msgspec.json.Decoder().decode


class Segment(NamedTuple):
    """Consecutive rows of a file."""

    num_rows: int
    num_bytes: int
    offset: int = 0  # bytes before it in a JSONL file
    line: int = 0  # lines before it


def jsonl_segments(lines: BufferedReader) -> list[Segment]:
    segments, num_rows, begin, begin_line, offset = [], 0, 0, 0, 0
    for number, line in enumerate(lines, start=1):
        offset += len(line)
        num_rows += not line.isspace()  # a blank line is not a row
        if offset - begin >= SEGMENT_BYTES:
            segments.append(Segment(num_rows, offset - begin, begin, begin_line))
            num_rows, begin, begin_line = 0, offset, number
    if num_rows:
        segments.append(Segment(num_rows, offset - begin, begin, begin_line))
    return segments


def read_text(
    opened: BufferedReader, name: str, segments: list[Segment], first: int, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """As `read_jsonl`: one row, the whole text."""
    try:
        yield np.zeros(1, dtype=np.int64), [{"text": opened.read().decode("utf-8-sig")}]
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: not UTF-8 at byte {error.start}") from None


def read_jsonl(
    lines: BufferedReader, name: str, segments: list[Segment], first: int, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """(rows, parsed rows) of the `wanted` ones (bool [n]) from row `first` on. `name` is the file's in errors."""
    row = 0
    for segment in segments:  # the last one that starts at or before `first`
        if row + segment.num_rows > first:
            break
        row += segment.num_rows
    stop, rows, numbered = first + len(wanted), [], []
    lines.seek(segment.offset)
    for number, line in enumerate(lines, start=segment.line + 1):
        if line.isspace():
            continue
        if row >= first and wanted[row - first]:
            rows.append(row)
            numbered.append((number, line))
            if len(rows) == ROWS_PER_BATCH:
                yield np.array(rows), _parse_lines(name, numbered)
                rows, numbered = [], []
        row += 1
        if row >= stop:
            break
    if rows:
        yield np.array(rows), _parse_lines(name, numbered)


def _parse_lines(name: str, numbered: list[tuple[int, bytes]]) -> list[Any]:
    """The values of (number, line)s. Raises SourceError for the first that is not JSON or holds a key twice."""
    lines = [line for _, line in numbered]
    try:
        records = [_decode(line) for line in lines]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        records = []
    # a key that comes twice leaves fewer strings in the value than there are in the text
    if records and _strings_in(records) == _strings_in_text(b"".join(lines)):
        return records
    return [_parse_line(name, number, line) for number, line in numbered]


def _strings_in(values: list[Any]) -> int:
    """Strings at any depth, keys included."""
    count = 0
    while values:
        kinds = list(map(type, values))
        objects = [value for value, kind in zip(values, kinds, strict=True) if kind is dict]
        lists = [value for value, kind in zip(values, kinds, strict=True) if kind is list]
        count += kinds.count(str) + sum(map(len, objects))
        values = list(chain.from_iterable((*lists, *map(dict.values, objects))))
    return count


def _strings_in_text(text: bytes) -> int:
    """Strings in valid JSON: half of the quotes that no backslash escapes."""
    data = np.frombuffer(text, dtype=np.uint8)
    quotes = data == _QUOTE
    escaped = np.flatnonzero(quotes[1:] & (data[:-1] == _BACKSLASH))  # where the backslash is
    if (data[escaped - 1] == _BACKSLASH).any():  # it may itself be escaped
        return _strings_in_text(text.replace(rb"\\", b""))
    return int(np.count_nonzero(quotes) - len(escaped)) // 2


def _parse_line(name: str, number: int, line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json.loads(text, object_pairs_hook=each_key_once)
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} line {number}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        reason = getattr(error, "msg", str(error)).removesuffix(" at")  # json's words for where it is
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SourceError(f"{name} line {number}: not valid JSON{column}: {reason}") from None
