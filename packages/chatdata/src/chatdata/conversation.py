"""Conversations: the common form, and every form accepted from files.

The common form is plain data:

    {"messages": [{"role": "system",    "content": "Be brief."},          # optional, first only
                  {"role": "user",      "content": "How much is 2+3?"},
                  {"role": "assistant", "content": [{"type": "reasoning", "text": "Add them."},
                                                    {"type": "text", "text": "It is "},
                                                    {"type": "python", "text": "2+3"},
                                                    {"type": "python_output", "text": "5"}]}],
     "counts": {"merged": 1}}                                             # what reading changed, if anything

With `"trained": False` a part is not trained, nor is the end of an assistant message, and its text if that is a string.
`parse_conversation` turns every accepted form into this one and refuses all others (table in docs/conversations.md).
"""

from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from chatdata.errors import ConversationError
from chatdata.messages import Part, Reasoning, as_parts, check_surrogates, read_message
from chatdata.records import METADATA_KEYS, REFUSED_KEYS, messages_of
from chatdata.tool_calls import Call, signatures

__all__ = ["METADATA_KEYS", "REFUSED_KEYS", "Part", "Reasoning", "check_surrogates", "parse_conversation"]
Consecutive = Literal["error", "merge"]
Invalid = Literal["error", "drop"]


class Reading(NamedTuple):
    """How a recipe entry wants its rows read (docs/recipes.md has the keys)."""

    ignore: tuple[str, ...] = ()  # keys of a row that are left out
    columns: tuple[tuple[str, str], ...] = ()  # (our name, the row's)
    reasoning: Reasoning = "keep"
    consecutive: Consecutive = "error"  # neighbouring messages of one role
    invalid: Invalid = "error"  # rows that cannot be used
    tools: Literal["signatures", "given"] = "signatures"  # in the system text, or apart, for a format that lists them


AS_WRITTEN = Reading()


class Message(TypedDict):
    """`trained` is for assistant_end and for string content; parts have their own."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    trained: NotRequired[Literal[False]]


class Conversation(TypedDict):
    """`counts`: what reading changed, by name, if anything. `tools`: if Reading.tools is "given", and there are any."""

    messages: list[Message]
    counts: NotRequired[dict[str, int]]
    tools: NotRequired[list[dict[str, Any]]]


def parse_conversation(record: Any, reading: Reading = AS_WRITTEN) -> Conversation:
    """The common form of `record`, a list of messages or an object in one of the forms of docs/conversations.md.

    `record` is not modified; the result shares strings with it but no containers. User and system content given as a
    list of text parts is joined with "".

    Raises ConversationError naming the message (counted from 0) and the key.
    """
    try:
        return _parse(record, reading)
    except RecursionError:
        raise ConversationError("nested too deeply to be read") from None


def _parse(record: Any, reading: Reading) -> Conversation:
    raw, system, tools = messages_of(record, reading.columns)
    listed = signatures(tools) if reading.tools == "signatures" else ""
    leading = [system] if system else []
    messages: list[Message] = []
    counts: dict[str, int] = {}
    calls: list[Call] = []  # of the last assistant message, not yet among its parts
    before = ""  # role of the message before, if it is not the system's
    for turn, message in enumerate(raw):
        role, content, trained, new_calls = read_message(message, turn, reading.reasoning, counts)
        if role == "system" and not before and not system:
            leading.append(content)
            continue
        is_neighbour = role == before and role != "tool"
        if (
            role == "system"
            or (not before and role != "user")
            or (role == "tool" and before == "user")
            or (is_neighbour and reading.consecutive == "error")
        ):
            raise _misplaced(turn, role, before, system if role == "system" else "")
        if not before and (leading or listed):
            text = "\n\n".join([*leading, listed] if listed else leading)
            messages.append({"role": "system", "content": check_surrogates(text, "system text")})
        if is_neighbour:
            counts["merged"] = counts.get("merged", 0) + 1
        if role == "user":
            if before == "user":
                messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content}"
            else:
                _place(calls, messages, turn)
                messages.append({"role": "user", "content": content})
        elif role == "tool":
            if calls:
                _answer(calls, content, message, turn)
            else:
                counts["results_after_text"] = counts.get("results_after_text", 0) + 1
                _parts_of(messages[-1]).append({"type": "python_output", "text": content})
            messages[-1]["trained"] = False
        else:
            if before == "user":
                messages.append({"role": "assistant", "content": content})
            else:
                if content or before == "tool":  # else more calls at once
                    _place(calls, messages, turn)
                parts, more = _parts_of(messages[-1]), as_parts(content, trained)
                if role == before and parts and more and parts[-1]["type"] == more[0]["type"] == "text":
                    more[0]["text"] = "\n\n" + more[0]["text"]
                    if parts[-1].get("trained") == more[0].get("trained"):
                        parts[-1]["text"] += more.pop(0)["text"]
                parts += more
            messages[-1].pop("trained", None)
            if not trained:
                messages[-1]["trained"] = False
            calls += new_calls
        before = "assistant" if role == "call" else role
    if not before:
        raise ConversationError(f"message {len(raw) - 1}: a system message must be followed by a user message")
    _place(calls, messages, None)
    found: Conversation = {"messages": messages}
    if counts:
        found["counts"] = counts
    if tools and not listed:
        found["tools"] = tools
    return found


def _misplaced(turn: int, role: str, before: str, system: str = "") -> ConversationError:
    want = "assistant" if before == "user" else "user"
    why = f"{role} where {want} must come; after an optional system message roles alternate user, assistant, "
    why += "starting with user"
    if role == before:
        why += '; consecutive = "merge" in the recipe joins them'
    if role == "tool":
        why = "the result of a tool must come after an assistant message"
    if system:
        why = "a second system text, after the one next to the messages"
    return ConversationError(f'message {turn}, key "role": {why}')


def _parts_of(message: Message) -> list[Part]:
    """The parts of an assistant message; a text becomes its only part."""
    message["content"] = parts = as_parts(message["content"], message.get("trained", True))
    return parts


def _place(calls: list[Call], messages: list[Message], turn: int | None) -> None:
    """Put calls, each with its result, at the end of the last message. `turn`: of the message after it, if any."""
    missing = None
    for call in calls:
        missing = missing or (call if call.output is None else None)
        if missing and (turn is not None or call.output is not None):
            raise ConversationError(
                f'message {call.turn}: the call of "{missing.name}" has no result; only the last calls may lack theirs'
            )
        part: Part = {"type": "python", "text": call.code}
        _parts_of(messages[-1]).append(part if call.trained else {**part, "trained": False})
        if call.output is not None:
            _parts_of(messages[-1]).append({"type": "python_output", "text": call.output})
    calls.clear()


def _answer(calls: list[Call], output: str, message: dict[str, Any], turn: int) -> None:
    """Give the result in `message` to its call: the one with its id, without ids the first that has none yet."""
    name, wanted = message.get("name"), message.get("tool_call_id")
    by_id = wanted and any(call.id for call in calls)
    call = next((call for call in calls if call.output is None and (not by_id or call.id == wanted)), None)
    if call is None:
        why = f"no call before it has the id {wanted!r}" if by_id else "a result without a call"
        raise ConversationError(f"message {turn}: {why}")
    if name and name != call.name:
        raise ConversationError(f'message {turn}, key "name": {name!r}, but the call is of {call.name!r}')
    call.output = output
