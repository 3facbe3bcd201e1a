"""One message, in any of the accepted forms: its role, its text or parts, its calls and whether it is trained."""

from typing import Any, Literal, NotRequired, TypedDict

from chatdata.errors import ConversationError, kind_of, nearest
from chatdata.records import EMPTY, REFUSED_KEYS
from chatdata.tool_calls import MEDIA, Call, calls_of, output_of

Reasoning = Literal["keep", "drop", "error"]
PART_TYPES = ("text", "reasoning", "python", "python_output")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"tool": "tool", "function": "tool"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"function_call": "call", "observation": "tool", "tool": "tool"}
_TRAINED = ("trained", "train", "training", "weight")
_TALKERS = frozenset(("system", "user", "assistant"))
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PARTLY = "trains on parts of a text; give the message as parts, or one train for all of it"
_REFUSED = {**REFUSED_KEYS, "train_detail": _PARTLY}
_KEYS = {  # that a message may have besides role and content
    "assistant": frozenset((*_TRAINED, *_REASONING, *_CALLS)),
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
    if type(content) is str and len(message) == 2 and role in _TALKERS and "<think>" not in content:
        # `isascii` first: the place is only worded if something is wrong, and this runs for every message of a build
        return role, _text(content, f'message {turn}, key "{key}"') if not content.isascii() else content, True, []
    where = f'message {turn}, key "{key}"'
    extras = [name for name in message if name not in (role_key, key) and message[name] not in EMPTY]
    for name in extras:
        if name not in _KEYS.get(role, _TRAINED):
            why = f"not understood in a message of role {role}; remove it if it is only metadata"
            raise ConversationError(f'message {turn}, key "{name}": {_REFUSED.get(name, why)}')
    has_more = role == "assistant" and content in EMPTY and any(name in extras for name in (*_CALLS, *_REASONING))
    if key not in message and not has_more:
        raise ConversationError(f'message {turn}: no key "{key}"')
    trained = _is_trained(message, extras, role, turn)
    if role == "tool":
        return role, _text(output_of(content, where), where), trained, []
    named = {key: content} if role == "call" else {name: message[name] for name in _CALLS if name in extras}
    calls = [call for name, value in named.items() for call in calls_of(value, f'message {turn}, key "{name}"')]
    for call in calls:
        call.turn, call.trained, call.code = turn, trained, _text(call.code, where)
    if calls and (role == "call" or (has_more and len(extras) == 1)):  # nothing but calls
        return role, [], trained, calls
    content = _parse_content("" if has_more else content, role, where)
    if role in ("user", "system"):
        return role, content, True, []
    thoughts = {_text(message[name], f'message {turn}, key "{name}"').strip() for name in _REASONING if name in extras}
    is_text, parts = isinstance(content, str), as_parts(content, trained)
    if not (is_text or trained) and message.get("trained") is not False:  # in other forms parts follow their message
        parts = [{**part, "trained": False} for part in parts]
    if parts and parts[0]["type"] == "text":
        thought, text = _split_reasoning(parts[0]["text"])
        thoughts.add(thought)
        parts = [{**parts[0], "text": text}, *parts[1:]] if text or not thought else parts[1:]
    thoughts.discard("")
    if len(thoughts) > 1:
        raise ConversationError(f"message {turn}: reasoning given twice, and not the same; leave one of them out")
    for thought in thoughts:
        thinking: Part = {"type": "reasoning", "text": thought}
        parts = [thinking if trained else {**thinking, "trained": False}, *parts]
    if reasoning != "keep" and (found := [part for part in parts if part["type"] == "reasoning"]):
        if reasoning == "error":
            raise ConversationError(f'message {turn}: has reasoning, but the recipe says reasoning = "error"')
        counts["reasoning_dropped"] = counts.get("reasoning_dropped", 0) + len(found)
        parts = [part for part in parts if part["type"] != "reasoning"]
    if is_text and not calls and (not parts or parts[0]["type"] == "text"):
        return role, parts[0]["text"] if parts else "", trained, []
    return role, parts, trained, calls


def _is_trained(message: dict[str, Any], extras: list[str], role: str, turn: int) -> bool:
    trained = True
    for key in filter(_TRAINED.__contains__, extras):
        value = message[key]
        if value not in (0, 1) or (key != "weight" and not isinstance(value, bool)):
            valid = "0 or 1" if key == "weight" else "true or false"
            raise ConversationError(f'message {turn}, key "{key}": must be {valid}, not {value!r}')
        if value and role not in ("assistant", "call"):
            raise ConversationError(f'message {turn}, key "{key}": only what the assistant says is trained on')
        trained = trained and bool(value)
    return trained


def _text(value: Any, where: str, valid: str = "a string") -> str:
    if not isinstance(value, str):
        raise ConversationError(f"{where}: must be {valid}, not {kind_of(value)}")
    return value if value.isascii() else check_surrogates(value, where)


def _split_reasoning(text: str) -> tuple[str, str]:
    """The closed <think> at the start of an answer, if any, and the text after it; empty ones are nothing."""
    thought = ""
    while not thought and (rest := text.lstrip()).startswith("<think>"):
        inner, closed, rest = rest.removeprefix("<think>").partition("</think>")
        if not closed:
            break
        thought, text = inner.strip(), rest.lstrip(" \t\r").lstrip("\r\n")
    return thought, text


def _parse_content(content: Any, role: str, where: str) -> str | list[Part]:
    if not isinstance(content, list):
        return _text(content, where, "a string or a list of parts")
    parts = [_parse_part(part, where, i) for i, part in enumerate(content)]
    if role == "assistant":
        return parts
    for i, part in enumerate(parts):
        if part["type"] != "text":
            raise ConversationError(f"{where}, part {i}: only the assistant has {part['type']} parts, not the {role}")
    return "".join([part["text"] for part in parts])


def _parse_part(part: Any, where: str, i: int) -> Part:
    where = f"{where}, part {i}"
    if isinstance(part, dict) and (kind := part.get("type", "text")) not in PART_TYPES:
        why = ": only text is trained on" if kind in MEDIA else nearest(str(kind), PART_TYPES)
        raise ConversationError(f"{where}: unknown part type {kind!r}{why}")
    if not isinstance(part, dict) or "type" not in part or "text" not in part:
        raise ConversationError(f'{where}: must be an object with "type" and "text"')
    for key, value in part.items():
        if key not in ("type", "text") and value not in EMPTY and not (key == "trained" and isinstance(value, bool)):
            raise ConversationError(f'{where}, key "{key}": not understood; a part has only type and text')
    read: Part = {"type": part["type"], "text": _text(part["text"], f'{where}, key "text"')}
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
