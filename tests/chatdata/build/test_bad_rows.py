"""invalid = "drop": rows that cannot be used change nothing but the counts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatdata import open_build
from chatdata.build.divide import in_val_rows
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.rerender import verify_semantic
from chatdata.errors import BuildError, ChatdataError
from chatdata.recipe import load_recipe
from chatdata.sources.file import SourceFile
from chatdata.sources.find import Locations
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

RECIPE = """
stage = "sft"
invalid = "drop"
[shuffle]
train = false
[[train]]
task = "conversations"
path = "c.{kind}"
"""
GOOD = b'[{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}]'
BAD = {
    b'{"messages": [': "not valid JSON",
    b'{"messages": [], "messages": []}': 'not valid JSON: key "messages" twice in one object',
    b'[{"role": "user", "content": "\xff"}]': "not UTF-8 at byte 30; save it as UTF-8",
    b'[{"role": "user", "content": 5}]': 'message 0, key "content": must be a string or a list of parts, not a number',
    b'[{"role": "user", "content": "\\ud800"}]': 'message 0, key "content": lone surrogate U+D800 at character 0',
    b'[{"role": "user", "content": "' + b" " * 1_000_000 + b'"}]': "bytes: the split pattern gives up on a text of",
    b"null": "a conversation is a list of messages or an object with messages, not null",
}


def run(folder: Path, kind: str, tokenizer: Tokenizer, workers: int = 1, more: str = "") -> tuple[Path, dict[str, Any]]:
    (folder / "r.toml").write_text(RECIPE.format(kind=kind) + more)
    tasks = load_tasks()
    plan = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder))
    build(plan, folder / "out", workers=workers, force=True, decontaminate="off")
    return folder / "out", json.loads((folder / "out" / "report.json").read_text())["invalid"]


def documents(built: Path, split: str = "train") -> list[tuple[list[int], list[int]]]:
    return [(document.tokens.tolist(), document.mask.tolist()) for document in open_build(built)[split]]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_kind_of_bad_row_in_jsonl(cached: Path, byte_tokenizer: Tokenizer) -> None:
    (cached / "c.jsonl").write_bytes(b"\n".join([GOOD, b"", *BAD, GOOD]))
    out, invalid = run(cached, "jsonl", byte_tokenizer)
    assert documents(out) == 2 * documents(out)[:1]
    entry = open_build(out).manifest["splits"]["train"]["entries"][0]
    assert (entry["rows"], entry["documents"], entry["dropped"]["invalid"]) == (9, 2, 7)
    listed = invalid["train"].pop("listed")
    assert [(row["file"], row["line"]) for row in listed] == [("c.jsonl", line) for line in range(3, 10)]
    for row, reason in zip(listed, BAD.values(), strict=True):
        assert row["reason"].startswith(reason)
    reasons = invalid["train"].pop("reasons")
    assert invalid == {"train": {"rows": 7}} and set(reasons.values()) == {1}
    assert 'message N, key "content": lone surrogate U+DN at character N' in reasons
    tasks = load_tasks()
    assert verify_semantic(out, Locations(cached), tasks, recipe=str(cached / "r.toml"), share=1) == []


def test_text_in_parquet_that_is_not_utf_8(cached: Path, byte_tokenizer: Tokenizer) -> None:
    text = pa.array([b"Hi", b"\xff", b"Ho", b"Why?"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": text, "completion": pa.array(["A", "B", "C", "D"])}), cached / "c.parquet")
    out, invalid = run(cached, "parquet", byte_tokenizer)
    assert len(documents(out)) == 3
    assert invalid["train"]["listed"] == [{"file": "c.parquet", "row": 1, "reason": "text that is not UTF-8"}]


def test_val_share_divides_bad_rows_too(cached: Path, byte_tokenizer: Tokenizer) -> None:
    rows = [json.dumps([{"role": "user", "content": f"{n}?"}]).encode() for n in range(40)]
    (cached / "c.jsonl").write_bytes(b"\n".join([*rows[:20], *BAD, *rows[20:]]))
    out, invalid = run(cached, "jsonl", byte_tokenizer, more="val_share = 0.4\n")
    assert sum(invalid[split]["rows"] for split in ("train", "val")) == len(BAD)
    assert len(documents(out)) + len(documents(out, "val")) == 40
    source = Source("c", load_tasks()["conversations"], (SourceFile(cached / "c.jsonl", "c"),))
    with pytest.raises(ChatdataError, match=r"^c line 21: not valid JSON"):
        in_val_rows(source, 0.4)


def test_nothing_but_bad_rows(cached: Path, byte_tokenizer: Tokenizer) -> None:
    (cached / "c.jsonl").write_bytes(b"\n".join(BAD))
    with pytest.raises(BuildError, match="the recipe's policies drop all 7 documents"):
        run(cached, "jsonl", byte_tokenizer)


def test_a_row_is_listed_once_and_no_more_than_a_thousand_are(cached: Path, byte_tokenizer: Tokenizer) -> None:
    (cached / "c.jsonl").write_bytes(b"\n".join([GOOD, *[b"null"] * 1_100]))
    out, invalid = run(cached, "jsonl", byte_tokenizer, more="epochs = 2\n")
    entries = open_build(out).manifest["splits"]["train"]["entries"]
    assert [entry["dropped"]["invalid"] for entry in entries] == [1_100, 1_100]
    assert (invalid["train"]["rows"], len(invalid["train"]["listed"])) == (1_100, 1_000)


texts = st.text(st.characters(codec="utf-8"), max_size=8)
chats = st.lists(texts, min_size=1, max_size=4).map(
    lambda turns: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
)
bad_chats = st.sampled_from(
    [[], [{"role": "assistant", "content": "Hi"}], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]]
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.booleans(), chats, bad_chats), min_size=2, max_size=12).filter(
        lambda rows: any(good for good, *_ in rows)
    ),
    st.sampled_from(["jsonl", "parquet"]),
    st.booleans(),
)
def test_the_others_are_what_they_are_without_the_bad_rows(
    cached: Path, byte_tokenizer: Tokenizer, rows: list[tuple[bool, Any, Any]], kind: str, broken: bool
) -> None:
    found = []
    for kept in (rows, [row for row in rows if row[0]]):
        messages = [chat if good else bad for good, chat, bad in kept]
        if kind == "parquet":
            kinds = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
            pq.write_table(pa.table({"messages": pa.array(messages, kinds)}), cached / "c.parquet")
        else:
            lines = [json.dumps(m).encode()[: None if row[0] or not broken else -1] for m, row in zip(messages, kept)]  # noqa: B905
            (cached / "c.jsonl").write_bytes(b"\n".join(lines))
        out, invalid = run(cached, kind, byte_tokenizer)
        found.append((documents(out), invalid["train"]["rows"]))
    num_bad = sum(not good for good, *_ in rows)
    assert found[0][0] == found[1][0] and [n for _, n in found] == [num_bad, 0]


def test_two_workers_drop_the_same_rows(
    cached: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b'[{"role": "user", "content": "' + b"How far is it? " * 400 + b'"}]'
    rows = [list(BAD)[n % 5] if n % 97 == 0 else long for n in range(1_500)]  # 9 MB: three work units
    (cached / "c.jsonl").write_bytes(b"\n".join(rows))
    found = []
    for workers in (1, 2):
        monkeypatch.setenv("CHATDATA_CACHE", str(cached / f"cache{workers}"))
        out, invalid = run(cached, "jsonl", byte_tokenizer, workers)
        found.append(((out / "manifest.json").read_bytes(), invalid))
    assert found[0] == found[1] and found[0][1]["train"]["rows"] == 16


def test_the_command_prints_them(cached: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    from chatdata.tokenizer.files import save_tokenizer

    save_tokenizer(byte_tokenizer, cached / "t")
    (cached / "r.toml").write_text(RECIPE.format(kind="jsonl"))
    (cached / "c.jsonl").write_bytes(b"\n".join([GOOD, b"null", b"5", b"[1]", b"[2]"]))
    command = ("build", "--recipe", cached / "r.toml", "--tokenizer", cached / "t", "--out", cached / "out")
    result = chatdata(*command, env={**os.environ, "CHATDATA_CACHE": str(cached / "cache")})
    assert result.returncode == 0, result.stderr
    shown = [line.rstrip() for line in result.stdout.splitlines()]
    start = shown.index("4 documents dropped: the row cannot be used")
    assert shown[start + 1 : start + 5] == [
        "  c.jsonl:2: a conversation is a list of messages or an object with messages, not null",
        "  c.jsonl:3: a conversation is a list of messages or an object with messages, not a number",
        "  c.jsonl:4: message 0: must be an object with role and content, not a number",
        "  … report.json, in the build, lists 4 of these rows",
    ]
    assert "4 documents dropped: the row cannot be used" in chatdata("stats", cached / "out").stdout
