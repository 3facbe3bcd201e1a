"""The rules every rendered document keeps (render.py, docs/format.md), checked over a whole shard in numpy.

Ordinary text never holds the id of a special token, so delimiters are found by id. Which delimiter comes next in a
document depends on the one before it alone (a `python_end` is only ever reached from inside an assistant message), so
one table of pairs says what is allowed; and the last delimiter before a token says what its mask must be:

    tokens     bos user_start  w  w  user_end assistant_start  w python_start  w python_end output_start  w output_end …
    mask        0      0       0  0     0            0         1      1        1      1           0       0     0

Nothing here reads a file or knows a folder: arrays in, findings out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from chatdata.document import SPAN_ROLES, shard_bounds
from chatdata.errors import BuildError
from chatdata.render.batch import digests_of
from chatdata.tokenizer.bpe import SPECIAL_TOKENS

PIECE_TOKENS = 1 << 22  # checked at a time: about 100 MB of arrays, whatever the shard
WHOLE_DOCUMENT = -1  # a finding's position when it is about no single token

# Events: START is the state before a document's first token, END stands behind its last one; between them the nine.
START, END, OTHER = 0, 11, 10
BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = range(
    1, 10
)
_NAMES = ("start", *(name[2:-2] for name in SPECIAL_TOKENS), "another special token", "end")
_IN_ASSISTANT = {ASSISTANT_END, PYTHON_START, OUTPUT_START}
_FOLLOWERS = {
    START: {BOS},
    BOS: {USER_START},
    USER_START: {USER_END},
    USER_END: {ASSISTANT_START, END},
    ASSISTANT_START: _IN_ASSISTANT,
    ASSISTANT_END: {USER_START, END},
    PYTHON_START: {PYTHON_END},
    PYTHON_END: _IN_ASSISTANT,
    OUTPUT_START: {OUTPUT_END},
    OUTPUT_END: _IN_ASSISTANT,
}
_TEXT_AFTER = {  # where ordinary tokens may stand: role of their span, words for people
    USER_START: (SPAN_ROLES.index("user"), "a user message"),
    ASSISTANT_START: (SPAN_ROLES.index("text"), "assistant text"),
    PYTHON_START: (SPAN_ROLES.index("python"), "a python part"),
    PYTHON_END: (SPAN_ROLES.index("text"), "assistant text"),
    OUTPUT_START: (SPAN_ROLES.index("output"), "tool output"),
    OUTPUT_END: (SPAN_ROLES.index("text"), "assistant text"),
}
_OPENERS = (USER_START, PYTHON_START, OUTPUT_START)  # their spans include the delimiters
_SUPERVISED = (ASSISTANT_END, PYTHON_START, PYTHON_END)  # delimiters with mask 1
_SUPERVISED_TEXT = (ASSISTANT_START, PYTHON_START, PYTHON_END, OUTPUT_END)  # text behind these has mask 1
_TEXT = SPAN_ROLES.index("text")


@dataclass(frozen=True)
class Rules:
    """What a build's manifest says its documents keep to. `stage` base means plain text: bos, then text."""

    special_ids: Mapping[str, int]
    vocab_size: int
    stage: str
    max_tokens: int | None = None
    overflow: str = "keep"
    zero_supervised: str = "keep"


@dataclass(frozen=True)
class Finding:
    """One kind of problem: in which file (a shard's "tokens", "mask" or "index"), in which documents (int64 [n],
    counted within the shard, ascending), at which position in each (int64 [n], WHOLE_DOCUMENT for none)."""

    file: str
    kind: str
    documents: np.ndarray
    positions: np.ndarray


def check_documents(
    tokens: np.ndarray,
    mask: np.ndarray,
    offsets: np.ndarray,
    index: Mapping[str, np.ndarray],
    rules: Rules,
    progress: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Everything wrong with the documents of one shard, one Finding per kind; [] if they keep the contract.

    tokens: unsigned integers [num_tokens]. mask: uint8 [num_tokens]. offsets: int64 [documents + 1], rising from 0 to
    num_tokens. index: truncated [documents]; and, where they are to be checked, num_tokens, num_supervised, num_turns,
    num_tool_calls and original_tokens, each [documents]; num_spans [documents] with span_role, span_start and
    span_length, each [sum of num_spans]; digest, uint8 [documents, 16].
    progress is called with the tokens done. Of several faults of one kind in one document, the first is reported.
    """
    merged: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    num_spans = index.get("num_spans", np.zeros(len(offsets) - 1, dtype=np.int64))
    first_spans = np.concatenate([[0], np.cumsum(num_spans, dtype=np.int64)])
    for first, last in shard_bounds(np.diff(offsets), PIECE_TOKENS):
        begin, end = int(offsets[first]), int(offsets[last])
        spans = slice(int(first_spans[first]), int(first_spans[last]))
        part = {key: values[spans if key.startswith("span_") else slice(first, last)] for key, values in index.items()}
        bounds = np.asarray(offsets[first : last + 1], dtype=np.int64) - begin
        for finding in _check_piece(np.asarray(tokens[begin:end]), np.asarray(mask[begin:end]), bounds, part, rules):
            merged.setdefault((finding.file, finding.kind), []).append((finding.documents + first, finding.positions))
        if progress:
            progress(end)
    findings: list[Finding] = []
    for (file, kind), parts in merged.items():
        documents, positions = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort([positions, documents])  # one kind may come of several delimiters
        findings += _first(file, kind, documents[order], positions[order])
    return findings


def raise_defect(findings: list[Finding], numbers: np.ndarray, where: Callable[[int], str]) -> None:
    """For who has just rendered the documents: raise BuildError for the first of `findings`, if there is any.

    numbers: integers [documents], by which `where` knows the place of each document that was checked.
    """
    for finding in findings:
        place, position = where(int(numbers[finding.documents[0]])), int(finding.positions[0])
        at = "" if position == WHOLE_DOCUMENT else f", position {position}"
        raise BuildError(f"{place}: {finding.kind}{at}: a defect of chatdata, please report it")


def _check_piece(
    tokens: np.ndarray, mask: np.ndarray, offsets: np.ndarray, index: Mapping[str, np.ndarray], rules: Rules
) -> Iterator[Finding]:
    truncated = index["truncated"].astype(bool)
    yield from _at("tokens", f"id outside the vocabulary of {rules.vocab_size:,}", tokens >= rules.vocab_size, offsets)
    yield from _at("mask", "mask is neither 0 nor 1", mask > 1, offsets)
    walk = _walk(tokens, offsets, rules)
    broken = np.zeros(len(truncated), dtype=bool)
    for finding in _check_delimiters(walk, truncated, rules):
        broken[finding.documents] = True
        yield finding
    yield from _check_mask(walk, mask, offsets, broken, rules)
    if "num_tokens" in index:
        yield from _check_counts(walk, mask, offsets, index, truncated, rules)
    if "num_spans" in index:
        yield from _check_spans(walk, index, broken, rules)
    if "digest" in index:
        digests = digests_of(tokens, np.ascontiguousarray(mask), np.diff(offsets)).view(np.uint8).reshape(-1, 16)
        yield from _whole("index", "digest differs from tokens and mask", (digests != index["digest"]).any(axis=1))


@dataclass(frozen=True)
class _Walk:
    """The delimiters of a piece in order, an END behind each document. All arrays int64 [delimiters + documents]."""

    event: np.ndarray
    previous: np.ndarray  # event before it in its document; START for the first
    at: np.ndarray  # position in its document; END: the document's length
    gap: np.ndarray  # ordinary tokens between `previous` and it
    document: np.ndarray


def _walk(tokens: np.ndarray, offsets: np.ndarray, rules: Rules) -> _Walk:
    lowest, highest = min(rules.special_ids.values()), max(rules.special_ids.values())
    event_of_id = np.zeros(highest - lowest + 1, dtype=np.int64)
    for name, token_id in rules.special_ids.items():
        event_of_id[token_id - lowest] = SPECIAL_TOKENS.index(name) + 1 if name in SPECIAL_TOKENS else OTHER
    places = np.flatnonzero((tokens >= lowest) & (tokens <= highest))
    events = event_of_id[tokens[places].astype(np.int64) - lowest]
    places, events = places[events > 0], events[events > 0]  # special ids need not lie side by side
    starts, stops = offsets[:-1], offsets[1:]
    ends_at = np.searchsorted(places, stops)
    event = np.insert(events, ends_at, END)
    document = np.repeat(np.arange(len(stops)), np.diff(ends_at, prepend=0) + 1)
    at = np.insert(places, ends_at, stops) - starts[document]
    previous, previous_at = np.roll(event, 1), np.roll(at, 1)
    first = previous == END
    previous[first], previous_at[first] = START, -1
    return _Walk(event, previous, at, at - previous_at - 1, document)


def _check_delimiters(walk: _Walk, truncated: np.ndarray, rules: Rules) -> Iterator[Finding]:
    allowed = np.zeros((OTHER + 2, OTHER + 2), dtype=bool)
    followers = {START: {BOS}, BOS: {END}} if rules.stage == "base" else _FOLLOWERS
    for event, following in followers.items():
        allowed[event, list(following)] = True
    cut = (walk.event == END) & truncated[walk.document] & (walk.previous != START)
    wrong = np.flatnonzero(~(allowed[walk.previous, walk.event] | cut))
    pairs = walk.previous[wrong] * (END + 1) + walk.event[wrong]
    for pair in np.unique(pairs).tolist():
        found = wrong[pairs == pair]
        previous, event = divmod(pair, END + 1)
        # END is no token: what is missing there is missing behind the document's last one
        positions = walk.at[found] - (event == END)
        yield from _first("tokens", _fault(previous, event, rules), walk.document[found], positions)
    text_after = [BOS] if rules.stage == "base" else list(_TEXT_AFTER)
    stray = (walk.gap > 0) & ~np.isin(walk.previous, text_after) & (walk.previous != OTHER)
    for kind, chosen in (
        ("does not begin with bos", stray & (walk.previous == START) & (walk.event != END)),
        ("text outside a message", stray & (walk.previous != START)),
    ):
        yield from _first("tokens", kind, walk.document[chosen], (walk.at - walk.gap)[chosen])


def _fault(previous: int, event: int, rules: Rules) -> str:
    """What is wrong when `event` comes after `previous`, in words."""
    name, before = _NAMES[event], _NAMES[previous]
    if previous == START:
        return "does not begin with bos"
    if event == BOS:
        return "bos inside a document"
    if event == OTHER or previous == OTHER:
        return "a special token that no document holds"
    if rules.stage == "base":
        return f"{name} in plain text"
    if previous in _OPENERS:
        return f"{before} without its end"
    in_assistant = previous in (ASSISTANT_START, PYTHON_END, OUTPUT_END)
    if in_assistant and event in (USER_START, USER_END, ASSISTANT_START, END):
        return "assistant_start without its end"
    if event in (USER_END, ASSISTANT_END, PYTHON_END, OUTPUT_END):
        return f"{name} without its start"
    if event in (PYTHON_START, OUTPUT_START):
        return f"{name} outside an assistant message"
    if event == END:
        return "no message"
    return f"{name} after {before}: roles alternate, starting with user"


def _check_mask(
    walk: _Walk, mask: np.ndarray, offsets: np.ndarray, broken: np.ndarray, rules: Rules
) -> Iterator[Finding]:
    """Mask against the one the delimiters ask for; documents with broken delimiters are left out: none is right."""
    delimiter, text = np.zeros(END + 1, dtype=np.uint8), np.zeros(END + 1, dtype=np.uint8)
    delimiter[list(_SUPERVISED)] = 1
    text[BOS if rules.stage == "base" else list(_SUPERVISED_TEXT)] = 1
    # two runs per event: the text before it, then itself (END is no token)
    lengths = np.stack([walk.gap, walk.event != END], axis=1).ravel()
    expected = np.repeat(np.stack([text[walk.previous], delimiter[walk.event]], axis=1).ravel(), lengths)
    if np.array_equal(mask, expected):
        return
    wrong = np.flatnonzero((mask != expected) & (mask <= 1))
    documents = np.searchsorted(offsets, wrong, side="right") - 1
    wrong, documents = wrong[~broken[documents]], documents[~broken[documents]]
    runs = np.searchsorted(np.cumsum(lengths), wrong, side="right")
    is_text = runs % 2 == 0
    keys = np.where(is_text, walk.previous[runs // 2], walk.event[runs // 2]) * 2 + is_text
    for key in np.unique(keys).tolist():
        found = keys == key
        event, in_text = divmod(key, 2)
        should = bool(expected[wrong[found][0]])
        if in_text:
            where = "plain text" if rules.stage == "base" else _TEXT_AFTER[event][1]
            kind = f"{'unsupervised' if should else 'supervised'} token inside {where}"
        else:
            kind = f"{_NAMES[event]} {'not ' if should else ''}supervised"
        yield from _first("mask", kind, documents[found], (wrong - offsets[documents])[found])


def _check_counts(
    walk: _Walk,
    mask: np.ndarray,
    offsets: np.ndarray,
    index: Mapping[str, np.ndarray],
    truncated: np.ndarray,
    rules: Rules,
) -> Iterator[Finding]:
    num_documents, lengths = len(truncated), np.diff(offsets)
    supervised = np.add.reduceat(mask != 0, offsets[:-1], dtype=np.int64)
    yield from _whole("index", "num_tokens differs from the offsets", index["num_tokens"] != lengths)
    yield from _whole("index", "num_supervised differs from the mask", index["num_supervised"] != supervised)
    for column, starts in (("num_turns", (USER_START, ASSISTANT_START)), ("num_tool_calls", (PYTHON_START,))):
        counted = np.bincount(walk.document[np.isin(walk.event, starts)], minlength=num_documents)
        # both are counted before any cut: a truncated document may show fewer
        wrong = (index[column] != counted) & ~(truncated & (index[column] > counted))
        yield from _whole("index", f"{column} differs from the delimiters", wrong)
    original = index["original_tokens"].astype(np.int64)
    wrong = np.where(truncated, original <= lengths, original != lengths)
    yield from _whole("index", "original_tokens does not agree with num_tokens and truncated", wrong)
    limit = rules.max_tokens
    if rules.overflow == "truncate" and limit is not None:
        kept_rule = np.where(original > limit, truncated & (lengths == limit), ~truncated)
    else:
        kept_rule = ~truncated & (rules.overflow == "keep" or limit is None or lengths <= limit)
    rule = f'overflow = "{rules.overflow}"' + (f", max_tokens = {limit:,}" if limit is not None else "")
    yield from _whole("index", f"length against the recipe's {rule}", ~kept_rule)
    if rules.zero_supervised != "keep":
        kind = f'no supervised token, against the recipe\'s zero_supervised = "{rules.zero_supervised}"'
        yield from _whole("mask", kind, supervised == 0)


def _check_spans(walk: _Walk, index: Mapping[str, np.ndarray], broken: np.ndarray, rules: Rules) -> Iterator[Finding]:
    """Spans against the delimiters. Text parts in a row leave no trace in the tokens, so their spans count as one."""
    role_after = np.full(END + 1, -1)
    for event, (span_role, _) in ((BOS, (_TEXT, "")),) if rules.stage == "base" else _TEXT_AFTER.items():
        role_after[event] = span_role
    opened = np.isin(walk.previous, _OPENERS)
    length = np.where(opened, walk.gap + 1 + (walk.event != END), walk.gap)
    start = walk.at - walk.gap - opened
    there = (role_after[walk.previous] >= 0) & (length > 0)
    expected = [values[there] for values in (walk.document, role_after[walk.previous], start, length)]

    num_documents = len(index["num_spans"])
    document = np.repeat(np.arange(num_documents), index["num_spans"])
    role, start, length = (index[f"span_{key}"].astype(np.int64) for key in ("role", "start", "length"))
    wrong = broken.copy()  # reported already
    wrong[document[length == 0]] = True
    joined = (document[1:] == document[:-1]) & (role[1:] == _TEXT) & (role[:-1] == _TEXT)
    joined &= start[1:] == start[:-1] + length[:-1]
    begins = np.flatnonzero(np.concatenate([[True], ~joined])) if len(document) else np.zeros(0, dtype=np.int64)
    length = np.add.reduceat(length, begins) if len(begins) else length
    found = [document[begins], role[begins], start[begins], length]
    wrong |= np.bincount(found[0], minlength=num_documents) != np.bincount(expected[0], minlength=num_documents)
    found, expected = ([values[~wrong[side[0]]] for values in side] for side in (found, expected))
    differs = np.any([a != b for a, b in zip(found, expected, strict=True)], axis=0)
    wrong[found[0][differs]] = True
    yield from _whole("index", "spans differ from the delimiters", wrong & ~broken)


def _at(file: str, kind: str, wrong: np.ndarray, offsets: np.ndarray) -> Iterator[Finding]:
    """A finding about single tokens: wrong is bool [num_tokens]."""
    places = np.flatnonzero(wrong)
    documents = np.searchsorted(offsets, places, side="right") - 1
    yield from _first(file, kind, documents, places - offsets[documents])


def _whole(file: str, kind: str, wrong: np.ndarray) -> Iterator[Finding]:
    """A finding about whole documents: wrong is bool [documents]."""
    documents = np.flatnonzero(wrong)
    yield from _first(file, kind, documents, np.full(len(documents), WHOLE_DOCUMENT))


def _first(file: str, kind: str, documents: np.ndarray, positions: np.ndarray) -> Iterator[Finding]:
    """At most one finding, the first position of each document; documents ascend."""
    if len(documents):
        documents, first = np.unique(documents, return_index=True)
        yield Finding(file, kind, documents, positions[first])
