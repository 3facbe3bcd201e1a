"""Text and tables for people, on a terminal and in Markdown. All rounding is in report.py."""

import re
from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chatdata.errors import printable


def terminal_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table within 80 columns: the first column is folded if it must be, the others are never cut."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def terminal_lines(lines: Iterable[str]) -> Text:
    return Text("\n".join(map(printable, lines)))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], ruler: str = "---:") -> str:
    """A Markdown table with every cell escaped: first column left, the others aligned by `ruler`."""
    cells = [[escape_markdown(cell) for cell in row] for row in rows]
    rulers = ["---", *[ruler] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rulers, *cells))


def markdown_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape_markdown(line)}" for line in lines)


def escape_markdown(text: str) -> str:
    """Make any text one line of inert Markdown: it ends no table cell and starts no markup, HTML, link or mention.

    Every character with a meaning in CommonMark 0.31 or GitHub's additions gets a backslash, except an underscore
    inside a word, which has none (arc_easy is unchanged). A newline becomes ⏎, other unprintable characters ␣.
    """
    one_line = re.sub(r"\r\n|\r|\n", "⏎", text)
    visible = "".join(c if c.isprintable() else "␣" for c in one_line)
    escaped = re.sub(r"([\\`*\[\]<>|~&$#@!{}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", visible)
    return escaped.replace("://", r"\://").replace("www.", r"www\.")
