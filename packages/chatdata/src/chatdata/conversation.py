"""Conversations: the common form, and every form accepted from files.

The common form is plain data:

    {"messages": [{"role": "system",    "content": "Be brief."},          # optional, first only
                  {"role": "user",      "content": "How much is 2+3?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "It is "},
                                                    {"type": "python", "text": "2+3"},
                                                    {"type": "python_output", "text": "5"}]}]}

`parse_conversation` turns every accepted form into it and refuses all others (table in docs/conversations.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal, NotRequired, TypedDict

from chatdata.errors import ConversationError, nearest

Role = Literal["system", "user", "assistant"]
PART_TYPES = ("text", "python", "python_output")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# Keys next to the messages. Empty ones are nothing; numbers, booleans and these are metadata, which is not rendered.
# docs/conversations.md shows the list.
_METADATA = """
    id uuid hash conversation_id conversation_hash chat_id prompt_id question_id session_id user_id source
    dataset dataset_name data_source subset split config origin url file filename version license licence author
    model model_name generator provider meta metadata info category categories subcategory topic full_topic
    subject domain task task_name task_type type tags keywords language lang locale country state timestamp
    created_at updated_at date title difficulty quality score scores rating ratings turn num_turns redacted
    toxic toxicity moderation openai_moderation detoxify_moderation prompt letters
"""
METADATA_KEYS = frozenset(_METADATA.split())
# refused whatever the recipe says: without them the conversation means something else
_MEDIA = "belongs to the messages, but only text is trained on"
_PREFERENCE = "compares answers, but every answer here is trained on"
REFUSED_KEYS = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "label"), _PREFERENCE),
    "chat_template_kwargs": "changes how a template renders the messages, but there is no template here",
}
_INSTEAD = {
    **dict.fromkeys(("tools", "functions"), "write them into a system message, or"),
    **dict.fromkeys(("system", "system_prompt"), "make it the first message, or"),
    "history": "make it messages, or",
}


Reasoning = Literal["keep", "drop", "error"]
Consecutive = Literal["error", "merge"]
Invalid = Literal["error", "drop"]


@dataclass(frozen=True)
class Reading:
    """How a recipe entry wants its rows read (docs/recipes.md has the keys)."""

    ignore: tuple[str, ...] = ()  # keys of a row that are left out
    columns: tuple[tuple[str, str], ...] = ()  # (our name, the row's)
    reasoning: Reasoning = "keep"
    consecutive: Consecutive = "error"  # neighbouring messages of one role
    invalid: Invalid = "error"  # rows that cannot be used


AS_WRITTEN = Reading()


class Part(TypedDict):
    type: Literal["text", "reasoning", "python", "python_output"]
    text: str
    trained: NotRequired[Literal[False]]


class Message(TypedDict):
    """`trained` is for assistant_end and for string content; parts have their own."""

    role: Role
    content: str | list[Part]
    trained: NotRequired[Literal[False]]


class Conversation(TypedDict):
    """`counts`: what reading changed, by name; only if it changed anything."""

    messages: list[Message]
    counts: NotRequired[dict[str, int]]


def parse_conversation(record: Any, reading: Reading = AS_WRITTEN) -> Conversation:
    """The common form of `record`: a list of messages, an object with `messages`, or ShareGPT's `conversations`.

    `record` is not modified; the result shares strings with it but no containers. User and system content given as a
    list of text parts is joined with "".

    Raises ConversationError naming the message (counted from 0) and the key.
    """
    raw = _messages_of(record)
    messages = [_parse_message(message, turn) for turn, message in enumerate(raw)]
    _check_order(messages)
    return {"messages": messages}


def _messages_of(record: Any) -> list[Any]:
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ConversationError(f"a conversation is a list of messages or an object with messages, not {_kind(record)}")
    key = "messages" if record.get("messages") is not None else "conversations"
    messages = record.get(key)
    others = [other for other in record if other != key and record[other] not in (None, "", [], {})]
    for other in others:
        if other in REFUSED_KEYS:
            raise ConversationError(f'key "{other}" next to the messages: {REFUSED_KEYS[other]}')
    if messages is None:
        raise ConversationError('no messages: expected the key "messages" (or ShareGPT\'s "conversations")')
    for other in others:
        if other not in METADATA_KEYS and not isinstance(record[other], Number):
            name, instead = json.dumps(other), _INSTEAD.get(other, "if that is right,")
            left_out = f"key {name} next to the messages would be left out"
            raise ConversationError(f"{left_out}; {instead} set ignore = [{name}] in the recipe")
    if not isinstance(messages, list):
        raise ConversationError(f'"{key}" must be a list of messages, not {_kind(messages)}')
    if not messages:
        raise ConversationError(f'"{key}" is empty: a conversation needs at least one user message')
    return messages


def _parse_message(message: Any, turn: int) -> Message:
    if not isinstance(message, dict):
        raise ConversationError(f"message {turn}: must be an object with role and content, not {_kind(message)}")
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    for key in (role_key, content_key):
        if key not in message:
            raise ConversationError(f'message {turn}: no key "{key}"')
    # columnar files have null extras; anything else (tool_calls, weight, …) would change what is trained on
    others = [key for key in message if key not in (role_key, content_key)] if len(message) > 2 else []
    if extra := [key for key in others if message[key] not in (None, [])]:
        raise ConversationError(
            f'message {turn}, key "{extra[0]}": not understood; a message has only {role_key} and {content_key}'
        )
    roles: dict[str, Any] = _SHAREGPT_ROLES if role_key == "from" else _ROLES
    role = message[role_key]
    if not isinstance(role, str) or role not in roles:
        raise ConversationError(f'message {turn}, key "{role_key}": unknown role {role!r}; valid: {", ".join(roles)}')
    role = roles[role]
    return {"role": role, "content": _parse_content(message[content_key], role, turn, content_key)}


def _parse_content(content: Any, role: Role, turn: int, key: str) -> str | list[Part]:
    if isinstance(content, str):
        # `isascii` first: the place is only worded if something is wrong, and this runs for every message of a build
        return content if content.isascii() else check_surrogates(content, f'message {turn}, key "{key}"')
    if not isinstance(content, list):
        raise ConversationError(
            f'message {turn}, key "{key}": must be a string or a list of parts, not {_kind(content)}'
        )
    parts = [_parse_part(part, turn, key, i) for i, part in enumerate(content)]
    if role == "assistant":
        return parts
    for i, part in enumerate(parts):
        if part["type"] != "text":
            raise ConversationError(
                f'message {turn}, key "{key}", part {i}: only the assistant has {part["type"]} parts, not the {role}'
            )
    return "".join(part["text"] for part in parts)


def _parse_part(part: Any, turn: int, key: str, i: int) -> Part:
    # fast path: this runs for every part of a build
    if type(part) is dict and len(part) == 2 and part.get("type") in PART_TYPES:
        text = part.get("text")
        if type(text) is str and text.isascii():
            return {"type": part["type"], "text": text}
    where = f'message {turn}, key "{key}", part {i}'
    if isinstance(part, dict) and part.get("type", "text") not in PART_TYPES:
        raise ConversationError(f"{where}: unknown part type {part['type']!r}{nearest(str(part['type']), PART_TYPES)}")
    if not isinstance(part, dict) or "type" not in part or "text" not in part:
        raise ConversationError(f'{where}: must be an object with "type" and "text"')
    if not isinstance(part["text"], str):
        raise ConversationError(f'{where}: "text" must be a string, not {_kind(part["text"])}')
    extra = [key for key, value in part.items() if key not in ("type", "text") and value not in (None, [])]
    if extra:
        raise ConversationError(f'{where}, key "{extra[0]}": not understood; a part has only type and text')
    return {"type": part["type"], "text": check_surrogates(part["text"], where)}


def check_surrogates(text: str, where: str) -> str:
    """Refuse lone surrogates (JSON's \\ud800): they are not text, and tiktoken would silently replace them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; not valid Unicode text"
        ) from None
    return text


def _check_order(messages: list[Message]) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    if first == len(messages):
        raise ConversationError("message 0: a system message must be followed by a user message")
    for turn, message in enumerate(messages[first:], start=first):
        want = ("user", "assistant")[(turn - first) % 2]
        if message["role"] != want:
            raise ConversationError(
                f'message {turn}, key "role": {message["role"]} where {want} must come; after an optional system '
                "message roles alternate user, assistant, starting with user"
            )


def _kind(value: Any) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a boolean", int: "a number", float: "a number"}
    names |= {str: "a string", dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)
