"""One message, in any of the accepted forms: its role, its text or parts, its calls and whether it is trained."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from chatdata.errors import ConversationError, kind_of, nearest
from chatdata.records import EMPTY, REFUSED_KEYS
from chatdata.tool_calls import Call, calls_of, is_media, output_of

Reasoning = Literal["keep", "drop", "error"]
PART_TYPES = ("text", "reasoning", "python", "python_output")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"tool": "tool", "function": "tool"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"function_call": "call", "observation": "tool", "tool": "tool"}
_TRAINED = ("trained", "train", "training", "weight")
_TALKERS = frozenset(("system", "user", "assistant"))
_REASONING = ("reasoning_content", "reasoning", "thinking")
_KEYS = {  # that a message may have besides role and content
    "assistant": frozenset((*_TRAINED, *_REASONING, "tool_calls", "function_call")),
    "tool": frozenset((*_TRAINED, "tool_call_id", "name")),
}


class Part(TypedDict):
    type: Literal["text", "reasoning", "python", "python_output"]
    text: str
    trained: NotRequired[Literal[False]]


def as_parts(content: str | list[Part], trained: bool) -> list[Part]:
    if isinstance(content, list):
        return content
    part: Part = {"type": "text", "text": content}
    return [part if trained else {**part, "trained": False}] if content else []


def read_message(
    message: Any, turn: int, reasoning: Reasoning, counts: dict[str, int]
) -> tuple[str, Any, bool, list[Call]]:
    """(role, content, whether it is trained, calls after the content) of one message.

    The role is the common form's, or "tool" with the result as content, or "call" for ShareGPT's calls.
    """
    if not isinstance(message, dict):
        raise ConversationError(f"message {turn}: must be an object with role and content, not {kind_of(message)}")
    role_key, key, roles = ("from", "value", _SHAREGPT_ROLES) if "from" in message else ("role", "content", _ROLES)
    if role_key not in message:
        raise ConversationError(f'message {turn}: no key "{role_key}"')
    given, content = message[role_key], message.get(key)
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise ConversationError(f'message {turn}, key "{role_key}": unknown role {given!r}; valid: {", ".join(roles)}')
    if (
        type(content) is str
        and len(message) == 2
        and content.isascii()
        and role in _TALKERS
        and "<think>" not in content
    ):
        return role, content, True, []
    extras = [name for name in message if name not in (role_key, key) and message[name] not in EMPTY]
    if extra := next((name for name in extras if name not in _KEYS.get(role, _TRAINED)), None):
        raise ConversationError(f'message {turn}, key "{extra}": {_reason(extra, role)}')
    where = f'message {turn}, key "{key}"'
    trained = _is_trained(message, extras, role, turn)
    if role == "tool":
        if key not in message:
            raise ConversationError(f'message {turn}: no key "{key}"')
        return role, check_surrogates(output_of(content, where), where), trained, []
    if role == "call":
        calls, content = calls_of(content, where), ""
    else:
        names = [name for name in ("tool_calls", "function_call") if name in extras]
        calls = [call for name in names for call in calls_of(message[name], f'message {turn}, key "{name}"')]
    for call in calls:
        call.turn, call.trained, call.code = turn, trained, check_surrogates(call.code, where)
    if role == "assistant" and content in EMPTY and (calls or any(name in extras for name in _REASONING)):
        content = ""
    elif key not in message:
        raise ConversationError(f'message {turn}: no key "{key}"')
    content = _parse_content(content, role, turn, key)
    if role in ("user", "system"):
        return role, content, True, []
    thoughts = {_reasoning_of(message[name], f'message {turn}, key "{name}"') for name in _REASONING if name in extras}
    if isinstance(content, str):
        thought, content = _split_reasoning(content)
    else:
        if not trained and message.get("trained") is not False:  # the form of others: all parts follow the message
            content = [{**part, "trained": False} for part in content]
        thought = ""
        if content and content[0]["type"] == "text":
            thought, text = _split_reasoning(content[0]["text"])
            content = [{**content[0], "text": text}, *content[1:]] if text or not thought else content[1:]
    thoughts = {thought, *thoughts} - {""}
    if len(thoughts) > 1:
        raise ConversationError(f"message {turn}: reasoning given twice, and not the same; leave one of them out")
    if reasoning != "keep":
        kept = [part for part in content if part["type"] != "reasoning"] if isinstance(content, list) else content
        if num_dropped := len(thoughts) + len(content) - len(kept):
            if reasoning == "error":
                raise ConversationError(f'message {turn}: has reasoning, but the recipe says reasoning = "error"')
            counts["reasoning_dropped"] = counts.get("reasoning_dropped", 0) + num_dropped
            thoughts, content = set(), kept
    if thoughts:
        thinking: Part = {"type": "reasoning", "text": thoughts.pop()}
        content = [thinking if trained else {**thinking, "trained": False}, *as_parts(content, trained)]
    return role, as_parts(content, trained) if calls else content, trained, calls


def _reason(extra: str, role: str) -> str:
    if extra == "train_detail":
        return "trains on parts of a text; give the message as parts, or one train for all of it"
    return REFUSED_KEYS.get(extra, f"not understood in a message of role {role}; remove it if it is only metadata")


def _is_trained(message: dict[str, Any], extras: list[str], role: str, turn: int) -> bool:
    found = {}
    for key in (key for key in extras if key in _TRAINED):
        value = message[key]
        if value not in (0, 1) or (key != "weight" and not isinstance(value, bool)):
            valid = "0 or 1" if key == "weight" else "true or false"
            raise ConversationError(f'message {turn}, key "{key}": must be {valid}, not {value!r}')
        if value and role not in ("assistant", "call"):
            raise ConversationError(f'message {turn}, key "{key}": only what the assistant says is trained on')
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise ConversationError(f"message {turn}: {' and '.join(found)} disagree")
    return False not in found.values()


def _reasoning_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConversationError(f"{where}: must be a string, not {kind_of(value)}")
    return check_surrogates(value.strip(), where)


def _split_reasoning(text: str) -> tuple[str, str]:
    """The closed <think> at the start of an answer, if any, and the text after it; empty ones are nothing."""
    thought = ""
    while not thought and (rest := text.lstrip()).startswith("<think>"):
        inner, closed, rest = rest.removeprefix("<think>").partition("</think>")
        if not closed:
            break
        thought, text = inner.strip(), rest.lstrip(" \t\r").lstrip("\r\n")
    return thought, text


def _parse_content(content: Any, role: str, turn: int, key: str) -> str | list[Part]:
    if isinstance(content, str):
        # `isascii` first: the place is only worded if something is wrong, and this runs for every message of a build
        return content if content.isascii() else check_surrogates(content, f'message {turn}, key "{key}"')
    if not isinstance(content, list):
        raise ConversationError(
            f'message {turn}, key "{key}": must be a string or a list of parts, not {kind_of(content)}'
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
        if is_media(part["type"]):
            raise ConversationError(f"{where}: part type {part['type']!r}: only text is trained on")
        raise ConversationError(f"{where}: unknown part type {part['type']!r}{nearest(str(part['type']), PART_TYPES)}")
    if not isinstance(part, dict) or "type" not in part or "text" not in part:
        raise ConversationError(f'{where}: must be an object with "type" and "text"')
    if not isinstance(part["text"], str):
        raise ConversationError(f'{where}: "text" must be a string, not {kind_of(part["text"])}')
    for key, value in part.items():
        if key not in ("type", "text") and value not in EMPTY and not (key == "trained" and isinstance(value, bool)):
            raise ConversationError(f'{where}, key "{key}": not understood; a part has only type and text')
    read: Part = {"type": part["type"], "text": check_surrogates(part["text"], where)}
    return {**read, "trained": False} if part.get("trained") is False else read


def check_surrogates(text: str, where: str) -> str:
    """Refuse lone surrogates (JSON's \\ud800): they are not text, and tiktoken would silently replace them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; not valid Unicode text"
        ) from None
    return text
