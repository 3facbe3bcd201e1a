"""Conversations as other chat formats take them: tool calls with arguments, results and reasoning of their own."""

import ast
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from chatdata.conversation import Conversation
from chatdata.render.format import OUTPUT, PART_ROLES, TEXT, USER

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
_ORDER = ("reasoning", "text", "python", "python_output")  # of parts within a message


class Piece(NamedTuple):
    """A part of a message as it is looked for among the message's tokens: of a call, its name."""

    role: int
    text: str
    trained: bool


def to_messages(conversation: Conversation) -> tuple[Messages, list[list[Piece]]]:
    """The messages that renderers and templates take, and the pieces of each.

    An assistant message with parts becomes several: one up to each call, and one of role `tool` for each result.
    """
    messages: Messages = []
    pieces: list[list[Piece]] = []
    for message in conversation["messages"]:
        content, trained = message["content"], message.get("trained", True)
        if isinstance(content, str):
            messages.append({"role": message["role"], "content": content})
            pieces.append([Piece(TEXT, content, trained) if message["role"] == "assistant" else Piece(USER, "", False)])
            continue
        calls: list[dict[str, Any]] = []  # without their results yet
        for turn in _turns(content):
            texts = {kind: [part["text"] for part in turn if part["type"] == kind] for kind in _ORDER}
            if texts["python_output"]:
                named = {"tool_call_id": calls[0]["id"], "name": calls[0]["function"]["name"]} if calls else {}
                messages.append({"role": "tool", "content": texts["python_output"][0], **named})
                pieces.append([Piece(OUTPUT, "", False)])
                calls = calls[1:]
                continue
            calls = [_call(text, f"call{len(messages):03d}{i:02d}") for i, text in enumerate(texts["python"])]
            said: dict[str, Any] = {"role": "assistant", "content": "".join(texts["text"])}
            said |= {"reasoning_content": texts["reasoning"][0]} if texts["reasoning"] else {}
            messages.append(said | ({"tool_calls": calls} if calls else {}))
            sought = [part["text"] for part in turn[: len(turn) - len(calls)]]
            sought += [call["function"]["name"] for call in calls]
            roles = [(PART_ROLES[part["type"]], part.get("trained", True)) for part in turn]
            found = [Piece(role, text, is_trained) for (role, is_trained), text in zip(roles, sought, strict=True)]
            end = found[-1].trained if found else trained
            pieces.append([piece for piece in found if piece.text.strip()] or [Piece(TEXT, "", end)])
    return messages, pieces


def _turns(parts: list[Any]) -> Iterator[list[Any]]:
    """Parts that make one message: reasoning, then texts, then calls; or one result."""
    turn: list[Any] = []
    for part in parts:
        place = _ORDER.index(part["type"])
        if turn and (place in (0, 3) or place < _ORDER.index(turn[-1]["type"])):
            yield turn
            turn = []
        turn.append(part)
    yield turn


def _call(text: str, call_id: str) -> dict[str, Any]:
    """The tool call of a part `python`: a Python call with literal arguments by name is one of that tool, as
    conversation.py wrote it; all else is a program for the tool `python`."""
    try:
        name, arguments = _parse_call(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        name, arguments = "python", {"code": text}
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _parse_call(text: str) -> tuple[str, dict[str, Any]]:
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        raise ValueError("no call by name")
    name, positional = ast.unparse(call.func), [ast.literal_eval(node) for node in call.args]
    if name == "call" and len(positional) == 1:  # call('get-weather', …): no name in Python
        name, positional = positional[0], []
    if positional or not isinstance(name, str):
        raise ValueError("arguments without a name")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        value = ast.literal_eval(keyword.value)
        arguments |= {keyword.arg: value} if keyword.arg else value
    json.dumps(arguments)  # sets, bytes and complex numbers are no arguments
    return name, arguments
