from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chatdata import open_build
from chatdata.build.estimate import estimate
from chatdata.build.plan import make_build_plan
from chatdata.errors import ConversationError
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


def test_the_estimate_of_the_demo(demo_mid: Path, chatdata: Callable) -> None:
    made = open_build(demo_mid)
    limit = str(made.manifest["recipe"]["limit"])
    found = chatdata("build", "--stage", "mid", "--demo", "--limit", limit, "--dry-run", "--json").stdout
    about, splits = (json.loads(found)[key] for key in ("about", "splits"))
    for name, split in made.splits.items():
        for guess, entry in zip(splits[name], made.manifest["splits"][name]["entries"], strict=True):
            assert guess["tokens"] == pytest.approx(entry["tokens"], rel=0.15)
        assert sum(guess["tokens"] for guess in splits[name]) == pytest.approx(split.num_tokens, rel=0.05)
    size = sum(file.stat().st_size for split in made.splits for file in (demo_mid / split).iterdir())
    assert about["output_bytes"] == pytest.approx(size, rel=0.15)
    assert 0 < about["seconds"] < 60 and about["cache_bytes"] > about["output_bytes"] / 2


def test_a_sample_of_many_rows(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    """Rows grow towards the end, and the policies count."""
    line = '[{"role": "user", "content": "%s"}, {"role": "assistant", "content": "!"}]\n'
    (tmp_path / "c.jsonl").write_text("".join(line % ("x" * (i // 100)) for i in range(5_000)))
    (tmp_path / "r.toml").write_text(
        'stage = "sft"\nmax_tokens = 40\noverflow = "drop"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n'
    )
    tasks = load_tasks()
    plan = make_build_plan(load_recipe(str(tmp_path / "r.toml"), tasks), tasks, byte_tokenizer, Locations(tmp_path))
    exact = sum(i // 100 + 6 for i in range(5_000) if i // 100 + 6 <= 40)
    assert estimate(plan, 1)["tokens"] == pytest.approx(exact, rel=0.1)
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write("[1]\n")
    plan = make_build_plan(load_recipe(str(tmp_path / "r.toml"), tasks), tasks, byte_tokenizer, Locations(tmp_path))
    with pytest.raises(ConversationError, match=r"^c.jsonl line 5001: message 0"):
        estimate(plan, 1)
