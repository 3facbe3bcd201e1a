from __future__ import annotations

from pathlib import Path

import pytest

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.errors import RecipeError, UsageError
from chatdata.recipe import load_recipe
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
