from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatdata import open_build
from chatdata.build.plan import BuildPlan, make_build_plan, number_documents, rows_in_order
from chatdata.errors import RecipeError, UsageError
from chatdata.recipe import load_recipe, parse_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def test_documents_are_counted_before_any_list_is_made(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "words.txt").write_text("apple\npear\n")
    entry = '[[train]]\ntask = "simple_spelling"\nwords = "words.txt"\nrows = 100_000_000\n'
    (tmp_path / "r.toml").write_text(f'stage = "mid"\n{entry}epochs = 32_768\n')
    tasks = load_tasks()
    recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
    with pytest.raises(
        RecipeError, match=r"^r: 3,276,800,000,000 documents in train; at most 100,000,000 fit a split$"
    ):
        make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path))
    plan = make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path), limit=1)
    assert len(plan.splits["train"]) == 32_768
    for limit in (0, 2**53, 10**30):
        with pytest.raises(UsageError, match=r"must be from 1 to 9,007,199,254,740,991$"):
            make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path), limit=limit)


def test_the_limit_is_in_the_manifest(demo_mid: Path) -> None:
    assert open_build(demo_mid).manifest["recipe"]["limit"] == 300


def chats(path: Path, numbers: range) -> None:
    talk = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in numbers]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))


def planned(folder: Path, tokenizer: Tokenizer, *entries: dict[str, Any], **keys: Any) -> BuildPlan:
    tasks = load_tasks()
    train = [{"task": "conversations", "path": "c.jsonl", **entry} for entry in entries]
    recipe = parse_recipe({"stage": "sft", "train": train, **keys}, "r.toml", folder / "r.toml", tasks)
    return make_build_plan(recipe, tasks, tokenizer, Locations(folder))


def taken(plan: BuildPlan, split: str) -> list[list[int]]:
    return [entry.task_positions.tolist() for entry in plan.splits[split]]


def test_added_rows_move_no_row_to_the_other_side(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    chats(tmp_path / "c.jsonl", range(40))
    before = planned(tmp_path, byte_tokenizer, {"val_share": 0.2})
    train, val = taken(before, "train")[0], taken(before, "val")[0]
    assert sorted(train + val) == list(range(40)) and train and val
    chats(tmp_path / "c.jsonl", range(200))
    after = planned(tmp_path, byte_tokenizer, {"val_share": 0.2})
    assert [row for row in taken(after, "train")[0] if row < 40] == train
    assert [row for row in taken(after, "val")[0] if row < 40] == val
    assert set(val) <= set(taken(planned(tmp_path, byte_tokenizer, {"val_share": 0.3}), "val")[0])


def test_entries_choose_among_the_rows_of_their_side(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    chats(tmp_path / "c.jsonl", range(40))
    whole = planned(tmp_path, byte_tokenizer, {"val_share": 0.2})
    train, val = taken(whole, "train")[0], taken(whole, "val")[0]
    plan = planned(tmp_path, byte_tokenizer, {"val_share": 0.2, "start": 1, "rows": 5, "epochs": 1.5})
    assert (taken(plan, "train"), taken(plan, "val")) == ([train[1:6], train[1:3]], [val])
    rows = rows_in_order(plan, "val", number_documents(plan))
    assert sorted(rows["row"].tolist()) == sorted(rows["task_position"].tolist()) == val


def test_shares_are_of_the_rows_there_are(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    chats(tmp_path / "c.jsonl", range(40))
    chats(tmp_path / "d.jsonl", range(40, 50))
    plan = planned(tmp_path, byte_tokenizer, {"share": 1}, {"path": "d.jsonl", "share": 1})
    assert [len(entry.taken) for entry in plan.splits["train"]] == [10, 10]
    with pytest.raises(RecipeError, match=r"^conversations train \(d.jsonl\): its share of 40 rows is none$"):
        planned(tmp_path, byte_tokenizer, {"share": 100}, {"path": "d.jsonl", "share": 1})


def test_an_empty_side_is_an_error(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    chats(tmp_path / "c.jsonl", range(3))
    for share, side, other in ((0.01, "val", "larger"), (0.99, "train", "smaller")):
        with pytest.raises(
            RecipeError, match=rf"^{side} is empty: val_share = {share} gives it none of 3 rows; choose a {other} share"
        ):
            planned(tmp_path, byte_tokenizer, {"val_share": share})


def test_a_part_of_less_than_a_row_is_an_error(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    chats(tmp_path / "c.jsonl", range(3))
    with pytest.raises(
        RecipeError, match=r"^conversations train \(c.jsonl\): epochs: 0.1 of 3 rows is less than one row"
    ):
        planned(tmp_path, byte_tokenizer, {"epochs": 0.1})
