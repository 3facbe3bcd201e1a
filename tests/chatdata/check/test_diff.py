from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.diff import ABSENT, _parting, diff_builds, differences, lines_of
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

ENTRY = '[[train]]\ntask = "conversations"\npath = "c.jsonl"\n'
HEAD = 'stage = "sft"\nseed = 1\n'


@pytest.fixture
def built(tmp_path: Path, byte_tokenizer: Tokenizer) -> Callable[..., Path]:
    """Builds (user, assistant) pairs under a recipe into a folder of its own."""

    def make(name: str, chats: list[tuple[str, Any]], recipe: str = HEAD + ENTRY) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        roles = ("user", "assistant")
        lines = [[{"role": r, "content": c} for r, c in zip(roles, chat, strict=True)] for chat in chats]
        (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "r.toml").write_text(recipe)
        tasks = load_tasks()
        loaded = load_recipe(str(folder / "r.toml"), tasks)
        build(make_build_plan(loaded, tasks, byte_tokenizer, Locations(folder)), folder / "out")
        return folder / "out"

    return make


CHATS: list[tuple[str, Any]] = [(f"question {i}", f"answer {i}") for i in range(9)]


def documents_of(a: Path, b: Path) -> dict[str, Any]:
    return diff_builds(open_build(a), open_build(b))["splits"]["train"]["documents"]


def test_identical(built: Callable, chatdata: Callable) -> None:
    one, two = built("one", CHATS), built("two", CHATS)
    result = chatdata("diff", one, two)
    build_id = open_build(one).manifest["build_id"]
    assert (result.returncode, result.stdout) == (0, f"identical: build {build_id[:12]}\n")
    result = chatdata("diff", one, two, "--json")
    assert (result.returncode, json.loads(result.stdout)["identical"]) == (0, True)


def test_a_damaged_file_under_equal_manifests(built: Callable, chatdata: Callable) -> None:
    one, two = built("one", CHATS), built("two", CHATS)
    tokens = two / "train" / "tokens-00000.npy"
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    for a, b in ((one, two), (two, one)):
        result = chatdata("diff", a, b)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"Error: {tokens}: SHA-256 differs from the manifest's\n"


def test_a_changed_row(built: Callable, chatdata: Callable) -> None:
    other = [*CHATS[:4], ("question 4", "answer four"), *CHATS[5:]]
    one, two = built("one", CHATS), built("two", other)
    found = documents_of(one, two)
    assert (found["equal"], found["order"], found["columns"]) == (8, None, {})
    assert (found["only_a"]["count"], found["only_b"]["count"]) == (0, 0)
    assert (found["changed"]["count"], found["changed"]["same_length"]) == (1, 0)
    row = found["changed"]["first"][0]
    assert (row["task"], row["row"], row["differs"], row["first"], row["position"]) == (
        "conversations",
        4,
        "tokens",
        "tokens",
        len("bquestion 4e") + 2 + len("answer "),
    )
    assert row["doc_a"] == row["doc_b"]
    assert row["a"]["text"] == "⟦nswer 4<|assistant_end|>⟧" and row["b"]["text"] == "⟦nswer four<|assistant_end|>⟧"
    result = chatdata("diff", one, two)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert "  same row, other tokens or mask: 1 (conversations 1), 0 of them of the same length" in lines
    assert "      b: 26 tokens, … ⟦nswer four<|assistant_end|>⟧ …" in lines
    assert any(line.startswith("  c.jsonl.files.c.jsonl.sha256: ") for line in lines)
    assert lines.index("sources") < lines.index("train") < lines.index("train documents")


def test_only_the_mask(built: Callable) -> None:
    one, two = built("one", CHATS), built("two", CHATS)
    file = two / "train" / "mask-00000.npy"
    np.save(file, np.zeros_like(np.load(file)))
    found = _parting(open_build(one)["train"], open_build(two)["train"], 3, 3)
    assert (found["differs"], found["first"], found["position"]) == ("mask", "mask", 14)
    assert found["a"]["text"].endswith("<|assistant_start|>⟦answer ⟧") and "⟦" not in found["b"]["text"]


def test_more_rows_and_another_order(built: Callable) -> None:
    shuffled = built("one", CHATS)
    straight = built("two", CHATS, HEAD + "shuffle = {train = false}\n" + ENTRY)
    found = documents_of(shuffled, straight)
    assert (found["equal"], found["changed"]["count"]) == (9, 0)
    rows = [open_build(path)["train"].index["row"].to_list() for path in (shuffled, straight)]
    first = next(i for i in range(9) if rows[0][i] != rows[1][i])
    assert (found["order"]["a"]["doc"], found["order"]["b"]["doc"]) == (first, first)
    assert (found["order"]["a"]["row"], found["order"]["b"]["row"]) == (rows[0][first], rows[1][first])
    more = built("three", [*CHATS, ("new", "one")], HEAD + "shuffle = {train = false}\n" + ENTRY)
    found = documents_of(straight, more)
    assert (found["equal"], found["order"], found["only_a"]["count"]) == (9, None, 0)
    assert found["only_b"] == {
        "count": 1,
        "tasks": {"conversations": 1},
        "first": [{"doc": 9, "name": "conversations", "task": "conversations", "row": 9, "entry": 0}],
    }


def test_copies_pair_by_row(built: Callable) -> None:
    """Rows of one content in another order: the stream is the same, and each row finds itself."""
    found = documents_of(built("one", [("q", "a")] * 6), built("two", [("q", "a")] * 6, 'stage = "sft"\n' + ENTRY))
    assert (found["equal"], found["order"], found["columns"]) == (6, None, {})


def test_epochs_and_cut_documents(built: Callable) -> None:
    """Copies of one row pair with those of their own entry; the recipe's changes come first."""
    one = built("one", CHATS, HEAD + ENTRY + "epochs = 2\n")
    two = built("two", CHATS, HEAD + 'max_tokens = 20\noverflow = "truncate"\n' + ENTRY + "rows = 8\nepochs = 3\n")
    found = diff_builds(open_build(one), open_build(two))
    changes = {line["key"]: (line["a"], line["b"]) for line in found["recipe"]}
    assert changes["max_tokens"] == (None, 20) and changes["overflow"] == ("keep", "truncate")
    assert changes["train[0].rows"] == (None, 8) and changes["train[2]"][0] == ABSENT
    documents = found["splits"]["train"]["documents"]
    assert (documents["equal"], documents["changed"]["count"]) == (0, 16)
    assert (documents["only_a"]["count"], documents["only_b"]["count"]) == (2, 8)
    assert {row["row"] for row in documents["only_a"]["first"]} == {8}
    assert {row["first"] for row in documents["changed"]["first"]} == {"length"}
    assert lines_of(found)[3:6] == ["recipe", "  max_tokens: none → 20", "  overflow: keep → truncate"]


def test_spans_alone(built: Callable) -> None:
    """One text part or two in a row: the same tokens, other spans."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = documents_of(built("one", [("q", "ab")]), built("two", [("q", parts)]))
    assert (found["equal"], found["columns"]) == (1, {"spans": 1})


def test_a_split_on_one_side(built: Callable, chatdata: Callable) -> None:
    val = '[[val]]\ntask = "conversations"\npath = "c.jsonl"\nrows = 2\n'
    result = chatdata("diff", built("one", CHATS), built("two", CHATS, HEAD + ENTRY + val))
    assert result.returncode == 1 and "\nval: only in b\n" in result.stdout
    result = chatdata("diff", built("three", CHATS), "absent")
    assert (result.returncode, result.stderr) == (1, "Error: absent: no such folder (no manifest.json)\n")


def test_differences() -> None:
    a = {"x": 1, "list": [{"t": "a"}, {"t": "b", "rows": 2}, {"t": "c"}], "same": [1]}
    b = {"x": True, "list": [{"t": "a"}, {"t": "new"}, {"t": "b", "rows": 3}, {"t": "c"}], "same": [1], "y": None}
    assert list(differences(a, b)) == [
        ("x", 1, True),
        ("list[1].t", "b", "new"),
        ("list[1].rows", 2, ABSENT),
        ("list[2]", ABSENT, {"t": "b", "rows": 3}),
        ("y", ABSENT, None),
    ]
    assert list(differences({"l": [1, 2, 3]}, {"l": [1, 9, 2, 3]})) == [("l[1]", ABSENT, 9)]
    assert list(differences([0] * 40_000, [0] * 40_001)) == [("[40000]", ABSENT, 0)]
