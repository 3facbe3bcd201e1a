"""The rules every rendered document keeps (docs/format.md), checked over a whole shard in numpy.

Ordinary text never holds the id of a special token, so delimiters are found by id. Which delimiter comes next depends
only on the one before it (`python_end` can only be reached from inside an assistant message), so a table of pairs
(format.py) says what is allowed; and the last delimiter before a token says what its mask must be:

    tokens     bos user_start  w  w  user_end assistant_start  w python_start  w python_end output_start  w output_end …
    mask        0      0       0  0     0            0         1      1        1      1           0       0     0
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chatdata.document import blocks_of
from chatdata.errors import BuildError
from chatdata.recipe import NATIVE
from chatdata.render.batch import digests_of
from chatdata.render.format import END, EVENTS, NAMES, NANOCHAT, OTHER, START, TEXT, Grammar, grammar_of
from chatdata.render.spans import WHOLE_DOCUMENT, Problem, check_spans, differing_spans, first_of_each, untrained, whole

BLOCK_TOKENS = 1 << 22  # checked at a time: about 100 MB of arrays, whatever the size of the shard


class Rules(NamedTuple):
    """What a build's manifest says its documents keep to. `stage` base means plain text: bos, then text. Of other chat
    formats than nanochat's the delimiters are not known: mask and spans are held to each other."""

    special_ids: Mapping[str, int]
    vocab_size: int
    stage: str
    max_tokens: int | None = None
    overflow: str = "keep"
    zero_supervised: str = "keep"
    chat_format: str = NATIVE


class Finding(NamedTuple):
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
    num_tool_calls, untrained_turns and original_tokens, each [documents]; num_spans [documents] with span_role,
    span_start, span_length and span_trained, each [sum of num_spans]; digest, uint8 [documents, 16].
    progress is called with the tokens done. Of several faults of one kind in one document, the first is reported.
    """
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    num_spans = index.get("num_spans", np.zeros(len(offsets) - 1, dtype=np.int64))
    first_spans = np.concatenate([[0], np.cumsum(num_spans, dtype=np.int64)])
    for first, last in blocks_of(np.diff(offsets), BLOCK_TOKENS):
        begin, end = int(offsets[first]), int(offsets[last])
        spans = slice(int(first_spans[first]), int(first_spans[last]))
        part = {key: values[spans if key.startswith("span_") else slice(first, last)] for key, values in index.items()}
        bounds = np.asarray(offsets[first : last + 1], dtype=np.int64) - begin
        block = _read_block(np.asarray(tokens[begin:end]), np.asarray(mask[begin:end]), bounds, part, rules)
        for file, kind, documents, positions in _check_block(block, rules):
            if len(documents):
                documents, positions = first_of_each(documents + first, positions)
                found.setdefault((file, kind), []).append((documents, positions))
        if progress:
            progress(end)
    places = {key: first_of_each(*map(np.concatenate, zip(*parts, strict=True))) for key, parts in found.items()}
    return [Finding(*key, *place) for key, place in places.items()]


def raise_defect(findings: list[Finding], numbers: np.ndarray, where: Callable[[int], str]) -> None:
    """Raise BuildError for the first of `findings`, if there is any: these documents have just been rendered.

    numbers: integers [documents], by which `where` knows the place of each document that was checked.
    """
    for finding in findings:
        place, position = where(int(numbers[finding.documents[0]])), int(finding.positions[0])
        at = f", position {position}" if position != WHOLE_DOCUMENT else ""
        raise BuildError(f"{place}: {finding.kind}{at}: a defect of chatdata, please report it")


@dataclass(frozen=True)
class _Block:
    """Whole documents, and their delimiters in order with an END after each document."""

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    index: Mapping[str, np.ndarray]
    truncated: np.ndarray  # bool [documents]
    # all int64 [delimiters + documents]
    event: np.ndarray
    previous: np.ndarray  # event before it in its document; START for the first
    at: np.ndarray  # position in its document; END: the document's length
    gap: np.ndarray  # ordinary tokens between `previous` and it
    document: np.ndarray


def _read_block(
    tokens: np.ndarray, mask: np.ndarray, offsets: np.ndarray, index: Mapping[str, np.ndarray], rules: Rules
) -> _Block:
    lowest, highest = min(rules.special_ids.values(), default=0), max(rules.special_ids.values(), default=0)
    event_of_id = np.zeros(highest - lowest + 1, dtype=np.int64)
    for token, token_id in rules.special_ids.items():
        event_of_id[token_id - lowest] = EVENTS.get(token, OTHER)
    places = np.flatnonzero((tokens >= lowest) & (tokens <= highest))
    events = event_of_id[tokens[places].astype(np.int64) - lowest]
    places, events = places[events > 0], events[events > 0]  # special ids need not be consecutive
    starts, stops = offsets[:-1], offsets[1:]
    ends_at = np.searchsorted(places, stops)
    event = np.insert(events, ends_at, END)
    document = np.repeat(np.arange(len(stops)), np.diff(ends_at, prepend=0) + 1)
    at = np.insert(places, ends_at, stops) - starts[document]
    previous, previous_at = np.roll(event, 1), np.roll(at, 1)
    first = previous == END
    previous[first], previous_at[first] = START, -1
    gap, truncated = at - previous_at - 1, index["truncated"].astype(bool)
    return _Block(tokens, mask, offsets, index, truncated, event, previous, at, gap, document)


def _check_block(block: _Block, rules: Rules) -> Iterator[Problem]:
    for file, kind, wrong in (
        ("tokens", f"id outside the vocabulary of {rules.vocab_size:,}", block.tokens >= rules.vocab_size),
        ("mask", "mask is neither 0 nor 1", block.mask > 1),
    ):
        places = np.flatnonzero(wrong)
        documents = np.searchsorted(block.offsets, places, side="right") - 1
        yield file, kind, documents, places - block.offsets[documents]
    index = block.index
    if rules.chat_format == NATIVE:
        yield from _check_by_delimiters(block, grammar_of(rules.stage))
    else:
        yield from check_spans(block.mask, block.offsets, index)
    if "num_tokens" in index:
        yield from _check_counts(block, rules)
    if "digest" in index:
        digests = digests_of(block.tokens, np.ascontiguousarray(block.mask), np.diff(block.offsets))
        differs = digests.view(np.uint8).reshape(-1, 16) != index["digest"]
        yield whole("index", "digest differs from tokens and mask", differs.any(axis=1))


def _check_by_delimiters(block: _Block, grammar: Grammar) -> Iterator[Problem]:
    broken = np.zeros(len(block.truncated), dtype=bool)
    for problem in _check_delimiters(block, grammar):
        broken[problem[2]] = True
        yield problem
    yield from _check_mask(block, grammar, broken)
    if "num_turns" in block.index:
        yield from _check_turns(block)
    if "num_spans" in block.index:
        role, opened = grammar.role_after[block.previous], grammar.opens[block.previous]
        length = block.gap + opened * (1 + (block.event != END))
        expected = np.stack([block.document, role, block.at - block.gap - opened, length])
        wrong = differing_spans(expected[:, (role >= 0) & (length > 0)], block.index, broken)
        yield whole("index", "spans differ from the delimiters", wrong & ~broken)


def _check_delimiters(block: _Block, grammar: Grammar) -> Iterator[Problem]:
    cut = (block.event == END) & block.truncated[block.document] & (block.previous != START)
    wrong = np.flatnonzero(~(grammar.allowed[block.previous, block.event] | cut))
    pairs = block.previous[wrong] * (END + 1) + block.event[wrong]
    for pair in np.unique(pairs).tolist():
        found = wrong[pairs == pair]
        previous, event = divmod(pair, END + 1)
        # END is no token: what is missing there is missing after the document's last one
        yield "tokens", _fault(previous, event, grammar), block.document[found], block.at[found] - (event == END)
    stray = (block.gap > 0) & (grammar.role_after[block.previous] < 0) & (block.previous != OTHER)
    for kind, chosen in (
        ("does not begin with bos", stray & (block.previous == START) & (block.event != END)),
        ("text outside a message", stray & (block.previous != START)),
    ):
        yield "tokens", kind, block.document[chosen], (block.at - block.gap)[chosen]


def _fault(previous: int, event: int, grammar: Grammar) -> str:
    """What is wrong when `event` comes after `previous`, in words."""
    chat, name, before = NANOCHAT, NAMES[event], NAMES[previous]
    parts, in_message = (chat.python, chat.output), grammar.role_after[previous] == TEXT
    ends_part = event in [EVENTS[part.closing] for part in parts]
    for holds, fault in (
        (previous == START, "does not begin with bos"),
        (event == EVENTS[chat.bos], "bos inside a document"),
        (OTHER in (previous, event), "a special token that no document holds"),
        (grammar.stage == "base", f"{name} in plain text"),
        (grammar.opens[previous], f"{before} without its end"),
        (in_message and not ends_part, "assistant_start without its end"),
        (ends_part or event in (EVENTS[chat.user.closing], EVENTS[chat.assistant_end]), f"{name} without its start"),
        (event in [EVENTS[part.opening] for part in parts], f"{name} outside an assistant message"),
        (event == END, "no message"),
    ):
        if holds:
            return fault
    return f"{name} after {before}: roles alternate, starting with user"


def _check_mask(block: _Block, grammar: Grammar, broken: np.ndarray) -> Iterator[Problem]:
    """Mask against the one that the delimiters require; documents with broken delimiters have no right one."""
    # two runs per event: the text before it, then itself (END is no token)
    lengths = np.stack([block.gap, block.event != END], axis=1).ravel()
    values = np.stack([grammar.text_mask[block.previous], grammar.delimiter_mask[block.event]], axis=1).ravel()
    expected = np.repeat(values, lengths)
    if "span_trained" in block.index:
        expected[untrained(block.offsets, block.index)] = 0
    if "untrained_turns" in block.index:  # the index says which documents have some; _check_turns counts them
        ends = _ends_of_turns(block)
        expected[ends] = block.mask[ends] & 1
    if np.array_equal(block.mask, expected):
        return
    wrong = np.flatnonzero((block.mask != expected) & (block.mask <= 1))
    documents = np.searchsorted(block.offsets, wrong, side="right") - 1
    wrong, documents = wrong[~broken[documents]], documents[~broken[documents]]
    runs = np.searchsorted(np.cumsum(lengths), wrong, side="right")
    is_text = runs % 2 == 0
    keys = np.where(is_text, block.previous[runs // 2], block.event[runs // 2]) * 2 + is_text
    for key in np.unique(keys).tolist():
        found = keys == key
        event, in_text = divmod(key, 2)
        should = bool(expected[wrong[found][0]])
        if in_text:
            label = "plain text" if grammar.stage == "base" else NANOCHAT.spans[grammar.role_after[event]].label
            kind = f"{'unsupervised' if should else 'supervised'} token inside {label}"
        else:
            kind = f"{NAMES[event]} {'not ' if should else ''}supervised"
        yield "mask", kind, documents[found], (wrong - block.offsets[documents])[found]


def _ends_of_turns(block: _Block) -> np.ndarray:
    """Places of the assistant_end of all documents that have untrained turns."""
    is_end = (block.event == EVENTS[NANOCHAT.assistant_end]) & (block.index["untrained_turns"][block.document] > 0)
    return block.offsets[block.document[is_end]] + block.at[is_end]


def _check_turns(block: _Block) -> Iterator[Problem]:
    def opened(*tokens: str) -> np.ndarray:
        return block.document[np.isin(block.event, [EVENTS[token] for token in tokens])]

    ends = _ends_of_turns(block)
    for column, what, documents in (
        ("num_turns", "delimiters", opened(NANOCHAT.user.opening, NANOCHAT.assistant_start)),
        ("num_tool_calls", "delimiters", opened(NANOCHAT.python.opening)),
        ("untrained_turns", "mask", np.searchsorted(block.offsets, ends[block.mask[ends] == 0], side="right") - 1),
    ):
        recorded, counted = block.index[column], np.bincount(documents, minlength=len(block.truncated))
        # all are counted before any cut: a truncated document may show fewer
        wrong = (recorded != counted) & ~(block.truncated & (recorded > counted))
        yield whole("index", f"{column} differs from the {what}", wrong)


def _check_counts(block: _Block, rules: Rules) -> Iterator[Problem]:
    index, truncated = block.index, block.truncated
    lengths = np.diff(block.offsets)
    supervised = np.add.reduceat(block.mask != 0, block.offsets[:-1], dtype=np.int64)
    yield whole("index", "num_tokens differs from the offsets", index["num_tokens"] != lengths)
    yield whole("index", "num_supervised differs from the mask", index["num_supervised"] != supervised)
    original = index["original_tokens"].astype(np.int64)
    wrong = np.where(truncated, original <= lengths, original != lengths)
    yield whole("index", "original_tokens does not agree with num_tokens and truncated", wrong)
    limit = rules.max_tokens
    if rules.overflow == "truncate" and limit is not None:
        kept_rule = np.where(original > limit, truncated & (lengths == limit), ~truncated)
    else:
        kept_rule = ~truncated & (rules.overflow == "keep" or limit is None or lengths <= limit)
    rule = f'overflow = "{rules.overflow}"' + (f", max_tokens = {limit:,}" if limit is not None else "")
    yield whole("index", f"length against the recipe's {rule}", ~kept_rule)
    if rules.zero_supervised != "keep":
        kind = f'no supervised token, against the recipe\'s zero_supervised = "{rules.zero_supervised}"'
        yield whole("mask", kind, supervised == 0)
