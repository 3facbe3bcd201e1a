from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from chatdata.build.own_files import form_of, recipe_of_files, toml_of
from chatdata.errors import UsageError
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks


def test_an_entry_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = (Path("data/a.jsonl"), tmp_path / "b.parquet", Path("data/b.jsonl"))
    assert recipe_of_files(files, Path(), "sft", 0.05) == {
        "stage": "sft",
        "train": [
            {"name": "a", "task": "conversations", "path": "data/a.jsonl", "val_share": 0.05},
            {"name": "b.parquet", "task": "conversations", "path": "b.parquet", "val_share": 0.05},
            {"name": "data/b.jsonl", "task": "conversations", "path": "data/b.jsonl", "val_share": 0.05},
        ],
    }
    recipe = recipe_of_files(files[:1], Path("recipes"), "base", None)
    assert recipe["train"] == [{"name": "a", "task": "text", "path": "../data/a.jsonl"}]


def test_a_file_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    with pytest.raises(UsageError, match=r"b.jsonl: the same file twice; for two epochs set epochs = 2 in a recipe"):
        recipe_of_files((tmp_path / "a.jsonl", tmp_path / "b.jsonl"), tmp_path, "sft", None)


def test_toml() -> None:
    path = 'odd "name" \\ é \x7f 😀.jsonl'
    recipe = {"stage": "sft", "max_tokens": 512, "overflow": "drop", "train": [{"path": path, "val_share": 1e-05}]}
    assert tomllib.loads(toml_of(recipe)) == recipe
    recipe = {"stage": "sft", "train": [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]}
    assert toml_of(recipe) == (
        'stage = "sft"\n\n[[train]]\nname = "a"\npath = "a.jsonl"\n\n[[train]]\nname = "b"\npath = "b.jsonl"\n'
    )


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ([{"role": "user", "content": "Hi"}], "a list of messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "OpenAI messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "ShareGPT"),
        ({"conversations": [{"role": "user", "content": "Hi"}]}, "OpenAI messages"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Alpaca"),
        ({"instruction": "Add", "context": "", "response": "2"}, "Dolly"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion"),
        ({"question": "Hi?", "answer": "Hello"}, "question/answer"),
        ({"query": "Hi?", "tools": "[]", "answers": "[]"}, "xLAM"),
        ({"text": "Once"}, "plain text"),
        ({"messages": None, "text": "Once"}, "plain text"),
        ("Once", "unknown"),
    ],
)
def test_forms(tmp_path: Path, row: Any, form: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert form_of(Source("a", load_tasks()["conversations"], (SourceFile(tmp_path / "a.jsonl", "a"),))) == form
