from __future__ import annotations

from pathlib import Path

import pytest

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.errors import RecipeError
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def test_too_many_entries_for_the_index(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "c.jsonl").write_text(
        '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]\n'
    )
    entry = '[[train]]\ntask = "conversations"\npath = "c.jsonl"\nepochs = 40000\n'
    (tmp_path / "r.toml").write_text(f'stage = "mid"\n{entry}')
    tasks = load_tasks()
    recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
    with pytest.raises(RecipeError, match="more than 32,768 entries in a split"):
        make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path))


def test_the_limit_is_in_the_manifest(demo_mid: Path) -> None:
    assert open_build(demo_mid).manifest["recipe"]["limit"] == 300
