"""A run to report on, made once: 24 steps on a small build, with checkpoints and validations."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import write_build

from chattrain.cli import cli

SIZES = ["--init", "random:d1", "--seq-len", 64, "--device-batch-size", 4, "--device", "cpu"]


@pytest.fixture(scope="session", autouse=True)
def _altair() -> None:
    for name in ("altair", "vl_convert", "jinja2"):
        pytest.importorskip(name, reason=f"a report needs {name}: uv sync --extra report")


@pytest.fixture(scope="session")
def chattrain() -> Callable[..., str]:
    """A command's standard output."""

    def call(*arguments: object) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            cli.main([*map(str, arguments)], standalone_mode=False)
        return printed.getvalue()

    return call


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("build") / "sft", "sft", seed=18)  # not in the cache


@pytest.fixture(scope="session")
def run(build: Path, tmp_path_factory: pytest.TempPathFactory, chattrain: Callable[..., str]) -> Path:
    """In two micro-batches a step; its log says that the loss of step 20 jumped. Checkpoints at 8, 16 and 24."""
    out = tmp_path_factory.mktemp("runs") / "<i>run&lt;"
    more = ["--total-batch-tokens", 512, "--steps", 24, "--save-every", 8, "--keep-last", 3, "--eval-every", 12]
    chattrain("run", "--data", build, *SIZES, *more, "--out", out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["step"] == 20:
            line["loss"] *= 2
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
