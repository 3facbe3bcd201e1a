"""items.jsonl: lines that survive a kill, damaged lines that are named, items that count once."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatdata.disk import convert
from chateval.errors import ChatevalError, ResultsError
from chateval.results.items import Item, append_item, open_items, read_items


def test_items_come_back_from_several_files_in_any_order(item, write_items, tmp_path: Path) -> None:
    texts = ['a "quoted"\nline\u2028and\x85more', "ünïcode 日本 🙂", "lone \ud800 surrogate", ""]
    records = [item(name=f"main test {i}", output=text) for i, text in enumerate(texts)]
    write_items(tmp_path / "items-00001.jsonl", records[3], records[0])
    write_items(tmp_path / "items.jsonl", records[2], records[1])
    found = {read.item: read for read in read_items(tmp_path)}
    assert {name: read.output for name, read in found.items()} == {r["item"]: r["output"] for r in records}
    assert found["main test 1"] == convert(records[1], Item, "", ResultsError)
    assert found["main test 1"].gold_nats is None
    assert read_items(tmp_path / "nowhere") == []


def test_a_line_cut_anywhere_is_no_item_and_is_overwritten(item, write_items, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    write_items(path, item(name="first"), item(name="second", output="日本"))
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        names = ["first"] * (end >= first_end) + ["second"] * (end == len(whole))
        assert [read.item for read in read_items(tmp_path)] == names
        if end % 50 == 0 or end >= len(whole) - 1:
            write_items(path, item(name="third"))
            assert [read.item for read in read_items(tmp_path)] == [*names, "third"]
            assert path.read_bytes().startswith(whole[:first_end] if names else b'{"task"')


def test_kill_9_loses_no_item_that_was_appended(item, write_items, tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", item(name="before"))
    program = (
        "import json, sys; from pathlib import Path; from chateval.results.items import append_item, open_items\n"
        "record = json.loads(sys.argv[2])\n"
        "with open_items(Path(sys.argv[1])) as file:\n"
        "    for i in range(10**9):\n"
        "        append_item(file, {**record, 'item': f'test {i}'}); print(i, flush=True)\n"
    )
    arguments = [sys.executable, "-c", program, tmp_path / "items.jsonl", json.dumps(item(output="x" * 300))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        told = 20 + len(process.stdout.read().splitlines())
    names = [read.item for read in read_items(tmp_path)]
    assert names[0] == "before" and names[1:] == [f"test {i}" for i in range(len(names) - 1)]
    assert len(names) - 1 in (told - 1, told, told + 1)  # the last number told may be cut, the last item untold
    write_items(tmp_path / "items.jsonl", item(name="after"))
    assert [read.item for read in read_items(tmp_path)] == [*names, "after"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "gsm8k", "it', "line 2: not valid JSON"),
        (b"", "line 2: not valid JSON"),
        (b"\xff\xfe", "line 2: not valid JSON"),
        (b"[" * 100_000, "line 2: not valid JSON"),
        (b"[1]", "line 2: must be a table, not [1]"),
        ({"correct": 1}, 'line 2, key "correct": must be true or false, not 1'),
        ({"draw": True}, 'line 2, key "draw": must be an integer of at least 0 and'),
        ({"gold": None}, 'line 2, key "gold": must be a string, not null'),
        ({"gold_nats": math.nan}, 'line 2, key "gold_nats": must be a finite number, not NaN'),
        ({"ending": ...}, 'line 2: no key "ending"; it must be a string'),
    ],
)
def test_a_damaged_line_is_named(item, tmp_path: Path, line: bytes | dict[str, Any], message: str) -> None:
    if isinstance(line, dict):  # changes to an item; ... takes a field away
        line = json.dumps({key: value for key, value in (item() | line).items() if value is not ...}).encode()
    good = [json.dumps(item(name=str(i))).encode() for i in range(2)]
    (tmp_path / "items.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    with pytest.raises(ResultsError, match=re.escape(f"items.jsonl {message}")) as error:
        read_items(tmp_path)
    assert isinstance(error.value, ChatevalError) and "\n" not in str(error.value)


def test_what_could_not_be_read_is_not_written(item, tmp_path: Path) -> None:
    with open_items(tmp_path / "items.jsonl") as file:
        with pytest.raises(ResultsError, match="mmlu item 'all test 812', key \"margin\": must be a finite number"):
            append_item(file, item("mmlu", "all test 812", "categorical", margin=math.nan))
        with pytest.raises(ResultsError, match='key "margin": must be a finite number'):
            append_item(file, item(kind="categorical", margin="1"))
        append_item(file, item(kind="categorical", margin=1, unknown_field=[1]))
    assert read_items(tmp_path)[0].margin == 1


def test_an_item_twice_counts_once_if_equal_and_is_refused_if_not(item, write_items, tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl", item(name="a"), item(name="b"), item(name="a"), item(name="a", draw=1))
    write_items(tmp_path / "items-00001.jsonl", item(name="b"))
    assert sorted(read.key for read in read_items(tmp_path)) == [
        ("gsm8k", "a", 0),
        ("gsm8k", "a", 1),
        ("gsm8k", "b", 0),
    ]
    write_items(tmp_path / "items.jsonl", item(name="c"), item(name="b", correct=False))
    with pytest.raises(
        ResultsError,
        match=r"items-00001.jsonl line 1 and items.jsonl line 6 are both gsm8k item 'b' draw 0, and differ",
    ):
        read_items(tmp_path)


def test_two_runs_cannot_append_to_one_file(tmp_path: Path) -> None:
    with (
        open_items(tmp_path / "items.jsonl"),
        pytest.raises(ResultsError, match=r"items.jsonl: another run is writing there; use another --out"),
    ):
        open_items(tmp_path / "items.jsonl")
    open_items(tmp_path / "items.jsonl").close()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("categorical", {"extracted": "B", "gold": "A", "correct": True}, 'key "correct": is true, but gold is "A"'),
        ("categorical", {"extracted": "A", "gold": "A", "correct": False}, 'key "correct": is false, but gold is "A"'),
        ("generative", {"extracted": "4", "correct": True}, 'is true, but gold is "5", extracted "4" and ending'),
        ("generative", {"extracted": "5.0", "correct": False}, 'is false, but gold is "5", extracted "5.0" and'),
        ("generative", {"extracted": None, "correct": True}, 'is true, but gold is "5", extracted null and ending'),
        ("generative", {"flexible_extracted": "7", "flexible_correct": True}, 'key "flexible_correct": is true'),
        ("generative", {"task": "mine", "extracted": None, "correct": True}, 'key "correct": is true'),
        ("generative", {"task": "mine", "extracted": "5", "correct": False}, 'key "correct": is false'),
        ("code", {"ending": "failed", "correct": True}, 'and ending "failed"; delete the line and run again'),
        ("code", {"ending": "max_tokens, timeout", "correct": True}, 'key "correct": is true'),
        ("code", {"ending": "max_tokens, passed", "correct": False}, 'key "correct": is false'),
    ],
)
def test_a_grade_that_its_answer_does_not_have(item, write_items, tmp_path: Path, kind, changes, message) -> None:
    path = tmp_path / "items.jsonl"
    write_items(path, item(name="right", kind=kind))
    with path.open("a") as file:
        file.write(json.dumps({**item(name="wrong", kind=kind), **changes}) + "\n")
    with pytest.raises(ResultsError, match=f"^{re.escape(str(path))} line 2, key ") as caught:
        read_items(tmp_path)
    assert message in str(caught.value)
    with pytest.raises(ResultsError):
        write_items(path, {**item(name="wrong", kind=kind), **changes})


def test_answers_are_graded_again_as_their_tasks_do(item, write_items, tmp_path: Path) -> None:
    spelled = {"gold": "cat:c,a,t", "flexible_extracted": "c,a,t", "flexible_correct": True}
    lines = [
        item("simple_spelling", "0", **{**spelled, "extracted": "cat:c,a,t", "correct": True}),
        item("simple_spelling", "1", **{**spelled, "extracted": "It is cat: c, a, t", "correct": False}),
        item("gsm8k", "0", gold="1,000", extracted="$1000.0", correct=True, flexible_extracted="1000"),
        item("gsm8k", "1", gold="", extracted=None, correct=False, flexible_extracted="3", flexible_correct=False),
        item(
            "mine", "0", gold="Paris", extracted="paris", correct=True, flexible_extracted="p", flexible_correct=False
        ),
        item("humaneval", "0", "code", extracted=None, ending="max_tokens, passed"),
    ]
    write_items(tmp_path / "items.jsonl", *lines)
    assert [read.correct for read in read_items(tmp_path)] == [True, False, True, False, True, True]
