"""The recipes of the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chatdata import open_build


def test_validation_of_the_demo_is_not_its_training_data(tmp_path: Path, chatdata: Callable) -> None:
    assert chatdata("build", "--stage", "mid", "--demo", "--out", tmp_path / "mid").returncode == 0
    build = open_build(tmp_path / "mid")
    trained = set(build["train"].index["digest"].to_list())
    repeated = sum(digest in trained for digest in build["val"].index["digest"].to_list())
    assert repeated <= 0.01 * len(build["val"])
