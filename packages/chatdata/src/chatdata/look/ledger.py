"""What a ledger counts besides documents and tokens, and bad rows, as lines of text."""

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatdata.errors import printable

COUNTS = ("rows", "documents", "tokens", "supervised", "truncated", "tokens_lost")
WORDS: dict[str, str] = tomllib.loads(Path(__file__).with_name("ledger.toml").read_text(encoding="utf-8"))


def ledger_lines(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sums over entries of a ledger that are not 0, in words."""
    counts = Counter[str]()
    for entry in entries:
        counts.update(entry.get("dropped", {}) | {name: entry.get(name, 0) for name in WORDS if name in entry})
    found = ((counts[name], words) for name, words in WORDS.items() if counts[name])
    return [f"{number:,} {words.format(s='s'[: number != 1])}" for number, words in found]


def summed(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries that differ only in their number (epochs) as one each, with their counts summed and how many `copies`."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in ("name", "task", "subset", "split", "source")), []).append(entry)
    return [added(group) | {"copies": len(group)} for group in groups.values()]


def added(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first of some entries, with the counts of all."""
    dropped = sum((Counter(entry["dropped"]) for entry in entries), Counter[str]())
    return {**entries[0], **{key: sum(entry[key] for entry in entries) for key in COUNTS}, "dropped": dropped}


def place_of(row: Mapping[str, Any]) -> str:
    """The place of a bad row: `chats.jsonl:3`, `chats.parquet row 3`."""
    place = f":{row['line']}" if "line" in row else f" row {row['row']}" if "row" in row else ""
    return printable(f"{row['file']}{place}", keep="")


def bad_row_line(row: Mapping[str, Any]) -> str:
    return f"  {place_of(row)}: {printable(row['reason'], keep='')}"
