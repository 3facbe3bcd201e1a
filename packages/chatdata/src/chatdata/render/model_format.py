"""Render conversations in the chat format of a model: by the library `renderers`, or by the model's own template.

Both give ids, the message of each token, and whether the model would produce it. From there on there is one rule for
all formats: a message of the user or a tool is a span; of an assistant message, the tokens that the model would produce
are, its end token included. They are divided where the parts are found in them: a text begins where it begins,
reasoning and calls where the part before ends. The mask is 1 in the spans that are trained.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatdata.conversation import Conversation
from chatdata.document import Document, Span
from chatdata.errors import BuildError, ChatdataError, ConversationError, TokenizerError, UsageError, first_line
from chatdata.recipe import NATIVE
from chatdata.render.format import PYTHON, REASONING, TEXT
from chatdata.render.messages import Messages, Piece, Tools, to_messages
from chatdata.render.template import Layout, compile_template, generation_prompt, lay_by_template
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.folder import FolderTokenizer

TEMPLATE = "template"
LEFT_OUT = {REASONING: "reasoning_left_out", TEXT: "text_left_out"}
_NO_NAMES = ("auto", "default", "custom")  # renderers that guess, or mask by length


class ModelFormat(NamedTuple):
    """identity: for the manifest, "renderers:NAME@VERSION" or "template:SHA-256 of the template"."""

    identity: str
    lay: Callable[[Messages, Tools], Layout]
    tokenizer: FolderTokenizer


@lru_cache(maxsize=1)  # a process has one
def load_format(name: str, tokenizer: Tokenizer) -> ModelFormat | None:
    """The chat format `name` of the library; for "template" that of the tokenizer's folder; None for nanochat's.

    Raises UsageError for an unknown name, without a tokenizer folder, or if the library is not installed;
    TokenizerError if the tokenizer lacks the format's tokens, or its template does not compile.
    """
    if name == NATIVE:
        return None
    if not isinstance(tokenizer, FolderTokenizer):
        raise UsageError(f"chat format {name} needs a Hugging Face tokenizer folder, not {tokenizer.name}")
    if name == TEMPLATE:
        template = compile_template(tokenizer)
        lay = partial(lay_by_template, tokenizer, template, generation_prompt(template))
        digest = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
        return ModelFormat(f"template:{digest}", lay, tokenizer)
    try:
        from renderers import config_from_name, create_renderer
    except ImportError:
        raise UsageError(f"--chat-format {name} needs the extra chatdata[formats]") from None
    try:
        config = config_from_name(name if name not in _NO_NAMES else "")
    except ValueError as error:
        raise UsageError(f"--chat-format {name}: {error}; or {NATIVE}, or {TEMPLATE}") from None
    try:
        renderer = create_renderer(tokenizer, config)
    except Exception as error:  # it asserts that tokens are there
        raise TokenizerError(f"{tokenizer.name} is no tokenizer for {name}: {first_line(error)}") from None

    def by_name(messages: Messages, tools: Tools) -> Layout:
        rendered = renderer.render(messages, tools=tools)
        return Layout(rendered.token_ids, np.array(rendered.message_indices), np.array(rendered.sampled_mask, bool))

    return ModelFormat(f"renderers:{name}@{version('renderers')}", by_name, tokenizer)


def render_in_format(model_format: ModelFormat, conversation: Conversation) -> tuple[Document, Counter[str]]:
    """Render a conversation in the common form: the document, and how many parts the format leaves out, by LEFT_OUT.

    Raises ConversationError if a text spells a control token, or the format cannot hold the conversation.
    """
    tokenizer = model_format.tokenizer
    messages, pieces = to_messages(conversation)
    tools = conversation.get("tools")
    for number, message in enumerate([*messages, *(tools or [])]):
        if spelt := tokenizer.control_pattern.search(json.dumps(message, ensure_ascii=False)):
            raise ConversationError(f"message {number}: the text {spelt[0]!r} would become the special token")
    try:
        ids, owner, sampled = model_format.lay(messages, tools)
    except ChatdataError:
        raise
    except Exception as error:  # templates raise what they want; renderers ValueError, TypeError and others
        raise ConversationError(f"the chat format refuses it: {first_line(error)}") from None
    left_out: Counter[str] = Counter()
    of, flat = np.full(len(ids), -1), list[Piece]()  # of: the place of each token's piece in `flat`
    by_owner = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[by_owner], np.arange(len(messages) + 1)).tolist()
    for number, message in enumerate(messages):
        places, found = by_owner[bounds[number] : bounds[number + 1]], pieces[number]
        if message["role"] == "assistant":
            places = places[sampled[places]]
        of[places] = len(flat)
        if message["role"] == "assistant" and (len(found) > 1 or found[0].role != TEXT):
            starts, found = _divide(tokenizer, [ids[i] for i in places.tolist()], found, left_out)
            of[places] += np.searchsorted(starts, np.arange(len(places)), side="right") - 1
        if not len(places) and not (message["role"] == "system" and _is_there(tokenizer, ids, message["content"])):
            raise ConversationError(f"message {number}: the chat format writes no token for it ({message['role']})")
        flat += found
    edges = np.flatnonzero(np.diff(of, prepend=-2) | np.diff(owner, prepend=-2))
    runs = zip(of[edges].tolist(), edges.tolist(), np.diff(edges, append=len(ids)).tolist(), strict=True)
    spans = tuple(Span(flat[i].role, start, length, flat[i].trained) for i, start, length in runs if i >= 0)
    mask = np.array([*(piece.trained for piece in flat), False], np.uint8)[of]  # -1 is the last
    return Document(np.array(ids, tokenizer.dtype), mask, spans, tokenizer), left_out


def _is_there(tokenizer: FolderTokenizer, ids: list[int], text: str) -> bool:
    return tokenizer.normalised(text.strip()) in b"".join(tokenizer.spelling[token_id] for token_id in ids)


def _divide(
    tokenizer: FolderTokenizer, ids: list[int], pieces: list[Piece], left_out: Counter[str]
) -> tuple[list[int], list[Piece]]:
    """Where each piece begins among the tokens of an assistant message, the first at 0; and the pieces that are there.

    Raises ConversationError if a call is not.
    """
    tokens = [tokenizer.spelling[token_id] for token_id in ids]
    text, ends = b"".join(tokens), np.cumsum([len(token) for token in tokens]).tolist()
    starts, found, end = list[int](), list[Piece](), 0
    for piece in pieces:
        sought = tokenizer.normalised(piece.text.strip())
        place = text.find(sought, end)
        if place < 0 and piece.role == PYTHON:
            raise ConversationError(f"the chat format does not write a call of {piece.text}")
        if place < 0:
            left_out[LEFT_OUT[piece.role]] += 1
            continue
        start = bisect_right(ends, place if piece.role == TEXT else end)
        if piece.role == PYTHON:  # `</think> <tool_call>`: the first of several added tokens belongs to the part before
            added = [i for i in range(start, bisect_right(ends, place)) if ids[i] not in tokenizer.token_bytes]
            start = added[-1] if len(added) > 1 else start
        starts.append(start)
        found.append(piece)
        end = place + len(sought)
    return ([0, *starts[1:]], found) if found else ([0], [Piece(TEXT, "", pieces[-1].trained)])


def check_canaries(model_format: ModelFormat) -> None:
    """Raise BuildError unless the format writes what the folder's own template writes, in about 30 conversations."""
    tokenizer = model_format.tokenizer
    template = compile_template(tokenizer)
    for conversation in canary_conversations():
        messages, _ = to_messages(conversation)
        ours = theirs = None  # where both refuse, so is a row
        try:
            ours = list(model_format.lay(messages, conversation.get("tools")).ids)
        except Exception as error:
            if model_format.identity.startswith(TEMPLATE) and isinstance(error, ConversationError):
                raise BuildError(f"{tokenizer.name}: {error}") from None
        with suppress(Exception):
            theirs = tokenizer.encode(template(messages, False, conversation.get("tools")))
        if ours != theirs:
            raise BuildError(
                f"{model_format.identity} and the chat template of {tokenizer.name} write different tokens, for one of "
                f"{json.dumps(messages, ensure_ascii=False)}; use --chat-format {TEMPLATE}"
            )


def canary_conversations() -> Iterator[Any]:
    """Conversations with what formats differ in: system texts, white space, letters, calls, reasoning and tools."""
    return map(json.loads, Path(__file__).with_name("canaries.jsonl").read_text(encoding="utf-8").splitlines())
