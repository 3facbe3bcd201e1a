"""From one conversation to one document: the specification every faster form is held to.

    element                       tokens                                mask
    start of document             bos                                   0
    user message                  user_start · text · user_end          0 · 0 · 0
    assistant message             assistant_start · parts · assistant_end   0 · … · 1
    string content, part `text`   text                                  1
    part `python`                 python_start · text · python_end      1 · 1 · 1
    part `python_output`          output_start · text · output_end      0 · 0 · 0

Text is encoded with ordinary encoding, each part on its own: a special token spelled inside a message stays text.
Semantics: karpathy/nanochat@790f3be:nanochat/tokenizer.py (render_conversation), except that nothing is cut here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from chatdata.conversation import Message, Part, check_surrogates, parse_conversation
from chatdata.document import SPAN_ROLES, Document, Span
from chatdata.errors import ConversationError

_USER, _TEXT, _PYTHON, _OUTPUT = (SPAN_ROLES.index(role) for role in ("user", "text", "python", "output"))


class TokenizerLike(Protocol):
    """What rendering needs of a tokenizer."""

    special_ids: dict[str, int]

    @property
    def dtype(self) -> np.dtype: ...

    def encode_ordinary(self, text: str) -> list[int]: ...


def render_conversation(tokenizer: TokenizerLike, conversation: Any) -> Document:
    """Render one conversation in any accepted form: tokens [n] (`tokenizer.dtype`), mask [n] (uint8, 1 = supervised).

    Never cuts. Raises ConversationError if the conversation is not in an accepted form, TokenizerError if the split
    pattern gives up on a text.
    """
    ids, mask, spans = _render_messages(tokenizer, parse_conversation(conversation)["messages"])
    return Document(np.array(ids, dtype=tokenizer.dtype), np.array(mask, dtype=np.uint8), tuple(spans), tokenizer)


def render_for_completion(tokenizer: TokenizerLike, conversation: Any) -> list[int]:
    """Ids of the prompt for the last assistant message: the conversation before it, then assistant_start. Never cuts.

    Raises as `render_conversation`, and ConversationError if the conversation does not end on an assistant message.
    """
    messages = parse_conversation(conversation)["messages"]
    if messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"message {len(messages) - 1}: a prompt for completion is made from a conversation that ends on the "
            "assistant, not the user"
        )
    ids, _, _ = _render_messages(tokenizer, messages[:-1])
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]


def render_text(tokenizer: TokenizerLike, text: str) -> Document:
    """Render one plain text (stage base): bos with mask 0, then the text with mask 1; dtypes as `render_conversation`.

    Raises ConversationError for a lone surrogate, TokenizerError if the split pattern gives up.
    """
    ids = tokenizer.encode_ordinary(check_surrogates(text, 'key "text"'))
    tokens = np.array([tokenizer.special_ids["<|bos|>"], *ids], dtype=tokenizer.dtype)
    mask = np.ones(len(tokens), dtype=np.uint8)
    mask[0] = 0
    spans = (Span(_TEXT, 1, len(ids)),) if ids else ()
    return Document(tokens, mask, spans, tokenizer)


def _render_messages(tokenizer: TokenizerLike, messages: list[Message]) -> tuple[list[int], list[int], list[Span]]:
    special = tokenizer.special_ids
    ids: list[int] = []
    mask: list[int] = []
    spans: list[Span] = []

    def add(tokens: list[int], supervised: int) -> None:
        ids.extend(tokens)
        mask.extend([supervised] * len(tokens))

    def add_span(role: int, tokens: list[int], supervised: int) -> None:
        if tokens:
            spans.append(Span(role, len(ids), len(tokens)))
        add(tokens, supervised)

    add([special["<|bos|>"]], 0)
    for role, content in merged_turns(messages):
        if role == "user":
            text = tokenizer.encode_ordinary(content)
            add_span(_USER, [special["<|user_start|>"], *text, special["<|user_end|>"]], 0)
            continue
        add([special["<|assistant_start|>"]], 0)
        parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            text = tokenizer.encode_ordinary(part["text"])
            if part["type"] == "text":
                add_span(_TEXT, text, 1)
            elif part["type"] == "python":
                add_span(_PYTHON, [special["<|python_start|>"], *text, special["<|python_end|>"]], 1)
            else:
                add_span(_OUTPUT, [special["<|output_start|>"], *text, special["<|output_end|>"]], 0)
        add([special["<|assistant_end|>"]], 1)
    return ids, mask, spans


def merged_turns(messages: list[Message]) -> Iterator[tuple[str, Any]]:
    """(role, content) per user and assistant message; a leading system text stands in front of the first user text."""
    system = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            yield "assistant", content
            continue
        assert isinstance(content, str)  # parse_conversation joins parts of all but the assistant's
        if message["role"] == "system":
            system = content + "\n\n"
        else:
            yield "user", system + content
            system = ""
