"""Many conversations rendered at once equal those that the specification renders one by one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xxhash
from common_form import conversations, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.document import Span
from chatdata.errors import FormatError
from chatdata.render.batch import Mismatch, RenderedBatch, check_ids, render_batch, replay_call, replay_calls
from chatdata.render.format import OUTPUT, PYTHON, TEXT, USER
from chatdata.render.pieces import CLOSES, OPENS, Pieces, pieces_of_conversations, pieces_of_texts
from chatdata.render.specification import render_conversation, render_text
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer


def encoder(tokenizer: Tokenizer) -> Any:
    def encode(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [tokenizer.encode_ordinary(text) for text in batch]
        return np.concatenate([np.array(i, np.uint32) for i in ids]), np.array([len(i) for i in ids], np.int64)

    return encode


def render(tokenizer: Tokenizer, pieces: Pieces) -> RenderedBatch:
    special, vocab = tokenizer.special_ids, tokenizer.vocab_size
    return render_batch(pieces, *encoder(tokenizer)(pieces.texts), special, tokenizer.dtype, vocab)


def documents(columns: RenderedBatch) -> list[tuple[list[int], list[int], list[Span]]]:
    """Ids, mask and spans of each document."""
    cuts = np.cumsum(columns.num_tokens)[:-1]
    spans = np.split(columns.spans, np.cumsum(columns.num_spans)[:-1])
    return [
        (tokens.tolist(), mask.tolist(), [Span(*span) for span in of_document.tolist()])
        for tokens, mask, of_document in zip(
            np.split(columns.tokens, cuts), np.split(columns.mask, cuts), spans, strict=True
        )
    ]


@given(st.lists(conversations(), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_the_same_as_one_by_one(byte_tokenizer: Tokenizer, batch: list[dict[str, Any]]) -> None:
    columns = render(byte_tokenizer, pieces_of_conversations(batch))
    expected = [render_conversation(byte_tokenizer, conversation) for conversation in batch]
    assert documents(columns) == [(d.tokens.tolist(), d.mask.tolist(), list(d.spans)) for d in expected]
    assert columns.num_supervised.tolist() == [d.num_supervised for d in expected]
    assert columns.num_tool_calls.tolist() == [sum(span.role == 2 for span in d.spans) for d in expected]
    starts = [byte_tokenizer.special_ids[f"<|{role}_start|>"] for role in ("user", "assistant")]
    assert columns.num_turns.tolist() == [int(np.isin(d.tokens, starts).sum()) for d in expected]
    digests = [xxhash.xxh3_128_digest(d.tokens.tobytes() + d.mask.tobytes()) for d in expected]
    assert [bytes(digest) for digest in columns.digests] == digests
    ends = [d.mask[d.tokens == byte_tokenizer.special_ids["<|assistant_end|>"]] for d in expected]
    assert columns.untrained_turns.tolist() == [int((end == 0).sum()) for end in ends]
    assert columns.tokens.dtype == "<u2" and columns.mask.dtype == "|u1"


def test_one_conversation_by_hand(byte_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": [{"type": "text", "text": ""}, {"type": "python", "text": "1"}]},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": []},
    ]
    pieces = pieces_of_conversations([messages])
    assert pieces.texts == ["S\n\nu", "", "1", "v", ""]
    assert pieces.codes.tolist() == [USER, TEXT | OPENS, PYTHON | CLOSES, USER, TEXT | OPENS | CLOSES]
    special = dict(zip(SPECIAL_TOKENS, range(256, 265), strict=True))
    names = "bos user_start S \n \n u user_end assistant_start python_start 1 python_end assistant_end user_start v"
    names = [*names.replace("\n", "NL").split(" "), "user_end", "assistant_start", "assistant_end"]
    ids = [special.get(f"<|{name}|>", 10 if name == "NL" else ord(name[0])) for name in names]
    columns = render(byte_tokenizer, pieces)
    assert columns.tokens.tolist() == ids
    assert columns.mask.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    assert columns.spans.tolist() == [(0, 1, 6, 0), (2, 8, 3, 1), (0, 12, 3, 0)]


@given(st.lists(texts, min_size=1, max_size=5))
@settings(deadline=None)
def test_plain_texts(byte_tokenizer: Tokenizer, batch: list[str]) -> None:
    columns = render(byte_tokenizer, pieces_of_texts(batch))
    expected = [render_text(byte_tokenizer, text) for text in batch]
    assert documents(columns) == [(d.tokens.tolist(), d.mask.tolist(), list(d.spans)) for d in expected]
    assert columns.num_turns.tolist() == [0] * len(batch)


def test_an_id_outside_the_vocabulary_is_refused(byte_tokenizer: Tokenizer) -> None:
    def encode(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([70_000], dtype=np.uint32), np.array([1])

    with pytest.raises(FormatError, match="token id 70000"):
        render_batch(pieces_of_texts(["a"]), *encode(["a"]), byte_tokenizer.special_ids, np.dtype("<u2"), 265)


@pytest.mark.parametrize(
    ("call", "recorded", "kind", "computed"),
    [
        ("3*4", "12.0", "point_zero", "12"),
        ("3-1.5", "1.50", "format", "1.5"),
        ("1/2", ".5", "format", "0.5"),
        ("10/3", "3.33", "rounding", "3.33333333333"),
        ("2+2", "5", "different", "4"),
        ("2+2", "", "different", "4"),
    ],
)
def test_kinds(call: str, recorded: str, kind: str, computed: str) -> None:
    assert replay_call(call, recorded, computed) == Mismatch(kind, call, recorded, computed)


def test_calls_are_replayed_and_those_of_other_tools_counted() -> None:
    texts = ["1/0", "0", "import os", "3*4", "12", "'banana'.count('a')", "2", "q", "get_weather(city='Paris')", "18"]
    roles = np.array([PYTHON, OUTPUT, PYTHON, PYTHON, OUTPUT, PYTHON, OUTPUT, USER, PYTHON, OUTPUT], dtype=np.uint8)
    found, other_tools = replay_calls([*texts, "1+1"], np.append(roles, PYTHON), np.array([0] * 7 + [1] * 4))
    assert [(i, json.loads(note)) for i, note in found] == [
        (0, ["different", "'banana'.count('a')", "2", "3"]),
        (1, ["no_output", "1+1", "", ""]),
    ]
    assert other_tools == {0: 2, 1: 1}


def test_untrained_parts_and_reasoning_by_hand(byte_tokenizer: Tokenizer) -> None:
    said = [
        {"type": "reasoning", "text": "r"},
        {"type": "text", "text": "a", "trained": False},
        {"type": "python", "text": "1", "trained": False},
    ]
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": said, "trained": False}]
    document = render_conversation(byte_tokenizer, messages)
    begin = "<|bos|>\n<|user_start|>u<|user_end|>\n<|assistant_start|>⟦<think>\nr\n</think>\n\n⟧"
    assert document.conversation_markup() == begin + "a<|python_start|>1<|python_end|><|assistant_end|>"
    assert document.spans == (Span(0, 1, 3, False), Span(4, 5, 20, True), Span(1, 25, 1, False), Span(2, 26, 3, False))


@pytest.mark.parametrize(("ids", "bad"), [([3, 70_000], 70_000), ([265], 265), ([-1, 3], -1)])
def test_ids_are_held_to_the_vocabulary(ids: list[int], bad: int) -> None:
    with pytest.raises(FormatError, match=f"token id {bad} is outside 0 … 264: it does not fit the vocabulary"):
        check_ids(np.array(ids), 265)
    check_ids(np.array([0, 264]), 265)
    check_ids(np.array([], dtype=np.uint32), 265)
