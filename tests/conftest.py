"""Fixtures for all packages: where the shared data is, and builds made once per run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = Path(__file__).parent / "chatdata" / "recipes"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that is empty when the tests start: nothing rendered before may stand in for what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATDATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the shared data and golden results: skipped where absent, a failure where it is required (CI)."""
    path = Path(os.environ.get("CHATDATA_SHARED", ROOT / ".." / "shared")).resolve()
    if not (path / "golden").is_dir():
        reason = f"no shared data at {path} (set CHATDATA_SHARED)"
        if os.environ.get("CHATDATA_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def chatdata() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""
    return run_chatdata


def run_chatdata(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from chatdata.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)  # type: ignore[call-overload]


def build_shared(shared: Path, recipe: str, out: Path, *arguments: object) -> Path:
    """Build one of the recipes beside the tests from the shared data, through the command line."""
    data = shared / "data"
    command = ["build", "--recipe", RECIPES / f"{recipe}.toml", "--data-dir", data / "hub", "--out", out]
    command += ["--tokenizer", data / "tokenizer" / "tokenizer.pkl", "--words", data / "words_alpha.txt"]
    result = run_chatdata(*command, "--identity", data / "identity_conversations.jsonl", *arguments)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def golden_mid(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shared(shared, "golden_mid", tmp_path_factory.mktemp("golden") / "mid")


@pytest.fixture(scope="session")
def golden_sft(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shared(shared, "golden_sft", tmp_path_factory.mktemp("golden") / "sft")


@pytest.fixture(scope="session")
def demo_mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "mid"
    result = run_chatdata("build", "--stage", "mid", "--demo", "--limit", 300, "--out", out)
    assert result.returncode == 0, result.stderr
    return out
