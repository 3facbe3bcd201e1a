"""Entries of a ledger, summed."""

from __future__ import annotations

from typing import Any

from chatdata.look.ledger import summed


def entry(number: int, name: str, **counts: Any) -> dict[str, Any]:
    same = {"task": "conversations", "subset": "", "split": "train", "source": "c.jsonl"}
    zero = dict.fromkeys(("rows", "documents", "tokens", "supervised", "truncated", "tokens_lost"), 0)
    return same | zero | {"entry": number, "name": name, "dropped": {"overflow": 0}} | counts


def test_epochs_are_one_entry() -> None:
    first = entry(0, "a", rows=3, documents=2, tokens=9, dropped={"overflow": 1, "invalid": 0})
    other = entry(1, "b", rows=5, documents=5)
    again = entry(2, "a", rows=3, documents=1, tokens=4, dropped={"overflow": 1, "invalid": 1})
    assert summed([first, other, again]) == [
        first | {"rows": 6, "documents": 3, "tokens": 13, "dropped": {"overflow": 2, "invalid": 1}, "copies": 2},
        other | {"dropped": {}, "copies": 1},
    ]
