"""Tables and numbers on standard output."""

import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from chatdata.errors import printable


class _Console(Console):
    """Escapes the control characters of every text; colours are not text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console() -> Console:
    """Standard output, wide enough that no number of a table is cut: a narrow terminal folds the line instead."""
    width = Console().width if sys.stdout.isatty() else 160
    return _Console(width=max(width, 132), highlight=False, soft_wrap=True)


def grid(*columns: str, right: Container[str] = (), folded: str = "", **options: Any) -> Table:
    """An empty table without lines. right: columns that are aligned right. folded: one of long texts.

    options: of rich's Table.
    """
    made = Table(box=None, pad_edge=False, header_style="bold", **options)
    for column in columns:
        made.add_column(column, no_wrap=column != folded, justify="right" if column in right else "left")
    return made


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], total: Sequence[Any] = ()) -> None:
    """Print a table: first column left, the others right; integers with thousands separators."""
    lines = grid(*columns, right=columns[1:], title=title, title_justify="left", show_footer=bool(total))
    for column, cell in zip(lines.columns, total, strict=False):
        column.footer = _cell(cell)
    for row in rows:
        lines.add_row(*map(_cell, row))
    console().print(lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(printable(str(value), keep=""))


def shard_dtype(name: str) -> str:
    return name if name == "uint16" else f"{name} (over 65,536 tokens)"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "–"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
