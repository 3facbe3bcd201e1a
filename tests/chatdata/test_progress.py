"""Progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatdata.progress import MAX_LINE, say, say_json, shown_progress


def test_a_build_on_a_terminal_shows_bars(tmp_path: Path) -> None:
    """Standard error is a terminal here."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from chatdata.cli import main; main()", "build", "--stage", "sft", "--demo"]
    command += ["--limit", "20", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # Linux: the other side was closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"all sources +━+ ([\d,]+) of \1 rows", text)
    assert re.search(r"write train +━+ ([\d,]+) of \1 tokens", text)
    assert "Traceback" not in text


CONTROLS = "\x1b]0;x\x07\r\n\x7f\x85\x9b31m\u2028\u202e\ud800"


def test_nothing_in_a_line_drives_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"größer → [b]\t{CONTROLS}")
    say(f"an error{CONTROLS[:1]}", error=True)
    with shown_progress() as progress:
        progress(f"source{CONTROLS}", 1, 1, "rows")
    printed = capsys.readouterr()
    shown = r"\x1b]0;x\x07\r\n\x7f\x85\x9b31m\u2028\u202e\ud800"
    assert printed.out == f"größer → [b]\\t{shown}\n"
    assert printed.err == f"an error\\x1b\nsource{shown}: 1 of 1 rows\n"


def test_a_line_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * 1_000_000)
    assert capsys.readouterr().out == "x" * MAX_LINE + "… (1,000,000 characters)\n"


def test_json_is_ascii_and_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({f"ö{CONTROLS}": [float("nan"), float("-inf"), 1.5]})
    printed = capsys.readouterr().out
    assert printed.isascii() and printed.removesuffix("\n").isprintable()
    assert json.loads(printed) == {f"ö{CONTROLS}": [None, None, 1.5]}


def seconds(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Let these calls of the clock return `times`."""
    clock = iter(times)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every tenth, with the time left once a second has passed; for a part, only its last."""
    seconds(monkeypatch, 0.0, 0.0, 0.5, 2.0, 2.0, 4.0, 4.0)
    with shown_progress() as progress:
        for name, done in (("a", 0), ("all sources", 0), ("all sources", 5), ("all sources", 50), ("a", 90)):
            progress(name, done, 100, "rows", part=name == "a")
        progress("all sources", 100, 100, "rows")
        progress("a", 100, 100, "rows", part=True)
    assert capsys.readouterr().err.splitlines() == [
        "all sources: 50 of 100 rows, 25/s, 0:00:02 left",
        "all sources: 100 of 100 rows, 25/s",
        "a: 100 of 100 rows, 25/s",
    ]


def test_a_note_and_a_start_other_than_zero(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run starts at step 4,000; what was done before its first call does not count as its speed."""
    seconds(monkeypatch, 0.0, 200.0)
    with shown_progress() as progress:
        progress("mid", 4_000, 5_000, "steps")
        progress("mid", 4_500, 5_000, "steps", "loss 1.2345")
    assert capsys.readouterr().err.splitlines() == [
        "mid: 4,000 of 5,000 steps",
        "mid: 4,500 of 5,000 steps, 2.5/s, 0:03:20 left, loss 1.2345",
    ]


def test_work_that_is_done_again_starts_its_clock_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds(monkeypatch, 0.0, 2.0, 100.0, 104.0)
    with shown_progress() as progress:
        for done in (0, 80, 0, 80):
            progress("validation", done, 80, "sequences", part=True)
    assert capsys.readouterr().err.splitlines() == [
        "validation: 80 of 80 sequences, 40/s",
        "validation: 80 of 80 sequences, 20/s",
    ]


def test_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as progress:
        progress("gsm8k", 0, 0, "answers")
    assert capsys.readouterr().err == "gsm8k: 0 of 0 answers\n"


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(quiet=True) as progress:
        progress("all sources", 100, 100, "rows")
    assert capsys.readouterr().err == ""
