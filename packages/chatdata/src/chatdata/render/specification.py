"""Render one conversation: the specification that the batch renderer is held to.

    element                       tokens                                mask
    start of document             bos                                   0
    user message                  user_start · text · user_end          0 · 0 · 0
    assistant message             assistant_start · parts · assistant_end   0 · … · 1
    string content, part `text`   text                                  1
    part `reasoning`              <think> text </think> (see `written`)  1
    part `python`                 python_start · text · python_end      1 · 1 · 1
    part `python_output`          output_start · text · output_end      0 · 0 · 0

A part that is not trained has mask 0, and so has the assistant_end of a message that is not trained.
The tokens and mask values are those of NANOCHAT in format.py. Each part is encoded separately with ordinary encoding: a
special token spelled inside a message stays text.
Semantics: karpathy/nanochat@790f3be:nanochat/tokenizer.py (render_conversation), except that nothing is cut here.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from chatdata.conversation import AS_WRITTEN, Message, Part, Reading, check_surrogates, parse_conversation
from chatdata.document import Document, Span
from chatdata.errors import ConversationError
from chatdata.messages import as_parts
from chatdata.render.format import NANOCHAT, PART_ROLES, TEXT, USER, written
from chatdata.tokenizer.bpe import Tokenizer


def render_conversation(tokenizer: Tokenizer, conversation: Any, reading: Reading = AS_WRITTEN) -> Document:
    """Render one conversation in any accepted form: tokens [n] (`tokenizer.dtype`), mask [n] (uint8, 1 = supervised).

    Never cuts. Raises ConversationError if the conversation is not in an accepted form, TokenizerError if the split
    pattern gives up on a text.
    """
    ids, mask, spans = _render_messages(tokenizer, parse_conversation(conversation, reading)["messages"])
    return Document(np.array(ids, dtype=tokenizer.dtype), np.array(mask, dtype=np.uint8), tuple(spans), tokenizer)


def render_for_completion(tokenizer: Tokenizer, conversation: Any) -> list[int]:
    """Ids of the prompt for the last assistant message: the conversation before it, then assistant_start. Never cuts.

    Raises what `render_conversation` raises, and ConversationError if the conversation does not end on the assistant.
    """
    messages = parse_conversation(conversation)["messages"]
    if messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"message {len(messages) - 1}: a prompt for completion needs a conversation that ends on the assistant, "
            "not the user"
        )
    ids, _, _ = _render_messages(tokenizer, messages[:-1])
    return [*ids, tokenizer.special_ids[NANOCHAT.assistant_start]]


def render_text(tokenizer: Tokenizer, text: str) -> Document:
    """Render one plain text (stage base): bos with mask 0, then the text with mask 1; dtypes as `render_conversation`.

    Raises ConversationError for a lone surrogate, TokenizerError if the split pattern gives up.
    """
    ids = tokenizer.encode_ordinary(check_surrogates(text, 'key "text"'))
    tokens = np.array([tokenizer.special_ids[NANOCHAT.bos], *ids], dtype=tokenizer.dtype)
    mask = np.full(len(tokens), NANOCHAT.text.supervised, dtype=np.uint8)
    mask[0] = NANOCHAT.delimiters[NANOCHAT.bos]
    spans = (Span(TEXT, 1, len(ids), trained=True),) if ids else ()
    return Document(tokens, mask, spans, tokenizer)


def _render_messages(tokenizer: Tokenizer, messages: list[Message]) -> tuple[list[int], list[int], list[Span]]:
    special = tokenizer.special_ids
    ids: list[int] = []
    mask: list[int] = []
    spans: list[Span] = []

    def add(tokens: list[int], supervised: bool) -> None:
        ids.extend(tokens)
        mask.extend([int(supervised)] * len(tokens))

    def add_delimiter(token: str, trained: bool = True) -> None:
        add([special[token]], NANOCHAT.delimiters[token] and trained)

    def add_span(role: int, text: str, trained: bool = True) -> None:
        form = NANOCHAT.spans[role]
        trained = trained and form.supervised
        tokens = tokenizer.encode_ordinary(text)
        if form.opening:
            tokens = [special[form.opening], *tokens, special[form.closing]]
        if tokens:
            spans.append(Span(role, len(ids), len(tokens), trained))
        add(tokens, trained)

    add_delimiter(NANOCHAT.bos)
    for content, trained in merged_turns(messages):
        if trained is None:
            assert isinstance(content, str)
            add_span(USER, content)
            continue
        add_delimiter(NANOCHAT.assistant_start)
        for part in as_parts(content, trained):
            add_span(PART_ROLES[part["type"]], written(part), part.get("trained", True))
        add_delimiter(NANOCHAT.assistant_end, trained)
    return ids, mask, spans


def merged_turns(messages: list[Message]) -> Iterator[tuple[str | list[Part], bool | None]]:
    """(content, trained) per message; trained is None for a user's.

    A leading system text is put in front of the first user text.
    """
    system = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            yield content, message.get("trained", True)
            continue
        assert isinstance(content, str)  # parse_conversation joins the parts of user and system messages
        if message["role"] == "system":
            system = content + "\n\n"
        else:
            yield system + content, None
            system = ""
