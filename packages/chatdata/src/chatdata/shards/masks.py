"""Mask policies: which stored tokens count as supervised, chosen when reading; nothing is rendered again.

    bos US u UE AS t PS p PE OS o OE t AE US u UE AS t AE     user, assistant, python, output: Start, End
    1   1  1 1  1  1 1  1 1  1  1 1  1 1  1  1 1  1  1 1      ignore      every token
    0   0  0 0  0  1 1  1 1  0  0 0  1 1  0  0 0  0  1 1      apply       as stored
    0   0  0 0  0  0 0  0 0  0  0 0  0 0  0  0 0  0  1 1      last-turn   as stored in the last assistant message
    0   0  0 0  0  0 1  1 1  0  0 0  0 0  0  0 0  0  0 0      tools-only  python parts with their delimiters
    0   0  0 0  0  1 0  0 0  0  0 0  1 1  0  0 0  0  1 1      no-tools    as stored, without them
                                                              no-reasoning  as stored, without reasoning

assistant_end belongs to its message and to no part: last-turn keeps that of the last message, no-tools keeps all,
tools-only none. So tools-only and no-tools share no token and add up to apply. Policies apply to documents as stored:
in a document cut by the build, the last assistant message is the last one left, even if its end was cut off; cuts by
the trainer come later. Plain text (stage base) has no messages or parts: last-turn and tools-only leave nothing of it.

The last four are computed from the index's spans: 16 bytes of memory per document (last-turn), python or reasoning
part, read with pyarrow a piece of the index at a time. The delimiters' ids would do, too, for all but reasoning, but
every batch would have to scan its documents for them, and a sequence that starts inside a document the rest of it.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from chatdata.document import SPAN_ROLES
from chatdata.errors import PlanError, nearest

MaskPolicy = Literal["ignore", "apply", "last-turn", "tools-only", "no-tools", "no-reasoning"]
# bounds int64 [documents + 1], where the documents are in the split · document int64 [n], of each span, counted from
# the first of these documents · spans int64 [3, n]: role, start in the document, length
DocumentSpans = tuple[np.ndarray, np.ndarray, np.ndarray]
_USER, _PYTHON, _REASONING = (SPAN_ROLES.index(role) for role in ("user", "python", "reasoning"))


class Ranges(NamedTuple):
    """Runs of tokens, ascending, none empty, none overlapping: [starts, stops) of the split, each int64 [n]."""

    starts: np.ndarray
    stops: np.ndarray


def check_policy(name: str) -> MaskPolicy:
    """`name`, if it is a policy; else raises PlanError, which suggests the nearest one."""
    if name not in get_args(MaskPolicy):
        raise PlanError(f"unknown mask policy {name!r}{nearest(name, get_args(MaskPolicy))}")
    return cast(MaskPolicy, name)


def ranges_of(policy: MaskPolicy, spans: Iterable[DocumentSpans]) -> Ranges:
    """The ranges of a split that a policy selects by: for last-turn the last assistant messages, for no-reasoning the
    reasoning, else the python parts. spans: those of all documents, some documents at a time."""
    role = _REASONING if policy == "no-reasoning" else _PYTHON
    find = last_messages if policy == "last-turn" else partial(parts_of, role)
    parts = [find(*piece) for piece in spans]
    return Ranges(*(np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*parts, strict=True)))


def select(policy: MaskPolicy, stored: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The stored mask inside the policy's ranges, for no-tools and no-reasoning outside of them: uint8, a new array."""
    return stored & (~inside if policy in ("no-tools", "no-reasoning") else inside)


def last_messages(bounds: np.ndarray, document: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of the last assistant messages: from the end of the last user message that anything follows.

    bounds: int64 [documents + 1], where the documents are in the split. document: int64 [n], of each span, from 0.
    spans: int64 [3, n], role, start in the document, length. An empty message has no span, so assistant spans do not
    tell where the last message is.
    """
    role, start, length = spans
    ends = bounds[document] + start + length
    followed = (role == _USER) & (ends < bounds[document + 1])
    begins = np.full(len(bounds) - 1, -1)
    np.maximum.at(begins, document[followed], ends[followed])
    there = begins >= 0
    return begins[there], bounds[1:][there]


def parts_of(role: int, bounds: np.ndarray, document: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of the spans of a role, with their delimiters. Arguments as for `last_messages`."""
    roles, start, length = spans
    chosen = roles == role
    starts = (bounds[document] + start)[chosen]
    return starts, starts + length[chosen]


def covered(ranges: Ranges, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether tokens starts[i] … starts[i] + counts[i] of the split are in a range, for each i: bool [counts.sum()]."""
    first = np.searchsorted(ranges.stops, starts, side="right")
    last = np.searchsorted(ranges.starts, starts + counts)
    overlaps = np.where(counts > 0, np.maximum(last - first, 0), 0)
    of = np.repeat(np.arange(len(starts)), overlaps)
    which = first[of] + np.arange(len(of)) - (np.cumsum(overlaps) - overlaps)[of]
    ends = np.cumsum(counts, dtype=np.int64)
    begin = (ends - counts)[of]  # in the result, of the run that each overlap is in
    edges = np.zeros((ends[-1] if len(ends) else 0) + 1, np.int8)
    # ranges do not overlap, so no place is raised or lowered twice
    edges[begin + np.maximum(ranges.starts[which] - starts[of], 0)] += 1
    edges[begin + np.minimum(ranges.stops[which] - starts[of], counts[of])] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8).view(bool)
