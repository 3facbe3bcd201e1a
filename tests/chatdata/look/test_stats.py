from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.diff import diff_builds, lines_of
from chatdata.look.stats import build_stats
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def test_numbers_are_those_of_the_documents(demo_mid: Path, chatdata: Callable) -> None:
    numbers = json.loads(chatdata("stats", demo_mid, "--json").stdout)
    build = open_build(demo_mid)
    for name, tasks in numbers["splits"].items():
        assert [row["tokens"] for row in tasks] == sorted((row["tokens"] for row in tasks), reverse=True)
        frame = build[name].index
        for row in tasks:
            documents = [build[name][doc] for doc in frame.filter(frame["task"].cast(str) == row["task"])["doc"]]
            lengths = sorted(map(len, documents))
            assert (row["documents"], row["tokens"]) == (len(documents), sum(lengths))
            assert row["supervised"] == sum(document.num_supervised for document in documents)
            assert (row["length"]["min"], row["length"]["max"]) == (lengths[0], lengths[-1])


def test_narrow_terminals_cut_no_number(demo_mid: Path, chatdata: Callable) -> None:
    shown = chatdata("stats", demo_mid, env={**os.environ, "COLUMNS": "60"}).stdout
    numbers = json.loads(chatdata("stats", demo_mid, "--json").stdout)["splits"]["train"]
    assert all(row["task"] in shown and f"{row['tokens']:,}" in shown for row in numbers) and "…" not in shown


def test_names_of_entries(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    """In stats, diff and inspect."""
    tasks = load_tasks()
    for name, count in (("a", 3), ("b", 2)):
        chats = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": name}] for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    entries = [f'[[train]]\ntask = "conversations"\npath = "{name}.jsonl"\n' for name in "ab"]
    for out, text in (("one", f'{entries[0]}name = "mine"\nepochs = 1.4\n{entries[1]}'), ("two", entries[1])):
        (tmp_path / "r.toml").write_text(f'stage = "sft"\n{text}')
        recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
        build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path)), tmp_path / out)
    rows = build_stats(open_build(tmp_path / "one"))["splits"]["train"]
    assert [(row["name"], row["task"], row["documents"]) for row in rows] == [
        ("mine", "conversations", 4),
        ("conversations", "conversations", 2),
    ]
    found = diff_builds(open_build(tmp_path / "one"), open_build(tmp_path / "two"))
    assert found["splits"]["train"]["documents"]["only_a"]["tasks"] == {"mine": 4}
    assert any("only in a: 4 (mine 4); first document" in line for line in lines_of(found))
    assert chatdata("inspect", tmp_path / "one", "--task", "mine").stdout.count("name mine · task conversations") == 3
