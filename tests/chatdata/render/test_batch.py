"""Many conversations rendered at once equal those that the specification renders one by one."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.document import Span
from chatdata.errors import FormatError
from chatdata.render.batch import Mismatch, RenderedBatch, check_ids, render_batch, replay_call
from chatdata.render.format import PYTHON, TEXT, USER
from chatdata.render.pieces import CLOSES, OPENS, Pieces, pieces_of_conversations, pieces_of_texts
from chatdata.render.specification import render_conversation, render_text
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

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
        (tokens.tolist(), mask.tolist(), [Span(*map(int, span)) for span in of_document.tolist()])
        for tokens, mask, of_document in zip(
            np.split(columns.tokens, cuts), np.split(columns.mask, cuts), spans, strict=True
        )
    ]


@given(st.lists(conversations(), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_the_same_as_one_by_one(byte_tokenizer: Tokenizer, batch: list[list[dict[str, Any]]]) -> None:
    columns = render(byte_tokenizer, pieces_of_conversations(batch))
    expected = [render_conversation(byte_tokenizer, conversation) for conversation in batch]
    assert documents(columns) == [(d.tokens.tolist(), d.mask.tolist(), list(d.spans)) for d in expected]
    assert columns.num_supervised.tolist() == [d.num_supervised for d in expected]
    assert columns.num_tool_calls.tolist() == [sum(span.role == 2 for span in d.spans) for d in expected]
    starts = [byte_tokenizer.special_ids[f"<|{role}_start|>"] for role in ("user", "assistant")]
    assert columns.num_turns.tolist() == [int(np.isin(d.tokens, starts).sum()) for d in expected]
    digests = [hashlib.blake2b(d.tokens.astype("<u4").tobytes() + d.mask.tobytes(), digest_size=16) for d in expected]
    assert [bytes(digest) for digest in columns.digests] == [digest.digest() for digest in digests]
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
    assert columns.spans.tolist() == [(0, 1, 6), (2, 8, 3), (0, 12, 3)]


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
        ("3*4", "12", "equal", "12"),
        ("3*4", "12.0", "point_zero", "12"),
        ("3-1.5", "1.50", "format", "1.5"),
        ("1/2", ".5", "format", "0.5"),
        ("10/3", "3.33", "rounding", "3.33333333333"),
        ("2+2", "5", "different", "4"),
        ("2+2", "", "different", "4"),
        ("1/0", "0", "failure", "division by zero"),
        ("import os", "0", "failure", "character 1"),
        ("'banana'.count('a')", "3", "equal", "3"),
    ],
)
def test_kinds(call: str, recorded: str, kind: str, computed: str) -> None:
    found = replay_call(call, recorded)
    assert (found.kind, found.call, found.recorded) == (kind, call, recorded)
    assert found.computed == computed or (kind == "failure" and computed in found.computed)


def test_a_call_without_an_output() -> None:
    assert replay_call("1+1", None) == Mismatch("no_output", "1+1", "", "")


@pytest.mark.parametrize(("ids", "bad"), [([3, 70_000], 70_000), ([265], 265), ([-1, 3], -1)])
def test_ids_are_held_to_the_vocabulary(ids: list[int], bad: int) -> None:
    with pytest.raises(FormatError, match=f"token id {bad} is outside 0 … 264: it does not fit the vocabulary"):
        check_ids(np.array(ids), 265)
    check_ids(np.array([0, 264]), 265)
    check_ids(np.array([], dtype=np.uint32), 265)
