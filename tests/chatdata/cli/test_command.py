"""What the three command lines say when the system refuses: the file, what is wrong with it, what would be right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from chatdata.cli.command import run_command
from chatdata.disk import naming


@pytest.fixture
def say(monkeypatch, capsys):
    """say(action, *arguments): exit code and standard error of a command line whose commands "run" and "chat" do it."""

    def call(action, *arguments, **kwargs):
        cli = click.Group(commands=[click.Command(name, callback=action) for name in ("run", "chat")])
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            run_command(cli, "tool", "interrupted; call again", **kwargs)
        return ended.value.code, capsys.readouterr().err

    return call


def write_in_a_full_disk(path: Path) -> None:
    with naming(path):
        Path("/dev/full").write_text("text")


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda d: (d / "file").mkdir(), "file: file exists; choose another path"),
        (lambda d: (d / "file" / "x").mkdir(), "file/x: not a directory; a part of this path is a file"),
        (lambda d: (d / "no/x").touch(), "no/x: no such file or directory; check the path: its folder must be there"),
        (lambda d: d.joinpath("folder").read_bytes(), "folder: is a directory; name a file"),
        (lambda d: (d / "file").replace(d / "folder"), "folder: is a directory; name a file"),
        (lambda d: (d / ("x" * 300)).touch(), "x" * 300 + ": file name too long; choose a shorter name"),
        (lambda d: write_in_a_full_disk(d / "a"), "a: no space left on device; free some space, then call again"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_names_the_file(say, tmp_path, action, said) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert say(lambda: action(tmp_path), "run") == (1, f"Error: {tmp_path}/{said}\n")


def test_an_interruption_says_what_holds_for_the_command(say) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert say(interrupt, "chat") == (130, "\nError: interrupted; call again\n")
    assert say(interrupt, "run", only="run") == (130, "\nError: interrupted; call again\n")
    assert say(interrupt, "chat", only="run") == (130, "\nError: interrupted\n")


def test_an_ascii_terminal_gets_no_traceback(chatdata: Callable) -> None:
    command = ["build", "--stage", "mid", "--demo", "--dry-run"]
    assert "→" in chatdata(*command).stdout
    assert chatdata(*command, env={**os.environ, "PYTHONIOENCODING": "ascii"}).returncode == 0
