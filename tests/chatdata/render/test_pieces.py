"""Conversations and tables as pieces: the same ones whichever way they are read."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.conversation import Reading, parse_conversation
from chatdata.errors import ConversationError, SourceError
from chatdata.render.pieces import (
    MAX_REASON,
    Pieces,
    _take_messages,
    blocks_of,
    pieces_of_conversations,
    pieces_of_rows,
    pieces_of_table,
)
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks

texts = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "\x00", "a\r\n", "<|bos|>", "<|user_end|>12", "🤖é"]))
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": texts}), max_size=5
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for turn in range(draw(st.integers(1, 5))):
        role, content = ("user", texts) if turn % 2 == 0 else ("assistant", st.one_of(texts, parts))
        messages.append({"role": role, "content": draw(content)})
    return messages


NOISE = st.sampled_from([None, "", [], {}, 1, b"a", "\ud800", ["a"], {"type": "text"}, {"type": [], "text": "a"}])


@st.composite
def odd_conversations(draw: st.DrawFn) -> Any:
    """A conversation in another accepted form, or with one thing changed that may or may not be accepted."""
    messages: Any = draw(conversations())
    place = draw(st.integers(0, len(messages) - 1))
    change = draw(st.sampled_from(["none", "wrap", "extra", "drop", "key", "value", "part", "sharegpt", "null"]))
    if change == "drop":
        del messages[place]
    elif change == "key":
        messages[place][draw(st.sampled_from(["weight", "tool_calls"]))] = draw(NOISE)
    elif change == "value":
        messages[place][draw(st.sampled_from(["role", "content"]))] = draw(NOISE)
    elif change == "part" and isinstance(messages[place]["content"], list):
        messages[place]["content"].append(draw(NOISE))
    elif change == "sharegpt":
        return {"conversations": [{"from": m["role"], "value": m["content"]} for m in messages]}
    elif change == "null":
        return draw(NOISE)
    return {"messages": messages} | ({"source": "x"} if change == "extra" else {}) if change != "none" else messages


@given(odd_conversations())
@settings(max_examples=500, deadline=None)
def test_what_is_taken_at_a_glance_is_what_the_parser_takes(conversation: Any) -> None:
    try:
        messages = parse_conversation(conversation)["messages"]
    except ConversationError as error:
        with pytest.raises(ConversationError, match=f"^{re.escape(str(error))}$"):
            pieces_of_conversations([conversation])
        return
    texts: list[str] = []
    codes = bytearray()
    _take_messages(messages, texts, codes)
    found = pieces_of_conversations([conversation])
    assert (found.texts, found.codes.tolist(), found.counts.tolist()) == (texts, list(codes), [len(texts)])


def table(rows: list[Any], large: bool = False, **others: list[Any]) -> pa.RecordBatch:
    string, list_of = (pa.large_string(), pa.large_list) if large else (pa.string(), pa.list_)
    messages = pa.array(rows, list_of(pa.struct([("role", string), ("content", string)])))
    columns = {"messages": messages, **{name: pa.array(values) for name, values in others.items()}}
    return pa.RecordBatch.from_pydict(columns)


def plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [m | {"content": m["content"] if isinstance(m["content"], str) else "parts"} for m in messages]


@given(st.lists(conversations().map(plain), min_size=1, max_size=6), st.booleans(), st.integers(0, 5))
@settings(deadline=None)
def test_tables_give_the_pieces_of_their_rows(batch: list[Any], large: bool, first: int) -> None:
    first = min(first, len(batch) - 1)
    found = pieces_of_table(table(batch, large, source=["x"] * len(batch)).slice(first))
    expected = pieces_of_conversations(batch[first:])
    assert found is not None
    assert found.texts == expected.texts
    assert found.codes.tolist() == expected.codes.tolist()
    assert found.counts.tolist() == expected.counts.tolist()


ROW = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "odd",
    [
        table([ROW, []]),
        table([ROW, None]),
        table([ROW, [None]]),
        table([[{"role": "user", "content": None}]]),
        table([[{"role": None, "content": "a"}]]),
        table([[{"role": "tool", "content": "a"}]]),
        table([ROW[::-1]]),
        table([ROW + ROW[1:]]),
        table([[{"role": "system", "content": "a"}]]),
        table([[{"role": "system", "content": "a"}, {"role": "assistant", "content": "a"}]]),
        table([[ROW[0], {"role": "system", "content": "a"}]]),
        table([ROW], tools=[""]),
        table([ROW], conversations=[ROW]),
        table([ROW], notes=["x"]),
        table([ROW], label=[True]),
        pa.RecordBatch.from_pydict({"messages": ["a"]}),
        pa.RecordBatch.from_pydict({"messages": [[{"role": "user", "content": "a", "weight": 1}]]}),
        pa.RecordBatch.from_pydict({"messages": [[{"role": "user", "content": ["a"]}]]}),
        pa.RecordBatch.from_pydict({"conversations": [[{"from": "human", "value": "a"}]]}),
    ],
)
def test_what_is_not_plainly_well_formed_is_left_to_the_parser(odd: pa.RecordBatch) -> None:
    assert pieces_of_table(odd) is None


KEYS = st.sampled_from(["id", "label", "images", "notes", "system", "conversations", "score", "tools"])
COLUMNS = [
    st.lists(kind | st.none(), min_size=2, max_size=2)
    for kind in (
        st.booleans(),
        st.integers(0, 9),
        st.floats(0, 1),
        st.sampled_from(["", "x"]),
        st.just(["x"]),
        st.just([]),
    )
]


@given(st.dictionaries(KEYS, st.one_of(COLUMNS), max_size=3))
@settings(deadline=None)
def test_tables_and_rows_agree_on_keys_next_to_the_messages(others: dict[str, list[Any]]) -> None:
    batch = table([ROW, ROW], **others)
    found = pieces_of_table(batch)
    try:
        expected = pieces_of_conversations(batch.to_pylist())
    except ConversationError:
        assert found is None
        return
    assert found is None or (found.texts, found.codes.tolist()) == (expected.texts, expected.codes.tolist())


@given(st.lists(st.lists(st.text(max_size=9), min_size=1, max_size=3), min_size=1, max_size=8), st.integers(1, 20))
def test_splitting_keeps_every_piece_and_the_bound(batch: list[list[str]], max_chars: int) -> None:
    pieces = Pieces(
        [text for row in batch for text in row],
        np.zeros(sum(map(len, batch)), dtype=np.uint8),
        np.array([len(row) for row in batch], dtype=np.int64),
    )
    found = list(pieces.split(max_chars))
    assert [text for part in found for text in part.texts] == pieces.texts
    assert [count for part in found for count in part.counts.tolist()] == pieces.counts.tolist()
    for part in found:
        assert len(part.codes) == len(part.texts) == part.counts.sum()
        assert len(part) == 1 or sum(map(len, part.texts)) <= max_chars


def test_a_block_closes_before_the_document_that_would_pass() -> None:
    assert blocks_of(np.array([4, 4, 2, 1, 9, 20, 1]), 10) == [(0, 3), (3, 5), (5, 6), (6, 7)]
    assert blocks_of(np.array([10, 10]), 10) == [(0, 1), (1, 2)]
    assert blocks_of(np.array([], dtype=np.int64), 10) == []


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(5, 40))
def test_blocks_always(lengths: list[int], limit: int) -> None:
    blocks = blocks_of(np.array(lengths, dtype=np.int64), limit)
    assert [i for first, last in blocks for i in range(first, last)] == list(range(len(lengths)))
    for first, last in blocks:
        assert sum(lengths[first:last]) <= limit or last == first + 1
        assert last == len(lengths) or sum(lengths[first : last + 1]) > limit


def test_a_bad_row_is_an_empty_message_with_its_reason() -> None:
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        SourceError("not valid JSON"),
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        {"messages": [{"role": "user", "content": "Hi"}], "x" * 1_000: "long"},
        [{"role": "bot", "content": "Hi"}],
    ]
    source = Source("c", load_tasks()["conversations"], reading=Reading(invalid="drop", consecutive="merge"))
    pieces = pieces_of_rows(source, np.arange(5), rows)
    assert pieces.texts == ["Hi", "Ho", "", "a\n\nb", "", ""]
    assert pieces.counts.tolist() == [2, 1, 1, 1, 1]
    assert pieces.codes.tolist()[2:] == [0, 0, 0, 0]
    assert pieces.tallies == [(2, 1, 1)]
    notes = {i: json.loads(note) for i, note in pieces.notes}
    assert notes[1] == ["invalid", "not valid JSON"]
    assert notes[4][1].startswith("message 0, key \"role\": unknown role 'bot'")
    assert sorted(notes) == [1, 3, 4] and len(notes[3][1]) == MAX_REASON
    strict = Source("c", source.task)
    with pytest.raises(SourceError, match=r"^c row 1: not valid JSON$"):
        pieces_of_rows(strict, np.arange(5), rows)
    text = Source("t", load_tasks()["text"], reading=Reading(invalid="drop"))
    pieces = pieces_of_rows(text, np.arange(2), [{"text": "a"}, {"tex": "b"}])
    assert (pieces.texts, pieces.codes.tolist(), len(pieces.notes)) == (["a", ""], [1, 1], 1)
