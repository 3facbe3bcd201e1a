"""docs/faq.md: every command on it is run and prints the message that the page shows.

A block has commands, which start with `$`, then what the last one prints on standard error.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
SECTIONS = re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
EXIT_CODES = {"No tokenizer": 2, "A damaged build": 3, "HumanEval": 2}  # all others: 1


def block_of(text: str) -> tuple[list[str], list[str]]:
    """Commands and expected lines of the indented block."""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return [line[2:] for line in lines if line.startswith("$ ")], [line for line in lines if not line.startswith("$ ")]


@pytest.fixture
def folder(demo_work: Path, tmp_path: Path) -> Path:
    """The folder that the page describes, with all files it shows."""
    folder = shutil.copytree(demo_work, tmp_path / "me")
    (folder / "hub").mkdir()
    for name, text in re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, re.M | re.S):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_an_error_says_what_the_page_says(
    title: str, text: str, folder: Path, command_line: Callable, offline: None
) -> None:
    commands, expected = block_of(text)
    for command in commands[:-1]:
        if "# in another window" in command:
            _hold_lock(folder / "out" / ".new.partial")
        elif command.startswith("chat"):
            result = command_line(command, folder)
            assert result.returncode == 0, result.stderr
        else:
            subprocess.run(command, shell=True, cwd=folder, check=True)
    result = command_line(commands[-1], folder)
    said = result.stderr.replace(str(folder), "…").splitlines()
    assert said[-len(expected) :] == expected and expected, said
    assert "Traceback" not in result.stderr
    assert result.returncode == EXIT_CODES.get(title, 1)
    remedy = text[text.rindex(expected[-1]) + len(expected[-1]) :]
    assert remedy.strip(), "the page does not say what to do"


def _hold_lock(partial: Path) -> None:
    """Hold the lock of a running build until this process ends."""
    partial.mkdir()
    (partial / ".chatdata-build").touch()
    fcntl.flock(os.open(partial, os.O_RDONLY), fcntl.LOCK_EX)


def test_every_title_with_an_exit_code_is_there() -> None:
    titles = [title for title, _ in SECTIONS]
    assert set(EXIT_CODES) <= set(titles) and len(titles) == len(set(titles)) >= 15
