"""From the common form to messages with calls, results and reasoning of their own."""

from __future__ import annotations

from typing import Any

import pytest
from common_form import conversations
from hypothesis import given

from chatdata.render.format import OUTPUT, PYTHON, REASONING, TEXT, USER
from chatdata.render.messages import to_messages


def calls_of(text: str) -> list[tuple[str, Any]]:
    parts = [{"type": "python", "text": text}]
    messages, _ = to_messages({"messages": [{"role": "assistant", "content": parts}]})
    return [(call["function"]["name"], call["function"]["arguments"]) for call in messages[0]["tool_calls"]]


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("get_weather(city='Paris', days=-2)", ("get_weather", {"city": "Paris", "days": -2})),
        ("a.b(x=[1, {'y': None}], z=True)", ("a.b", {"x": [1, {"y": None}], "z": True})),
        ("f(a=1, **{'x-y': 2.5}, b=3)", ("f", {"a": 1, "x-y": 2.5, "b": 3})),
        ("call('get-weather', city='Paris')", ("get-weather", {"city": "Paris"})),
        ("now()", ("now", {})),
        ("2+3", ("python", {"code": "2+3"})),
        ("'strawberry'.count('r')", ("python", {"code": "'strawberry'.count('r')"})),
        ("print('x')", ("python", {"code": "print('x')"})),
        ("f(x=y)", ("python", {"code": "f(x=y)"})),
        ("f(x={1, 2})", ("python", {"code": "f(x={1, 2})"})),
        ("import os\nprint(1)", ("python", {"code": "import os\nprint(1)"})),
    ],
)
def test_calls_are_read_back(text: str, call: tuple[str, Any]) -> None:
    assert calls_of(text) == [call]


def test_an_assistant_message_with_results_becomes_several() -> None:
    parts = [
        {"type": "reasoning", "text": "look it up"},
        {"type": "text", "text": "One moment."},
        {"type": "python", "text": "f(x=1)"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "It is 2.", "trained": False},
    ]
    messages, pieces = to_messages(
        {"messages": [{"role": "user", "content": "x?"}, {"role": "assistant", "content": parts, "trained": False}]}
    )
    function = {"name": "f", "arguments": {"x": 1}}
    calls = [{"id": "call00100", "type": "function", "function": function}]
    said = {"role": "assistant", "content": "One moment.", "reasoning_content": "look it up", "tool_calls": calls}
    assert messages == [
        {"role": "user", "content": "x?"},
        said,
        {"role": "tool", "content": "2", "tool_call_id": "call00100", "name": "f"},
        {"role": "assistant", "content": "It is 2."},
    ]
    assert pieces == [
        [(USER, "", False)],
        [(REASONING, "look it up", True), (TEXT, "One moment.", True), (PYTHON, "f", True)],
        [(OUTPUT, "", False)],
        [(TEXT, "It is 2.", False)],
    ]


def test_calls_without_results_are_one_message() -> None:
    parts = [{"type": "python", "text": "f()"}, {"type": "python", "text": "g()"}]
    messages, _ = to_messages({"messages": [{"role": "assistant", "content": parts}]})
    assert len(messages) == 1
    assert [call["function"]["name"] for call in messages[0]["tool_calls"]] == ["f", "g"]


def test_an_empty_message_keeps_its_flag() -> None:
    assert to_messages({"messages": [{"role": "assistant", "content": "", "trained": False}]}) == (
        [{"role": "assistant", "content": ""}],
        [[(TEXT, "", False)]],
    )


@given(conversations())
def test_every_part_is_in_some_message(conversation: Any) -> None:
    messages, pieces = to_messages(conversation)
    assert len(messages) == len(pieces)
    given_texts = [
        part["text"]
        for message in conversation["messages"]
        for part in (
            [message | {"text": message["content"]}] if isinstance(message["content"], str) else message["content"]
        )
        if part.get("type") != "python"
    ]
    written = [message["content"] + message.get("reasoning_content", "") for message in messages]
    assert sorted("".join(given_texts)) == sorted("".join(written))
