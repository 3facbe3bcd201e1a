"""Tables and numbers on standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def console() -> Console:
    """Standard output, wide enough that no number of a table is ever cut: a narrow terminal folds the line instead."""
    width = Console().width if sys.stdout.isatty() else 160
    return Console(width=max(width, 132), highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], total: Sequence[Any] = ()) -> None:
    """Print a table: first column left, the others right; integers with thousands separators."""
    grid = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", show_footer=bool(total)
    )
    for i, column in enumerate(columns):
        footer = _cell(total[i]) if total else ""
        grid.add_column(column, justify="left" if i == 0 else "right", no_wrap=True, footer=footer)
    for row in rows:
        grid.add_row(*(_cell(value) for value in row))
    console().print(grid)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
