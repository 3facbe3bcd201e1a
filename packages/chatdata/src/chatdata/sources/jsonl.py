"""JSONL, JSON and text files: where they can be cut, and their rows.

msgspec parses a line in half of json's time. What it refuses, and what may hold a key twice, is parsed by json, which
then names the line: what json takes is what is accepted.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedReader, BytesIO
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np

from chatdata.disk import each_key_once
from chatdata.errors import SourceError

ROWS_PER_BATCH = 1024  # rows turned into Python objects at a time: about 3 MB of smoltalk
LINES_PER_CHECK = 64  # about 100 kB of smoltalk, which the processor's cache holds
SEGMENT_BYTES = 4 << 20  # of text: what a worker renders in half a second
_BETWEEN = re.compile(rb"[\s,]*")  # rows of an array
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH = b'"\\'
Batches = Iterator[tuple[np.ndarray, list[Any]]]
_decode = msgspec.json.Decoder().decode


class Segment(NamedTuple):
    """Consecutive rows of a file."""

    num_rows: int
    num_bytes: int
    offset: int = 0  # bytes before it in a JSONL file
    line: int = 0  # lines before it
    unit: str = ""  # in which a row's place is counted, as in Place


def jsonl_segments(lines: BufferedReader) -> list[Segment]:
    segments, num_rows, begin, begin_line, offset = [], 0, 0, 0, 0
    for number, line in enumerate(lines, start=1):
        offset += len(line)
        num_rows += not line.isspace()  # a blank line is not a row
        if offset - begin >= SEGMENT_BYTES:
            segments.append(Segment(num_rows, offset - begin, begin, begin_line, "line"))
            num_rows, begin, begin_line = 0, offset, number
    return [*segments, Segment(num_rows, offset - begin, begin, begin_line, "line")] if num_rows else segments


def array_segments(file: BufferedReader, name: str) -> list[Segment] | None:
    """Segments of a .json file that is one array of rows; None if it is JSON lines. `name` is the file's in errors.

    Takes memory for the file and 100 bytes per row: the array is read at once, because rows cannot be told apart from
    what they hold without parsing. Raises SourceError if the file is neither.
    """
    data, segments, num_rows = file.read(), [], 0
    try:
        rows = msgspec.json.decode(memoryview(data)[3 * data.startswith(_BOM) :], type=list[msgspec.Raw])
    except msgspec.MsgspecError as error:
        file.seek(0)
        try:
            json.loads(next((line for line in file if line.strip()), b""))
        except (ValueError, RecursionError):
            raise SourceError(f"{name}: neither an array of rows nor JSON lines: {error}") from None
        file.seek(0)
        return None
    begin = end = data.find(b"[") + 1
    for row in rows:
        start = _BETWEEN.match(data, end).end()  # type: ignore[union-attr]
        begin, end = start if num_rows == 0 else begin, start + len(memoryview(row))
        num_rows += 1
        if end - begin >= SEGMENT_BYTES:
            segments.append(Segment(num_rows, end - begin, begin, unit="row"))
            num_rows = 0
    return [*segments, Segment(num_rows, end - begin, begin, unit="row")] if num_rows else segments


def lines_of(file: BufferedReader, segments: list[Segment], rows: np.ndarray) -> Iterator[int]:
    """The line (from 1) of each of `rows` (ascending); only segments that hold one are read."""
    first = 0
    for segment in segments:
        inside = rows[(rows >= first) & (rows < first + segment.num_rows)] - first
        if len(inside):
            file.seek(segment.offset)
            filled = (number for number, line in enumerate(file, start=segment.line + 1) if not line.isspace())
            numbers = list(islice(filled, int(inside[-1]) + 1))
            yield from (numbers[row] for row in inside.tolist())
        first += segment.num_rows


def read_segments(file: BufferedReader, segments: list[Segment], first: int, wanted: np.ndarray) -> Batches:
    """(rows, parsed rows) of the `wanted` ones (bool [n]) from row `first` on, of JSONL or a .json file with one array.

    The value of a row that cannot be parsed is a SourceError.
    """
    row = 0
    for segment in segments:
        low, high = max(row, first), min(row + segment.num_rows, first + len(wanted))
        rows = np.flatnonzero(wanted[low - first : high - first]) + low if low < high else np.zeros(0, np.int64)
        if len(rows):
            file.seek(segment.offset)
            texts = _texts(file.read(segment.num_bytes), segment)
            for part in np.array_split(rows, -(-len(rows) // ROWS_PER_BATCH)):
                yield part, _parse_lines([bytes(texts[i]) for i in (part - row).tolist()])
        row += segment.num_rows


def _texts(data: bytes, segment: Segment) -> list[Any]:
    """The rows of a segment, not yet parsed."""
    if segment.unit == "row":
        return msgspec.json.decode(b"[" + data + b"]", type=list[msgspec.Raw])
    data = data if segment.offset else data.removeprefix(_BOM)
    return [line for line in BytesIO(data) if not line.isspace()]


def read_text(opened: BufferedReader, segments: list[Segment], first: int, wanted: np.ndarray) -> Batches:
    """As `read_jsonl`: one row, the whole text."""
    try:
        row: Any = {"text": opened.read().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        row = SourceError(f"not UTF-8 at byte {error.start}")
    yield np.zeros(1, dtype=np.int64), [row]


def _parse_lines(kept: list[bytes]) -> list[Any]:
    """The values of lines, or of rows of an array; of one that is not JSON, or holds a key twice, its SourceError."""
    values: list[Any] = []
    for start in range(0, len(kept), LINES_PER_CHECK):
        lines = kept[start : start + LINES_PER_CHECK]
        with suppress(msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
            parsed = list(map(_decode, lines))
            # a key that comes twice leaves fewer strings in the values than there are in the text
            if _strings_in_text(msgspec.json.encode(parsed)) == _strings_in_text(b"".join(lines)):
                values += parsed
                continue
        values += map(_parse_line, lines)
    return values


def _strings_in_text(text: bytes) -> int:
    """Strings in valid JSON: half of the quotes that no backslash escapes."""
    data = np.frombuffer(text, dtype=np.uint8)
    quotes = np.flatnonzero(data == _QUOTE)
    escaped = quotes[data[quotes - 1] == _BACKSLASH]
    if (data[escaped - 2] == _BACKSLASH).any():  # the backslash may itself be escaped
        return _strings_in_text(text.replace(rb"\\", b""))
    return (len(quotes) - len(escaped)) // 2


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=each_key_once)
    except UnicodeDecodeError as error:
        return SourceError(f"not UTF-8 at byte {error.start}; save it as UTF-8")
    except (ValueError, RecursionError) as error:  # also: a number of 5,000 digits, a thousand brackets
        reason = getattr(error, "msg", str(error)).removesuffix(" at")  # json's words for where it is
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return SourceError(f"not valid JSON{column}: {reason}")
