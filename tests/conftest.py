"""Fixtures for all packages: where the shared data is, and builds made once per run, for all its workers."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_chromium, open_browser

ROOT = Path(__file__).parent.parent
RECIPES = Path(__file__).parent / "chatdata" / "recipes"

# One thread for each process, before any imports torch: the workers of `pytest -n` have a core each, and a sum has one
# order everywhere, so that files can be compared to the byte.
os.environ["OMP_NUM_THREADS"] = "1"
# Altair, Jupyter, `datasets` and uv need a home folder; tests of its absence take it away
if not Path(os.environ.get("HOME", "/nonexistent")).is_dir():
    os.environ["HOME"] = tempfile.mkdtemp()
if sys.dont_write_bytecode:  # then each process started here would compile its libraries again: torch's take 3 s
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / ".pytest_cache" / "bytecode")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}


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
def browser() -> Iterator[Browser]:
    """One headless Chromium per process: skipped where there is none, a failure where it is required (CI)."""
    if find_chromium() is None:
        reason = "no Chromium on this machine (Debian: apt-get install chromium)"
        if os.environ.get("CHATDATA_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open_browser(Path(folder)) as opened:
        yield opened


@pytest.fixture(scope="session")
def make_split() -> Callable[..., Any]:
    """Makes splits in memory; the id of <|assistant_end|> is 9.

    make_split(tokens of each document, masks, shards = documents of each shard, dtype of the tokens)
    """

    from chatdata.shards.read import Build, Split

    @dataclass(frozen=True)
    class MemorySplit(Split):
        """A split whose files are arrays: everything but `map` is chatdata's own."""

        arrays: tuple[dict[str, np.ndarray], ...] = ()

        def map(self, kind: str, number: int) -> np.ndarray:
            return self.arrays[number][kind]

    def make(
        documents: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        shards: Sequence[int] | None = None,
        dtype: str = "<u2",
    ) -> Split:
        masks = masks if masks is not None else [[0] + [1] * (len(d) - 1) for d in documents]
        assert [*map(len, masks)] == [*map(len, documents)]
        arrays, records, first = [], [], 0
        for count in shards if shards is not None else [len(documents)]:
            lengths = [len(d) for d in documents[first : first + count]]
            tokens = np.array([i for d in documents[first : first + count] for i in d], dtype)
            mask = np.array([m for d in masks[first : first + count] for m in d], "|u1")
            offsets = np.cumsum([0, *lengths], dtype="<i8")
            arrays.append({"tokens": tokens, "mask": mask, "offsets": offsets})
            records.append({"documents": count, "tokens": len(tokens)})
            first += count
        assert first == len(documents)
        manifest = {
            "build_id": "memory",
            "stage": "sft",
            "splits": {"train": {"shards": records}},
            "tokenizer": {"special_ids": {"<|assistant_end|>": 9}},
        }
        return MemorySplit(Build(Path("memory"), manifest), "train", records, tuple(arrays))

    return make


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
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """build_once(name, make): the folder that `make` writes, by the first worker that asks, for all of them."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build(name: str, make: Callable[[Path], object]) -> Path:
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (common / name).exists():  # a build appears when it is complete
                make(common / name)
        return common / name

    return build


@pytest.fixture(scope="session")
def build_recipe(shared: Path) -> Callable[..., Path]:
    """(recipe beside the tests, out, *arguments) → out, built from the shared data."""
    return partial(build_shared, shared)


@pytest.fixture(scope="session")
def golden_mid(shared: Path, build_once: Callable[..., Path]) -> Path:
    return build_once("golden-mid", lambda out: build_shared(shared, "golden_mid", out))


@pytest.fixture(scope="session")
def golden_sft(shared: Path, build_once: Callable[..., Path]) -> Path:
    return build_once("golden-sft", lambda out: build_shared(shared, "golden_sft", out))


@pytest.fixture(scope="session")
def demo_mid(build_once: Callable[..., Path]) -> Path:
    def make(out: Path) -> None:
        result = run_chatdata("build", "--stage", "mid", "--demo", "--limit", 300, "--out", out)
        assert result.returncode == 0, result.stderr

    return build_once("demo-mid", make)


@pytest.fixture(scope="session")
def command_line() -> Callable[[str, Path], subprocess.CompletedProcess[str]]:
    """command_line(line, folder): runs a line as a page shows it, `chatdata …`, `chattrain …` or `chateval …`, there.

    In this process, where torch is loaded once (3 s in every process of its own), but builds with one worker.
    """

    def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
        program, *arguments = shlex.split(line, comments=True)
        if (program, *arguments[:1]) == ("chatdata", "build"):
            arguments += ["--workers", "1"]
        out, err, code = io.StringIO(), io.StringIO(), 0
        before = signal.getsignal(signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr("sys.argv", [program, *arguments])
            patch.setattr("sys.stdin", io.StringIO())
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    import_module(f"{program}.cli").main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess([program, *arguments], code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def demo_work(build_once: Callable[..., Path], command_line: Callable) -> Path:
    """A folder as docs/faq.md says its own was: two small demo builds and a run of two steps. Copy it before use."""
    page = (ROOT / "docs" / "faq.md").read_text().split("\n## ")[0]

    def make(folder: Path) -> None:
        partial = folder.with_suffix(".partial")
        partial.mkdir()
        commands = re.findall(r"^    \$ (.*)$", page, re.M)
        assert [command.split()[0] for command in commands] == ["chatdata", "chatdata", "chattrain"]
        for command in commands:
            result = command_line(command, partial)
            assert result.returncode == 0, result.stderr
        partial.rename(folder)

    return build_once("demo-work", make)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing in the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
