"""Tool calls worked out again: every `python` part through the calculator, against the output recorded behind it.

A recorded output teaches the model what the tool will say. Where the calculator says something else, the model learns
one thing and meets another; docs/building.md has the kinds.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from chatdata.calculator import calculate, compare_outputs
from chatdata.document import SPAN_ROLES
from chatdata.errors import CalculatorError

_OUTPUT = SPAN_ROLES.index("output")
# What a call can come to. point_zero: `10.0` recorded, `10` computed; format: the same number written in another way;
# failure: not a call the calculator takes; no_output: nothing is recorded behind it.
OUTCOMES = ("equal", "point_zero", "format", "rounding", "different", "failure", "no_output")


class Mismatch(NamedTuple):
    """A call that is not `equal`. `computed` is the calculator's reason where it refuses the call."""

    kind: str
    call: str
    recorded: str
    computed: str


def replay_calls(texts: list[str], roles: np.ndarray, calls: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mismatches among the pieces at `calls` (roles: see columns.py): as JSON each, and at which pieces (int64)."""
    found, places = [], []
    for i in calls.tolist():
        # an output in another message or conversation stands behind a user's piece, never directly behind a call
        recorded = texts[i + 1] if i + 1 < len(roles) and roles[i + 1] == _OUTPUT else None
        if recorded is not None and _calculate(texts[i]) == (recorded, False):
            continue
        found.append(json.dumps(replay_call(texts[i], recorded), ensure_ascii=False))
        places.append(i)
    return found, np.array(places, dtype=np.int64)


def replay_call(call: str, recorded: str | None) -> Mismatch:
    """One call against its recorded output (None: there is none)."""
    if recorded is None:
        return Mismatch("no_output", call, "", "")
    computed, refused = _calculate(call)
    if refused:
        return Mismatch("failure", call, recorded, computed)
    kind = compare_outputs(recorded, computed)
    return Mismatch("point_zero" if recorded == f"{computed}.0" else kind, call, recorded, computed)


@lru_cache(maxsize=1 << 14)  # 23,716 calls of GSM8K train are 14,000 different ones
def _calculate(call: str) -> tuple[str, bool]:
    try:
        return calculate(call), False
    except CalculatorError as error:
        return str(error), True
