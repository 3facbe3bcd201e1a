"""`chatdata build FILES…`: the recipe it stands for gives the same build, and what goes wrong is one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chatdata import open_build
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "data").mkdir()
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!"}]} for n in range(60)
    ]
    shared = [{"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "."}]} for n in range(30)]
    for name, rows in (("chats", chats), ("shared", shared)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "story.txt").write_text("Once upon a time.")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_it_stands_for_gives_the_same_build(folder: Path, chatdata: Run) -> None:
    files = ("data/chats.jsonl", "data/shared.jsonl")
    (folder / "recipes").mkdir()
    for place in ("mine.toml", "recipes/mine.toml"):
        done = chatdata(
            *("build", *files, "--tokenizer", "t", "--val", "0.2", "--max-tokens", 40, "--overflow", "drop"),
            *("--write-recipe", place, "--out", f"{place}-1"),
        )
        assert done.returncode == 0, done.stderr
        assert (folder / place).read_text() in done.stdout
        assert [line.split()[:4] for line in done.stdout.splitlines() if "OpenAI" in line] == [
            ["train", "chats", "OpenAI", "messages"],
            ["val", "chats", "OpenAI", "messages"],
        ]
        assert chatdata("build", "--recipe", place, "--tokenizer", "t", "--out", f"{place}-2").returncode == 0
        one, two = (open_build(folder / f"{place}-{i}").manifest for i in (1, 2))
        assert one["build_id"] == two["build_id"]
        assert [entry["name"] for entry in one["splits"]["val"]["entries"]] == ["chats", "shared"]
    assert chatdata("verify", "mine.toml-1", "--level", "semantic").returncode == 0


def test_shares_and_arrays(folder: Path, chatdata: Run) -> None:
    rows = [{"q": f"{n}?", "a": "!"} for n in range(30)]
    (folder / "qa.json").write_text(json.dumps(rows, indent=1))
    entry = '[[train]]\ntask = "conversations"\n'
    (folder / "r.toml").write_text(
        f'stage = "sft"\n{entry}path = "qa.json"\nshare = 1\nname = "qa"\n'
        f'columns = {{ prompt = "q", completion = "a" }}\n'
        f'{entry}path = "data/chats.jsonl"\nshare = 1.5\nname = "chats"\n'
    )
    done = chatdata("build", "--recipe", "r.toml", "--tokenizer", "t", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[2:5]] == [
        ["split", "entry", "rows", "share", "actual", "source"],
        ["train", "qa", "30", "40.0%", "39.5%", "qa.json"],
        ["train", "chats", "46", "60.0%", "60.5%", "data/chats.jsonl"],
    ]
    assert chatdata("verify", "out", "--level", "semantic").returncode == 0


def test_plain_text(folder: Path, chatdata: Run) -> None:
    done = chatdata("build", "story.txt", "--stage", "base", "--tokenizer", "t", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "plain text" in done.stdout and open_build(folder / "out").manifest["stage"] == "base"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data/none.jsonl"], 1, "none: data/none.jsonl: no such file"),
        (["data"], 1, "data: data: a folder; name a file, or data/*.jsonl"),
        (["a.csv"], 1, "a: a.csv: expected .jsonl, .json or .parquet"),
        (["story.txt"], 1, "story: story.txt: expected .jsonl, .json or .parquet; plain text is for stage base"),
        (["data/chats.jsonl", "./data/chats.jsonl"], 2, "data/chats.jsonl: the same file twice; for two epochs set "),
        (["data/chats.jsonl", "--val", "1"], 2, "Invalid value for '--val': 1.0 is not in the range 0<x<1."),
        (["data/chats.jsonl", "--val", "0.0001"], 1, "val is empty: val_share = 0.0001 gives it none of 60"),
        (["data/chats.jsonl", "--demo", "--stage", "mid"], 2, "give FILEs or --demo, not both"),
        (
            ["data/chats.jsonl", "--write-recipe", "a.csv"],
            2,
            "--write-recipe a.csv: already exists; choose another name",
        ),
        (["data/chats.jsonl", "--write-recipe", "x/a"], 2, "--write-recipe x/a: there is no folder x"),
        (["--val", "0.1", "--stage", "mid"], 2, "--val is for FILEs: chatdata build chats.jsonl … --val 0.1"),
    ],
)
def test_errors(folder: Path, chatdata: Run, arguments: list[str], code: int, message: str) -> None:
    (folder / "a.csv").write_text("a,b\n")
    done = chatdata("build", *arguments, "--tokenizer", "t", "--out", "out", env={**os.environ, "COLUMNS": "200"})
    assert (done.returncode, done.stderr.splitlines()[-1][: len(message) + 7]) == (code, f"Error: {message}")
    assert not (folder / "out").exists()
