from __future__ import annotations

import pytest

from chatdata.look.console import megabytes, share, table


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


def test_numbers() -> None:
    assert (share(1, 3), share(0, 0)) == ("33.3%", "–")
    assert megabytes(1_234_567_890) == "1,234.6 MB"
