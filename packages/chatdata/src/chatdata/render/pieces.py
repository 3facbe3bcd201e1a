"""Conversations as pieces: one text each with its role, ready to be encoded in one call.

A conversation is a run of pieces. A piece is one text with its role (user, text, python or output, as in a span) and
whether an assistant message opens before it or closes after it. A row that cannot be used is an empty message with a
note that says why: build() drops it.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from chatdata.arrow import values_of
from chatdata.conversation import AS_WRITTEN, Message, Reading, parse_conversation
from chatdata.document import blocks_of
from chatdata.errors import ChatdataError
from chatdata.messages import check_surrogates
from chatdata.records import METADATA_KEYS, REFUSED_KEYS
from chatdata.render.format import PART_ROLES, TEXT, USER, written
from chatdata.render.specification import merged_turns
from chatdata.sources.source import Rows, Source
from chatdata.tasks.task import call_task

# Added to a piece's role: assistant_start comes before it, assistant_end after it; it is not trained, nor that end
OPENS, CLOSES, UNTRAINED, END_UNTRAINED = 8, 16, 32, 64
ROLE = 7  # the bits of the role
# What reading a row may change or find, counted per document
TALLIES = ("other_tools", "merged", "results_after_text", "reasoning_dropped", "reasoning_left_out", "text_left_out")
INVALID = "invalid"  # the first word of a note, the reason comes after it
MAX_REASON = 500  # characters of it: a key can have a million
_PLAIN_PARTS = ("text", "python", "python_output")
_MESSAGE_ROLES = {"user": 0, "assistant": 1, "system": 2}


@dataclass(frozen=True)
class Pieces:
    """Conversations as pieces: `texts` and `codes` (uint8: role, plus OPENS …) per piece, in order; `counts` (int64)
    has the number of pieces of each conversation, at least 1.

    notes: (conversation, JSON list) of rows that cannot be used. tallies: (conversation, place in TALLIES, number).
    Both are in the order of conversations, and few have any.
    """

    texts: list[str]
    codes: np.ndarray
    counts: np.ndarray
    notes: list[tuple[int, str]] = field(default_factory=list)
    tallies: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.counts)

    def split(self, max_chars: int) -> Iterator["Pieces"]:
        """The same in parts of at most `max_chars` characters, at least one conversation each."""
        num_chars = np.fromiter(map(len, self.texts), dtype=np.int64, count=len(self.texts))
        first_piece = np.cumsum(self.counts) - self.counts
        for first, last in blocks_of(np.add.reduceat(num_chars, first_piece), max_chars):
            yield self.part(first, last)

    def part(self, first: int, last: int) -> "Pieces":
        """Conversations [first, last)."""
        start, stop = int(self.counts[:first].sum()), int(self.counts[:last].sum())
        notes = [(i - first, note) for i, note in self.notes if first <= i < last]
        tallies = [(i - first, kind, n) for i, kind, n in self.tallies if first <= i < last]
        return Pieces(self.texts[start:stop], self.codes[start:stop], self.counts[first:last], notes, tallies)


def pieces_of_conversations(conversations: Iterable[Any], reading: Reading = AS_WRITTEN) -> Pieces:
    """Pieces of conversations in any accepted form. Raises ConversationError for the first that is not."""
    texts: list[str] = []
    codes = bytearray()
    counts: list[int] = []
    tallies = []
    for conversation in conversations:
        before = len(texts)
        if not _take_plain(conversation, texts, codes):
            del texts[before:], codes[before:]
            parsed = parse_conversation(conversation, reading)
            _take_messages(parsed["messages"], texts, codes)
            tallies += [(len(counts), TALLIES.index(name), n) for name, n in parsed.get("counts", {}).items()]
        counts.append(len(texts) - before)
    codes_array, counts_array = np.frombuffer(bytes(codes), dtype=np.uint8), np.array(counts, dtype=np.int64)
    return Pieces(texts, codes_array, counts_array, tallies=tallies)


def _take_messages(messages: list[Message], texts: list[str], codes: bytearray) -> None:
    for content, trained in merged_turns(messages):
        first = len(codes)
        if isinstance(content, str):
            texts.append(content)
            codes.append(USER if trained is None else TEXT if trained else TEXT | UNTRAINED)
        else:
            texts.extend([written(part) for part in content] or [""])
            roles = [PART_ROLES[part["type"]] | (0 if part.get("trained", True) else UNTRAINED) for part in content]
            codes.extend(roles or [TEXT])
        if trained is not None:
            codes[first] |= OPENS
            codes[-1] |= CLOSES if trained else CLOSES | END_UNTRAINED


def _take_plain(conversation: Any, texts: list[str], codes: bytearray) -> bool:
    """Take what tasks mostly make, the common form without a system message or other keys, in 0.4 of the time of
    `parse_conversation`, which was a third of all time but encoding.

    False (some pieces may be taken) for everything else, invalid conversations included: `parse_conversation` decides.
    """
    if type(conversation) is dict and len(conversation) == 1:
        conversation = conversation.get("messages")
    if type(conversation) is not list or not conversation:
        return False
    first_text = len(texts)
    for turn, message in enumerate(conversation):
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if role != ("assistant" if turn % 2 else "user"):
            return False
        if type(content) is str:
            if turn % 2 and "<think>" in content:
                return False
            texts.append(content)
            codes.append(TEXT | OPENS | CLOSES if turn % 2 else USER)
            continue
        if not turn % 2 or type(content) is not list or not content:
            return False
        first = len(codes)
        for part in content:
            if type(part) is not dict or len(part) != 2:
                return False
            kind, text = part.get("type"), part.get("text")
            if type(kind) is not str or kind not in _PLAIN_PARTS or type(text) is not str or "<think>" in text:
                return False
            texts.append(text)
            codes.append(PART_ROLES[kind])
        codes[first] |= OPENS
        codes[-1] |= CLOSES
    joined = "".join(texts[first_text:])
    try:
        return joined.isascii() or bool(joined.encode())
    except UnicodeEncodeError:  # a lone surrogate
        return False


def pieces_of_rows(source: Source, rows: np.ndarray, raw: Rows) -> Pieces:
    """Raw rows as pieces: a table of well-formed conversations column by column, anything else row by row."""
    if source.task.rows_are_conversations and not isinstance(raw, list) and not source.reading.columns:
        with suppress(UnicodeDecodeError):
            if (pieces := pieces_of_table(raw)) is not None:
                return pieces
    records = source.rows_of(rows, raw)
    try:
        return _pieces_of_records(source, records)
    except ChatdataError:
        parts = []
        for row, record in zip(rows.tolist(), records, strict=True):
            try:
                parts.append(_pieces_of_records(source, [record]))
            except ChatdataError as error:
                if source.reading.invalid == "error":
                    raise error.at(source.where(row)) from None
                parts.append(invalid_row(source, error))
        return joined(parts)


def invalid_row(source: Source, error: ChatdataError) -> Pieces:
    """An empty message, and a note that says why there is no other."""
    note = json.dumps([INVALID, str(error)[:MAX_REASON]])
    return replace(pieces_of_texts([""], TEXT if source.task.kind == "text" else USER), notes=[(0, note)])


def _pieces_of_records(source: Source, records: list[Any]) -> Pieces:
    task = source.task
    converted = [call_task(task, task.to_conversation, record) for record in records]
    if task.kind == "text":
        return pieces_of_texts([check_surrogates(text, 'key "text"') for text in converted])
    return pieces_of_conversations(converted, source.reading)


def joined(parts: list[Pieces]) -> Pieces:
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    texts = [text for part in parts for text in part.texts]
    codes, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "counts"))
    notes = [(first + i, note) for first, part in zip(firsts, parts, strict=False) for i, note in part.notes]
    tallies = [(first + i, kind, n) for first, part in zip(firsts, parts, strict=False) for i, kind, n in part.tallies]
    return Pieces(texts, codes, counts, notes, tallies)


def pieces_of_texts(texts: list[str], role: int = TEXT) -> Pieces:
    """Pieces of plain texts (stage base), a conversation each."""
    return Pieces(texts, np.full(len(texts), role, dtype=np.uint8), np.ones(len(texts), dtype=np.int64))


def pieces_of_table(table: pa.RecordBatch) -> Pieces | None:
    """Pieces of rows that hold well-formed conversations in a column `messages` of (role, content) strings.

    No Python object is made per message. None if the table has another form or any row is not well-formed:
    `parse_conversation` then tells them apart.
    """
    import pyarrow.compute as pc

    if "messages" not in table.schema.names:
        return None
    for named, column in zip(table.schema, table.columns, strict=True):
        kind, is_empty = named.type, column.null_count == len(column)
        is_number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        known = named.name == "messages" or named.name in METADATA_KEYS or is_number
        if not is_empty and (named.name in REFUSED_KEYS or not known):
            return None
    column = table.column("messages")
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    fields = list(kind.value_type) if is_list and pa.types.is_struct(kind.value_type) else []
    has_texts = all(pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in fields)
    if sorted(field.name for field in fields) != ["content", "role"] or not has_texts:
        return None
    messages = column.flatten()
    role, content = messages.field("role"), messages.field("content")
    if any(array.null_count for array in (column, messages, role, content)):
        return None
    if pc.any(pc.match_substring(content, "<think>")).as_py():
        return None
    lengths = values_of(column.value_lengths()).astype(np.int64)
    roles = role.dictionary_encode()  # three strings, and a number per message
    code_of = np.array([_MESSAGE_ROLES.get(name, 9) for name in roles.dictionary.to_pylist()], dtype=np.uint8)
    codes = code_of[values_of(roles.indices)]
    first = np.cumsum(lengths) - lengths
    if not len(lengths) or lengths.min() == 0:
        return None
    system = codes[first] == 2
    # after an optional system message roles alternate, starting with user
    place = np.arange(len(codes)) - np.repeat(first + system, lengths)
    expected = (place % 2).astype(np.uint8)
    expected[first[system]] = 2
    if (lengths <= system).any() or not np.array_equal(codes, expected):
        return None
    texts = content.to_pylist()
    if system.any():
        for message in reversed(first[system].tolist()):
            texts[message : message + 2] = [f"{texts[message]}\n\n{texts[message + 1]}"]
        codes, lengths = codes[codes != 2], lengths - system
    return Pieces(texts, np.array([USER, TEXT | OPENS | CLOSES], dtype=np.uint8)[codes], lengths)
