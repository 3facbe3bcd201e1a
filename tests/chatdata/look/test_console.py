from __future__ import annotations

import pytest

from chatdata.look.console import console, megabytes, share, table


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers are grouped and on the right; square brackets of the data are no markup."""
    table("title", ("task", "rows"), [("a[bold]", 1_234_567), ("b", "–")], ("all", 7))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "title",
        "task          rows",
        "a[bold]  1,234,567",
        "b                –",
        "all              7",
    ]


def test_nothing_in_a_table_drives_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;x\x07\r\n\x9b\u202e"
    table(f"title {evil[:3]}", ("task", "rows"), [(evil, evil)])
    console().print(f"[bold]{evil[:1]}[/bold]")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    cell = r"\x1b]0;x\x07\r\n\x9b\u202e"
    assert lines == [["title", r"\x1b]0"], ["task", "rows"], [cell, cell], [r"\x1b"]]


def test_numbers() -> None:
    assert (share(1, 3), share(0, 0)) == ("33.3%", "–")
    assert megabytes(1_234_567_890) == "1,234.6 MB"
