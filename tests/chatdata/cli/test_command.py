"""What the three command lines say when the system refuses: the file, what is wrong with it, what would be right."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from chatdata.cli.command import run_command
from chatdata.disk import naming
from chatdata.errors import ChatdataError


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


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--out=~/x", "--out=/of/me/x"),
        ("--data-dir=~", "--data-dir=/of/me"),
        ("--init=~/runs/~x=~/y", "--init=/of/me/runs/~x=~/y"),
        ("~/x", "~/x"),  # a shell would have expanded it: it was quoted
        ("--say=a ~/x", "--say=a ~/x"),
        ("x=~/y", "x=~/y"),
    ],
)
def test_home_after_an_equals_sign(argument: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    cli = click.Group(commands=[click.Command("run", callback=None)])
    monkeypatch.setattr(cli, "main", lambda arguments, **_: seen.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["tool", "run", argument])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("HOME", "/of/me")
    with pytest.raises(SystemExit):
        run_command(cli, "tool", "interrupted")
    assert seen == ["run", expected]


def test_the_home_of_nobody(say) -> None:
    message = "~nobody-of-this-name: no home folder for ~ is known; write the whole path"
    assert say(lambda: None, "run", "--out=~nobody-of-this-name/x") == (2, f"Error: {message}\n")


def test_without_a_home_folder(say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user has no HOME and no entry in passwd. The Hub, Altair and torch look for one too."""

    def look_for_home() -> None:
        Path("~/.cache").expanduser()

    def none(path: Path) -> Path:
        if "HOME" in os.environ:
            return expanduser(path)
        raise RuntimeError("Could not determine home directory.")  # pathlib's words

    expanduser = Path.expanduser
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", none)
    monkeypatch.delenv("CHATDATA_CACHE", raising=False)
    message = "there is no home folder (no HOME, no entry in passwd): set CHATDATA_CACHE (and HF_HOME)"
    assert say(look_for_home, "run") == (1, f"Error: {message}\n")
    code, printed = say(look_for_home, "run", "--debug")
    assert code == 1 and "Traceback" in printed and printed.endswith(f"Error: {message}\n")
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path))
    assert say(look_for_home, "run") == (0, "")
    assert Path.home() == tmp_path
    monkeypatch.delenv("HOME")


def raise_at(path: Path, error: BaseException) -> None:
    raise error


class PanicException(BaseException):
    """As pyo3, the bridge to Rust, raises it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("entries"), "'entries' (KeyError)"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded (RecursionError)"),
        (MemoryError(), "not enough memory (MemoryError)"),
        (EOFError("Ran out of input"), "Ran out of input (EOFError)"),
        (PanicException("index out of bounds\n  at line 3"), "index out of bounds (PanicException)"),
        (OSError("Couldn't deserialize thrift\n"), "Couldn't deserialize thrift (OSError)"),
        (RuntimeError("[gloo] \x1b[31mConnection closed"), r"[gloo] \x1b[31mConnection closed (RuntimeError)"),
    ],
)
def test_any_other_error_names_the_file_at_work(say, tmp_path, error, said) -> None:
    """The innermost path of the code that failed. EOFError is no Ctrl-D."""
    path, other = tmp_path / "data.bin", tmp_path / "folder"

    def work() -> None:
        assert other
        raise_at(path, error)

    line = f"Error: {path}: {said}; --debug shows where\n"
    code, printed = say(work, "run")
    assert (code, printed.lstrip("\n")) == (1, line)
    code, printed = say(work, "run", "--debug")
    assert code == 1 and "Traceback (most recent call last)" in printed and "in raise_at" in printed
    assert "\x1b" not in printed and printed.endswith(line)


def test_an_error_without_a_file(say) -> None:
    def work() -> None:
        raise IndexError("list index out of range")

    assert say(work, "run") == (1, "Error: unexpected: list index out of range (IndexError); --debug shows where\n")


def test_an_error_of_ours_is_one_line_whatever_is_in_it(say) -> None:
    def work() -> None:
        raise ChatdataError('key "\x1b]0;x\x07\rok: complete\n": unknown')

    assert say(work, "run") == (1, 'Error: key "\\x1b]0;x\\x07\\rok: complete\\n": unknown\n')


def test_a_limit_on_the_size_of_files_names_the_file(say, tmp_path) -> None:
    """`write` does not know its file."""
    path = tmp_path / "tokens.npy"
    said = f"Error: {path}: file too large; raise the limit on the size of files (ulimit -f)\n"
    assert say(lambda: raise_at(path, OSError(errno.EFBIG, "File too large")), "run") == (1, said)


def test_an_ascii_terminal_gets_no_traceback(chatdata: Callable) -> None:
    command = ["build", "--stage", "mid", "--demo", "--dry-run"]
    assert "→" in chatdata(*command).stdout
    assert chatdata(*command, env={**os.environ, "PYTHONIOENCODING": "ascii"}).returncode == 0
