"""Lines as values: what json takes is accepted, but an object has no key twice."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatdata.errors import SourceError
from chatdata.sources import jsonl
from chatdata.sources.file import SourceFile
from chatdata.sources.jsonl import (
    _parse_lines,
    _strings_in_text,
    array_segments,
    jsonl_segments,
    lines_of,
    read_segments,
)
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks

TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from('\\\\"":{}[],\\n'), max_size=12)
MESSAGES = st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=3)
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
CHATS = MESSAGES | st.dictionaries(TEXT, MESSAGES | TEXT | NUMBERS, max_size=3)
VALUES = CHATS | st.recursive(
    NUMBERS | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4)
)


@given(
    st.lists(VALUES, min_size=1, max_size=5), st.booleans(), st.sampled_from([(",", ":"), (", ", ": "), (" ,", " :")])
)
@example([{"a\\\\": 1, "b": '\\\\"'}], True, (",", ":"))
def test_lines_are_what_json_says(values: list[Any], ascii_only: bool, separators: tuple[str, str]) -> None:
    lines = [json.dumps(value, ensure_ascii=ascii_only, separators=separators).encode() + b"\n" for value in values]
    assert _strings_in_text(msgspec.json.encode(values)) == _strings_in_text(b"".join(lines))
    assert repr(_parse_lines(lines)) == repr(values)  # 1 is not 1.0


def spelled(value: Any, twice: list[int]) -> str:
    """JSON in which one key in `twice[0]` objects from here comes twice: first with another value."""
    if isinstance(value, list):
        return f"[{','.join(spelled(item, twice) for item in value)}]"
    if not isinstance(value, dict):
        return json.dumps(value)
    items = [f"{json.dumps(key)}:{spelled(item, twice)}" for key, item in value.items()]
    twice[0] -= bool(items)
    if items and twice[0] == 0:
        items.insert(0, f'{json.dumps(next(iter(value)))} : [1, "lost"]')
    return f"{{{','.join(items)}}}"


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 4))
def test_a_key_that_comes_twice_at_any_depth(values: list[Any], place: int) -> None:
    twice, lines = [place], []
    wrong = None
    for number, value in enumerate(values):
        lines.append(spelled(value, twice).encode() + b"\n")
        wrong = number if wrong is None and twice[0] <= 0 else wrong
    found = _parse_lines(lines)
    if wrong is not None:
        assert re.match(r"not valid JSON: key .* twice in one object$", str(found[wrong]))
        found[wrong] = values[wrong]
    assert found == values


@pytest.mark.parametrize(
    "line",
    [
        '{"messages":[{"role":"user","content":"FIRST"}],"messages":[]}',
        '[{"role":"assistant","content":"THE ANSWER","content":""}]',
        '[{"role":"user","content":[{"type":"text","text":"LOST","text":"kept"}]}]',
        '{"a" : 1, "\\u0061": 2}',
        '{"a": 1, "a": 1}',
        '{"a": {"":0, "":0}}',
    ],
)
def test_keys_that_come_twice(line: str) -> None:
    json.loads(line)  # keeps the last in silence
    (_, error) = _parse_lines([b'{"a": "\\\\"}', line.encode()])
    assert re.match(r'not valid JSON: key "\w*" twice in one object$', str(error))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b'"\\ud800"', "\ud800"),  # refused later, where it is named as a lone surrogate
        (b"1e999", float("inf")),
        (b"[12345678901234567890123, -0.0]", [12345678901234567890123, -0.0]),
        (b" [1] \r\n", [1]),
    ],
)
def test_what_msgspec_refuses_and_json_takes(line: bytes, value: Any) -> None:
    assert _parse_lines([line]) == [value]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": 1,}', "not valid JSON at column 9: Expecting property name enclosed in double quotes"),
        (b'"\xff"', "not UTF-8 at byte 1; save it as UTF-8"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        (b"1" * 5_000, "not valid JSON: Exceeds the limit"),
    ],
)
def test_lines_that_are_not_json(line: bytes, problem: str) -> None:
    first, error = _parse_lines([b"[]", line])
    assert first == [] and str(error).startswith(problem)


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n[0]\n \t\r\n[1]\n\n[2]")
    with (tmp_path / "x.jsonl").open("rb") as file:
        segments = jsonl_segments(file)
        file.seek(0)
        ((rows, values),) = read_segments(file, segments, 0, np.array([True, False, True]))
    assert (segments[0].num_rows, rows.tolist(), values) == (3, [0, 2], [[0], [2]])


@given(
    st.lists(VALUES, min_size=1, max_size=9),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 60),
    st.data(),
)
def test_rows_of_an_array_are_what_json_says(
    values: list[Any], indent: int | None, mark: bool, segment_bytes: int, data: st.DataObject
) -> None:
    file: Any = io.BytesIO(b"\xef\xbb\xbf" * mark + json.dumps(values, indent=indent, ensure_ascii=False).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "SEGMENT_BYTES", segment_bytes)
        patch.setattr(jsonl, "ROWS_PER_BATCH", 2)
        segments = array_segments(file, "a.json")
        assert segments is not None and sum(segment.num_rows for segment in segments) == len(values)
        first = data.draw(st.integers(0, len(values) - 1))
        wanted = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=len(values) - first)))
        read = list(read_segments(file, segments, first, wanted))
    rows = [row for part, _ in read for row in part.tolist()]
    assert rows == (np.flatnonzero(wanted) + first).tolist()
    assert repr([value for _, part in read for value in part]) == repr([values[row] for row in rows])


@pytest.mark.parametrize("text", [b'{"a": 1}\n{"a": 2}\n', b'\n[{"role": "user"}]\n[]\n', b"[]\n[1\n", b'{"a": NaN}'])
def test_json_lines_may_be_in_a_json_file(text: bytes) -> None:
    assert array_segments(io.BytesIO(text), "a.json") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{\n "data": []}', "Expected `array`, got `object`"),
        (b'[{"a": 1},\n{"a": 2}', "Input data was truncated"),
        (b'[\n{"a": NaN}]', "JSON is malformed: invalid character (byte 8)"),
        (b"", "Input data was truncated"),
    ],
)
def test_a_json_file_that_is_neither_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(SourceError) as caught:
        array_segments(io.BytesIO(text), "a.json")  # type: ignore[arg-type]
    assert str(caught.value) == f"a.json: neither an array of rows nor JSON lines: {reason}"


def test_a_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 1, "a": 2}]')
    (tmp_path / "a.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 1, "a": 2}', encoding="utf-8")
    for name, place in (("a.json", "row 1"), ("a.jsonl", "line 3")):
        source = Source("s", load_tasks()["conversations"], (SourceFile(tmp_path / name, name),))
        with pytest.raises(SourceError, match=rf"^{name} {place}: not valid JSON: key \"a\" twice in one object$"):
            list(source.read(np.ones(2, dtype=bool)))


@pytest.mark.parametrize("segment_bytes", [1, 20, 1_000])
def test_lines_of_rows(tmp_path: Path, segment_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "SEGMENT_BYTES", segment_bytes)
    (tmp_path / "x.jsonl").write_bytes(b"\n[0]\n \t\r\n[1]\n\n\n[2]\n[3]\n{\n\n[5]")
    with (tmp_path / "x.jsonl").open("rb") as file:
        segments = jsonl_segments(file)
        assert list(lines_of(file, segments, np.arange(6))) == [2, 4, 7, 8, 9, 11]
        assert list(lines_of(file, segments, np.array([0, 3, 5]))) == [2, 8, 11]
        assert list(lines_of(file, segments, np.array([], dtype=np.int64))) == []


def test_bad_lines_are_values_if_they_are_kept() -> None:
    lines = [b"[1]", b'{"a": 1,}', b'{"a": 1, "a": 2}', b'"\xff"', b"[2]"]
    assert [str(value) for value in _parse_lines(lines)] == [
        "[1]",
        "not valid JSON at column 9: Expecting property name enclosed in double quotes",
        'not valid JSON: key "a" twice in one object',
        "not UTF-8 at byte 1; save it as UTF-8",
        "[2]",
    ]
