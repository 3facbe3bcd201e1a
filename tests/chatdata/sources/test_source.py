"""Rows that cannot be read are named: file and line or row. A file that changes while it is read is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata.conversation import Reading, parse_conversation
from chatdata.errors import SourceError
from chatdata.render.pieces import pieces_of_rows
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source, forget_readers
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer


def test_rows_that_cannot_be_read(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    column = pa.array([b"ok", b"\xff\xfe"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"question": column, "answer": column}), tmp_path / "g.parquet")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom chatdata.tasks import Task\n"
        "@dataclass\nclass Row:\n    n: int\n"
        "TASK = Task('mine', 's', 'MIT', lambda row: 1 / 0, generate=lambda s, o: lambda i: i, "
        "splits={'': {'train': 0}})\n"
    )
    for entry, error in [
        ("task = 'gsm8k'\npath = 'g.parquet'", "g.parquet row 0 … 1: text that is not UTF-8"),
        ("task = 'conversations'\npath = 'deep.jsonl'", "deep.jsonl line 1: not valid JSON"),
        ("task = 'mine'\nrows = 1", 'mine train row 0: the row does not fit task "mine": ZeroDivisionError'),
    ]:
        (tmp_path / "r.toml").write_text(f"stage = 'mid'\n[[train]]\n{entry}\n")
        command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "o"]
        result = chatdata(*command, "--task-file", tmp_path / "mine.py")
        assert result.stderr.splitlines()[-1].startswith(f"Error: {error}"), result.stderr
        assert "Traceback" not in result.stderr


def chats(word: str, count: int = 3_000) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"{word} {i:05d}"}]} for i in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1_024, compression="none")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def source_of(path: Path) -> Source:
    return Source(path.name, load_tasks()["conversations"], (SourceFile(path, path.name),))


def rename_over(path: Path) -> None:
    other = path.with_name(f"other{path.suffix}")
    write_rows(other, chats("other"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def edit_in_place(path: Path) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(data.replace(b"first", b"other"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and tar do


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
@pytest.mark.parametrize("change", [rename_over, edit_in_place, truncate])
@pytest.mark.parametrize("when", ["before", "while it is read"])
def test_a_file_is_held_to_its_hash(tmp_path: Path, name: str, change: Callable[[Path], None], when: str) -> None:
    write_rows(tmp_path / name, chats("first"))
    source = source_of(tmp_path / name)
    assert source.num_rows == 3_000 and len(source.files[0].sha256) == 64
    if when == "before":
        change(tmp_path / name)
    batches = source.read_batches(0, np.ones(3_000, dtype=bool))
    with pytest.raises(SourceError, match=f"^{name}: changed while it was read; build again$"):
        for _ in batches:
            if when != "before":
                change(tmp_path / name)
                when = "before"  # once
    with pytest.raises(SourceError, match=f"^{name}: changed while it was read"):
        source.where(5) if name.endswith("jsonl") else next(source.read(np.ones(3_000, dtype=bool)))


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_a_parquet_file_that_is_read_in_parts_is_held_to_its_hash_in_each(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, chats("first"))
    source = source_of(tmp_path / name)
    assert source.files[0].sha256 and source.num_rows
    assert len(list(source.read_batches(0, np.ones(500, dtype=bool)))) == 1
    rename_over(tmp_path / name)
    with pytest.raises(SourceError, match=f"^{name}: changed while it was read"):
        list(source.read_batches(500, np.ones(500, dtype=bool)))
    forget_readers()


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet", "chats.txt"])
def test_an_equal_file_with_another_time_or_place_is_the_same(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, chats("first"))
    source = source_of(tmp_path / name)
    sha256, num_rows = source.files[0].sha256, source.num_rows
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).chmod(0o400)
    assert len(list(source.read(np.ones(num_rows, dtype=bool)))) == num_rows
    assert source.describe()["files"] == [{"name": name, "bytes": len(content), "sha256": sha256}]


def test_a_word_list_is_held_to_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("apple\npear\n")
    task, options = load_tasks()["simple_spelling"], {"words": path, "holdout": False}
    source = Source("words", task, split="train", options=options, option_files={"words": SourceFile(path, path.name)})
    assert source.describe()["files"][0]["bytes"] == 11
    path.write_text("grape\nplum\n")
    with pytest.raises(SourceError, match=r"^words.txt: changed while it was read; build again$"):
        source.make_row  # noqa: B018


def test_rows_that_datasets_reads_are_known_by_their_content() -> None:
    class Rows(list):
        data = type("Table", (), {"nbytes": 100})()

    one, other = (Source("x", load_tasks()["conversations"], dataset=Rows(chats(word, 2))) for word in ("a", "b"))
    assert one.content(0, 2) != other.content(0, 2)
    assert one.content(0, 2)["rows"] == one.describe()["rows_sha256"]


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    write_rows(path, chats("first"))
    metadata = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    start = metadata.row_group(1).column(1).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = source_of(path)
    with pytest.raises(SourceError, match=r"^chats.parquet: cannot be read from row 1024 on: [^\n]+$"):
        list(source.read(np.ones(3_000, dtype=bool)))
    path.write_bytes(data[:-20])
    with pytest.raises(SourceError, match=r"^chats.parquet: not a readable Parquet file: [^\n]+$"):
        source_of(path).num_rows  # noqa: B018


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array([[{"role": "user", "content": "Hi"}]])
    table = pa.Table.from_arrays([column, column], names=["messages", "messages"])
    pq.write_table(table, tmp_path / "chats.parquet")
    with pytest.raises(SourceError, match=r'^chats.parquet: two columns are named "messages"; remove one of them$'):
        source_of(tmp_path / "chats.parquet").num_rows  # noqa: B018


def test_ignored_keys_are_taken_out_of_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "notes": "x", "id": 1}]
    for name in ("a.jsonl", "a.parquet"):
        write_rows(tmp_path / name, rows)
        file = SourceFile(tmp_path / name, name)
        plain, ignoring = (
            Source(name, load_tasks()["conversations"], (file,), reading=Reading(ignore=keys))
            for keys in ((), ("notes", "absent"))
        )
        assert list(plain.read(np.ones(1, dtype=bool))) == [(0, rows[0])]
        assert list(ignoring.read(np.ones(1, dtype=bool))) == [(0, {"messages": rows[0]["messages"], "id": 1})]
        assert plain.content(0, 1) != ignoring.content(0, 1)


def _arguments(kind: str) -> pa.DataType:
    one = pa.struct({"city": pa.string(), "days": pa.int64()})
    return {"struct": one, "map": pa.map_(pa.string(), pa.string()), "json": pa.large_string()}[kind]


@pytest.mark.parametrize(
    ("text", "list_of", "arguments"),
    [
        (pa.string(), pa.list_, "struct"),
        (pa.large_string(), pa.large_list, "map"),
        (pa.string_view(), lambda item: pa.list_(item, 2), "json"),
        (pa.dictionary(pa.int32(), pa.string()), pa.list_, "struct"),
        (pa.string(), pa.list_view, "map"),
    ],
)
def test_arrow_types_make_no_difference(tmp_path: Path, text: Any, list_of: Callable, arguments: str) -> None:
    """And keys that are null in a struct, because other rows have them, are no arguments."""
    function = pa.struct({"name": text, "arguments": _arguments(arguments)})
    calls = pa.list_(pa.struct({"id": text, "function": function}))
    message = pa.struct({"role": text, "content": text, "tool_calls": calls})
    given: Any = {"city": "Oslo"}
    given = json.dumps(given) if arguments == "json" else given
    row = [
        {"role": "user", "content": "Sky?"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "sky", "arguments": given}}]},
    ]
    table = pa.table({"messages": pa.array([row], list_of(message)), "source": pa.array(["x"], text)})
    pq.write_table(table, tmp_path / "chats.parquet")
    source = source_of(tmp_path / "chats.parquet")
    ((rows, raw),) = source.read_batches(0, np.ones(1, dtype=bool))
    pieces = pieces_of_rows(source, rows, raw)
    assert pieces.texts == ["Sky?", "sky(city='Oslo')"]
    assert [record["messages"][0] for _, record in source.read(np.ones(1, dtype=bool))] == [row[0]]


def test_a_null_in_json_is_an_argument(tmp_path: Path) -> None:
    call = {"function": {"name": "sky", "arguments": {"city": None}}}
    row = {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "tool_calls": [call]}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    source = source_of(tmp_path / "chats.jsonl")
    assert parse_conversation(*(record for _, record in source.read(np.ones(1, dtype=bool))))["messages"][1] == {
        "role": "assistant",
        "content": [{"type": "python", "text": "sky(city=None)"}],
    }


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    rows = chats("x", 3)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "l.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, place in (("a.json", "a.json row 1"), ("l.json", "l.json line 2")):
        source = source_of(tmp_path / name)
        assert source.num_rows == 3 and source.where(1) == place
        assert [row for _, row in source.read(np.ones(3, dtype=bool))] == rows
