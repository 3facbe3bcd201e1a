"""Where two JSON values differ, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

ABSENT = "absent"
MAX_ALIGNED = 500  # items; aligning equal ones takes quadratic time, and `epochs = 30_000` makes so many


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value in a, value in b) for everything that differs: `("train[3].rows", 2000, 3000)`.

    Items of lists are counted as in `a` (new ones as in `b`); an item that only one list has stands against ABSENT
    and moves no other: `("train[2]", ABSENT, {…})`.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{where}.{key}" if where else str(key)
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), inner)
    elif isinstance(a, list) and isinstance(b, list):
        for i, j in _aligned(a, b):
            if i is not None and j is not None:
                yield from differences(a[i], b[j], f"{where}[{i}]")
            elif i is not None:
                yield f"{where}[{i}]", a[i], ABSENT
            elif j is not None:
                yield f"{where}[{j}]", ABSENT, b[j]
    elif a != b or type(a) is not type(b):
        yield where, a, b


def _aligned(a: list[Any], b: list[Any]) -> Iterator[tuple[int | None, int | None]]:
    """Pairs of places: equal items with each other, between them changed ones in order, None for what is left over."""
    if max(len(a), len(b)) > MAX_ALIGNED:
        yield from zip_longest(range(len(a)), range(len(b)))
        return
    blocks = SequenceMatcher(None, [repr(x) for x in a], [repr(x) for x in b], autojunk=False).get_opcodes()
    for _, first_a, last_a, first_b, last_b in blocks:
        for k in range(max(last_a - first_a, last_b - first_b)):
            i, j = first_a + k, first_b + k
            yield i if i < last_a else None, j if j < last_b else None
