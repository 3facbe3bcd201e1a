from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata import render_conversation, render_for_completion
from chatdata.document import SPAN_ROLES
from chatdata.errors import ConversationError
from chatdata.render.specification import merged_turns, render_text
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, append_special_tokens

# ids of the byte tokenizer's special tokens
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)
A, B, C = b"abc"


def chat(*contents: object) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def part(kind: str, text: str) -> dict:
    return {"type": kind, "text": text}


LITERAL = [
    (chat("a", "b"), [BOS, USER, A, USER_END, ASSISTANT, B, ASSISTANT_END], [0, 0, 0, 0, 0, 1, 1]),
    (chat("a"), [BOS, USER, A, USER_END], [0, 0, 0, 0]),
    (chat("", ""), [BOS, USER, USER_END, ASSISTANT, ASSISTANT_END], [0, 0, 0, 0, 1]),
    (
        chat("a", [part("text", "b"), part("python", "c"), part("python_output", "a"), part("text", "")]),
        [BOS, USER, A, USER_END, ASSISTANT, B, PYTHON, C, PYTHON_END, OUTPUT, A, OUTPUT_END, ASSISTANT_END],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1],
    ),
    (
        {"messages": [{"role": "system", "content": "c"}, *chat("a", "b", "c")["messages"]]},
        [BOS, USER, C, 10, 10, A, USER_END, ASSISTANT, B, ASSISTANT_END, USER, C, USER_END],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
    ),
    (
        chat([part("text", "a"), part("text", "b")], "c"),
        [BOS, USER, A, B, USER_END, ASSISTANT, C, ASSISTANT_END],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ),
    (chat("<|bos|>", "b"), [BOS, USER, *b"<|bos|>", USER_END, ASSISTANT, B, ASSISTANT_END], [0] * 11 + [1, 1]),
]


@pytest.mark.parametrize(("conversation", "ids", "mask"), LITERAL)
def test_literal(byte_tokenizer: Tokenizer, conversation: dict, ids: list[int], mask: list[int]) -> None:
    before = copy.deepcopy(conversation)
    document = render_conversation(byte_tokenizer, conversation)
    assert document.tokens.tolist() == ids
    assert document.mask.tolist() == mask
    assert (document.tokens.dtype, document.mask.dtype) == (np.dtype("<u2"), np.dtype("|u1"))
    assert conversation == before


def test_a_leading_system_text_joins_the_first_user_text_only() -> None:
    messages = [{"role": "system", "content": "c"}, *chat("a", "b", "d", [part("text", "e")])["messages"]]
    expected = [("c\n\na", None), ("b", True), ("d", None), ([part("text", "e")], True)]
    assert [*merged_turns(messages)] == expected


def test_spans_hold_delimiters_except_for_text(byte_tokenizer: Tokenizer) -> None:
    parts = [part("text", "b"), part("python", "c"), part("python_output", ""), part("text", "")]
    spans = render_conversation(byte_tokenizer, chat("a", parts)).spans
    assert [(SPAN_ROLES[span.role], span.start, span.length) for span in spans] == [
        ("user", 1, 3),
        ("text", 5, 1),
        ("python", 6, 3),
        ("output", 9, 2),
    ]


def test_a_document_can_be_read_as_text_and_its_spans_cannot_change(byte_tokenizer: Tokenizer) -> None:
    document = render_conversation(byte_tokenizer, chat("a", "b"))
    assert document.text() == "<|bos|><|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|>"
    assert isinstance(document.spans, tuple)
    assert render_text(byte_tokenizer, "ab").text() == "<|bos|>ab"


def test_completion_prompt(byte_tokenizer: Tokenizer) -> None:
    expected = [BOS, USER, A, USER_END, ASSISTANT, B, ASSISTANT_END, USER, C, USER_END, ASSISTANT]
    assert render_for_completion(byte_tokenizer, chat("a", "b", "c", "answer")) == expected
    with pytest.raises(ConversationError, match="ends on the assistant, not the user"):
        render_for_completion(byte_tokenizer, chat("a"))


def test_plain_text(byte_tokenizer: Tokenizer) -> None:
    document = render_text(byte_tokenizer, "ab")
    assert (document.tokens.tolist(), document.mask.tolist()) == ([BOS, A, B], [0, 1, 1])
    assert (document.tokens.dtype, document.mask.dtype) == (np.dtype("<u2"), np.dtype("|u1"))
    assert [tuple(span) for span in document.spans] == [(1, 1, 2, True)]
    with pytest.raises(ConversationError, match=r'^key "text": lone surrogate U\+D800'):
        render_text(byte_tokenizer, "a\ud800")
    empty = render_text(byte_tokenizer, "")
    assert (empty.tokens.tolist(), empty.spans) == ([BOS], ())


def golden_cases(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "golden" / "render.jsonl").read_text().splitlines()]


def test_golden_conversations(shared: Path, nanochat_tokenizer: Tokenizer) -> None:
    cases = golden_cases(shared)
    assert len(cases) == 61
    prompts = 0
    for case in cases:
        document = render_conversation(nanochat_tokenizer, case["conversation"])
        # that commit cuts at 2,048; we never cut while rendering
        assert document.tokens.tolist()[:2048] == case["ids"], case["name"]
        assert document.mask.tolist()[:2048] == case["mask"], case["name"]
        assert len(document) == case["untruncated_len"], case["name"]
        assert document.tokens.dtype == np.dtype("<u2")
        if "completion_ids" in case:
            *prompt, start = render_for_completion(nanochat_tokenizer, case["conversation"])
            assert [*prompt[:2048], start] == case["completion_ids"], case["name"]
            prompts += 1
    assert prompts == 59


class StubEncoder:
    """Knows the d32 tokenizer's ids for the texts of one conversation; we do not have that tokenizer itself."""

    dtype = np.dtype("<u2")

    def __init__(self, texts: dict[str, list[int]], special_ids: dict[str, int]) -> None:
        self.encode_ordinary, self.special_ids = texts.__getitem__, special_ids


def test_seed_tokens(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "seed_tokens.json").read_text())
    rows, messages = golden["rows"], golden["conversation"]["messages"]
    special_ids = {token: token_id for token, token_id, _ in rows if token in SPECIAL_TOKENS}
    assert len(special_ids) == 9
    texts = [messages[0]["content"], *(piece["text"] for piece in messages[1]["content"])]
    plain = [(token, token_id) for token, token_id, _ in rows if token not in SPECIAL_TOKENS]
    ids_of: dict[str, list[int]] = {}
    for text in texts:
        ids: list[int] = []
        while sum(len(token) for token, _ in plain[: len(ids)]) < len(text):
            ids.append(plain[len(ids)][1])
        assert "".join(token for token, _ in plain[: len(ids)]) == text
        ids_of[text], plain = ids, plain[len(ids) :]
    assert not plain
    document = render_conversation(StubEncoder(ids_of, special_ids), golden["conversation"])
    assert len(document) == 92
    assert [[i, m] for i, m in zip(document.tokens.tolist(), document.mask.tolist(), strict=True)] == [
        [token_id, mask] for _, token_id, mask in rows
    ]


texts = st.text(max_size=12)
assistant_parts = st.lists(
    st.builds(part, st.sampled_from(["text", "python", "python_output"]), texts), min_size=0, max_size=4
)
conversations = st.lists(texts, min_size=1, max_size=3).flatmap(
    lambda users: st.tuples(
        st.none() | texts,
        st.just(users),
        st.lists(texts | assistant_parts, min_size=len(users) - 1, max_size=len(users)),
    )
)


@given(conversations)
def test_what_always_holds(drawn: tuple) -> None:
    system, users, answers = drawn
    contents = [content for pair in zip(users, [*answers, None], strict=False) for content in pair]
    conversation = chat(*[content for content in contents if content is not None])
    if system is not None:
        conversation["messages"].insert(0, {"role": "system", "content": system})
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "bytes")
    document = render_conversation(tokenizer, conversation)
    ids, mask = document.tokens.tolist(), document.mask.tolist()
    assert ids[0] == BOS and ids.count(BOS) == 1
    # supervised: exactly the parts' texts, python's delimiters, and assistant_end
    expected = b""
    supervised_specials = 0
    for answer in answers:
        supervised_specials += 1
        for piece in [part("text", answer)] if isinstance(answer, str) else answer:
            expected += piece["text"].encode() if piece["type"] != "python_output" else b""
            supervised_specials += 2 * (piece["type"] == "python")
    supervised = [i for i, m in zip(ids, mask, strict=True) if m]
    assert bytes(i for i in supervised if i < 256) == expected
    assert sum(i >= 256 for i in supervised) == supervised_specials
    # spans tile everything but bos, assistant_start and assistant_end
    covered = [i for span in document.spans for i in range(span.start, span.start + span.length)]
    assert covered == sorted(set(covered))
    assert {ids[i] for i in set(range(len(ids))) - set(covered)} <= {BOS, ASSISTANT, ASSISTANT_END}


def test_a_lone_surrogate_in_plain_text_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConversationError, match="lone surrogate"):
        render_text(byte_tokenizer, "a\ud800b")
