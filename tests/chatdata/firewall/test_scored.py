"""Your own test items (`--against`): what is searched for, what is listed and dropped, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata import open_build
from chatdata.check.rerender import verify_semantic
from chatdata.check.verify import verify_full
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

WIRES = ["a copper wire", "a wool scarf", "the glass bulb", "dry sand"]
LAMP = "Which part of the lamp lets the current through?"
ROLLS = "Mira bakes 24 rolls on Monday, sells 15 of them at the market and freezes the rest. How many does she freeze?"
EXAM = [
    {"question": LAMP, "choices": WIRES},
    {"question": "Which animal in this list sleeps through the whole winter?", "choices": ["a bee", "a dormouse"]},
    {"question": ROLLS, "answer": "9"},
]
CHATS = ["Hello there!", f"Help me: {LAMP} Is it {', '.join(WIRES[::-1])}?", "Which lamp should I buy?"]


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """run(*arguments): `chatdata build` of CHATS, in tmp_path."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}] for text in CHATS]
    write_rows(tmp_path / "c.jsonl", rows)
    (tmp_path / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    command = ("build", "--recipe", "r.toml", "--tokenizer", "t", "--out", "out", "--force")
    return lambda *arguments: chatdata(*command, *arguments, cwd=tmp_path)


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_items_of_jsonl_and_parquet_are_found_and_listed(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in EXAM))  # a blank line counts as a line
    pq.write_table(
        pa.Table.from_pylist([{"q": row["question"], "a": "red", "b": "blue"} for row in EXAM[1:]] * 2),
        tmp_path / "quiz.parquet",
    )
    result = run("--against", "exam.jsonl", "--against", "quiz.parquet:q,a,b")
    assert result.returncode == 0, result.stderr
    assert "firewall: 1 training row holds scored items (kept; --decontaminate drop leaves" in result.stdout
    assert "no match: quiz.parquet (4)" in result.stdout
    listed = json.loads((tmp_path / "out" / "firewall.json").read_text())
    place = {"task": "conversations", "source": "c.jsonl", "file": "c.jsonl", "row": 1, "source_row": 1}
    assert listed["items"] == [
        {"set": "exam.jsonl", "item": "exam.jsonl line 2", "rows": [{**place, "method": "exact", "share": 1.0}]}
    ]
    assert {name: checked["items"] for name, checked in listed["checked"].items()} == {
        "exam.jsonl": 3,
        "quiz.parquet": 4,
    }
    (file,) = listed["checked"]["exam.jsonl"]["source"]["files"]
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    report = json.loads((tmp_path / "out" / "report.json").read_text())["firewall"]
    assert report["checked"] == {"exam.jsonl": {"items": 3, "flagged": 1}, "quiz.parquet": {"items": 4, "flagged": 0}}
    assert verify_full(tmp_path / "out") == []


def test_report_changes_no_byte_drop_is_in_the_recipe_and_off_lists_nothing(run: Callable, tmp_path: Path) -> None:
    write_rows(tmp_path / "exam.jsonl", EXAM)  # the last has no choices
    write_rows(tmp_path / "exam2.jsonl", EXAM[2:])
    out, against = tmp_path / "out", ("--against", "exam.jsonl:question,choices", "--against", "exam2.jsonl")
    ids = []
    for mode, files in (("off", ()), ("report", against), ("drop", ()), ("drop", against)):
        result = run("--decontaminate", mode, *files)
        assert result.returncode == 0, result.stderr
        assert (out / "firewall.json").exists() == (mode != "off")
        ids.append(open_build(out).manifest["build_id"])
    assert ids[0] == ids[1] and len(set(ids)) == 3
    manifest = open_build(out).manifest
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("exam.jsonl", "exam2.jsonl")]
    assert manifest["recipe"]["against"] == [
        {"name": "exam.jsonl", "keys": "question,choices", "sha256": digests[0]},
        {"name": "exam2.jsonl", "keys": "", "sha256": digests[1]},
    ]
    assert manifest["splits"]["train"]["entries"][0]["dropped"]["contaminated"] == 1
    assert open_build(out)["train"].index["row"].to_list() == [0, 2]
    (tmp_path / "exam.jsonl").unlink()  # a check needs the training data only
    recipe = str(tmp_path / "r.toml")
    assert verify_semantic(out, Locations(tmp_path), load_tasks(), recipe=recipe) == []


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([EXAM[0], ["a"]], "", '--against: exam.jsonl line 2: must be an object with a question, not ["a"]'),
        ([{"question": " ?! "}], "", 'line 1: key "question": must be a question with a word in it, not " ?! "'),
        ([{"prompt": [{"role": "user"}]}], "", 'line 1: key "prompt": must be a question with a word in it, not [{"r'),
        ([{"q": "Why?", "a": "So."}], "", 'line 1: no key "question"; the row has "q", "a"; name the keys: --against '),
        (
            EXAM[:1],
            ":question,options",
            '--against: exam.jsonl: no row has the key "options"; name the keys: --against',
        ),
        ([{"problem": "Why?", "choices": [["a"]]}], "", 'key "choices": must be texts to choose from, not [["a"]]'),
        ([], "", "--against: exam.jsonl has no rows"),
    ],
)
def test_items_that_cannot_be_searched_for(
    run: Callable, tmp_path: Path, rows: list[Any], given: str, message: str
) -> None:
    write_rows(tmp_path / "exam.jsonl", rows)
    result = run("--against", f"exam.jsonl{given}")
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_read(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "exam.csv").touch()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 it is not")
    (tmp_path / "bad.jsonl").write_text('{"question": "Why?"}\n{"question"\n')
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "exam.jsonl", EXAM)
    two = ("one/exam.jsonl", "--against", "two/exam.jsonl")
    for arguments, code, message in (
        (("no.jsonl:q",), 1, "--against: no.jsonl: no such file"),
        (("exam.csv",), 1, "--against: exam.csv: expected .jsonl, .json or .parquet"),
        (("bad.parquet",), 1, "--against: bad.parquet: not a readable Parquet file"),
        (("bad.jsonl",), 1, "bad.jsonl line 2: not valid JSON"),
        ((tmp_path / two[0], two[1], tmp_path / two[2]), 2, "--against: two files are named exam.jsonl; rename one"),
        (("bad.jsonl", "--decontaminate", "off"), 2, "--against is given, but --decontaminate off searches for n"),
    ):
        result = run("--against", *arguments)
        assert result.returncode == code and message in result.stderr.splitlines()[-1]
    assert run("--against", *two).returncode == 0
    names = json.loads((tmp_path / "out" / "firewall.json").read_text())["checked"]
    assert list(names) == ["one/exam.jsonl", "two/exam.jsonl"]


@pytest.mark.parametrize(
    "choices", [WIRES, {"text": WIRES, "label": ["A", "B", "C", "D"]}, dict(zip("ABCD", WIRES, strict=True)), None]
)
def test_choices_may_come_in_several_forms(run: Callable, tmp_path: Path, choices: Any) -> None:
    write_rows(tmp_path / "exam.jsonl", [{"question": LAMP, "choices": choices}, {"question": LAMP, "choices": [7, 8]}])
    assert run("--against", "exam.jsonl").returncode == 0
    listed = json.loads((tmp_path / "out" / "firewall.json").read_text())
    assert [item["item"] for item in listed["items"]] == ["exam.jsonl line 1"]
