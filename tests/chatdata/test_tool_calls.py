"""Calls, results and signatures as text, and the odd ones that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from chatdata.errors import ConversationError
from chatdata.tool_calls import calls_of, output_of, signatures, tools_of


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("get_weather", {"city": "Paris", "days": 2}, "get_weather(city='Paris', days=2)"),
        ("get_weather", '{"city": "Paris", "days": 2}', "get_weather(city='Paris', days=2)"),
        ("f", None, "f()"),
        ("f", "", "f()"),
        ("f", {"a": None, "b": [True, 1.5, {"c": "it's"}]}, "f(a=None, b=[True, 1.5, {'c': \"it's\"}])"),
        ("f", {"x-y": 1, "class": 2, "z": 3, "é": 4, "a.b": 5}, None),
        ("a-b", {}, "call('a-b')"),
        ("a.b", {"c": 1}, "a.b(c=1)"),
        ("a.class", {"c": 1}, "call('a.class', c=1)"),
        ("python", {"code": "1+1\n"}, "1+1\n"),
        ("calculator", {"a": 1}, "calculator(a=1)"),
        ("code_interpreter", {"code": "1", "timeout": 2}, "code_interpreter(code='1', timeout=2)"),
    ],
)
def test_calls(name: str, arguments: Any, code: str | None) -> None:
    (call,) = calls_of({"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}, "here")
    assert call.code == (code or "f(**{'x-y': 1}, **{'class': 2}, z=3, **{'é': 4}, **{'a.b': 5})")
    assert calls_of([{"name": name, "arguments": arguments}], "here")[0].code == call.code


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "f", "arguments": "[1]"}, "here, arguments of f: must be a JSON object, not a list"),
        ({"name": "f", "arguments": "{"}, "here, arguments of f: not valid JSON: Expecting property name"),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, 'here, arguments of f: not valid JSON: key "a" twice'),
        (
            {"name": "f", "arguments": '{"a": NaN}'},
            "here: an argument must be JSON, with numbers of at most 308 digits",
        ),
        ({"name": "f", "arguments": {"a": [10**400]}}, "here: an argument must be JSON, with numbers of at most"),
        (
            {"name": "f", "parameters": {"a": 1}},
            'here: key "parameters" not understood; a call has a name and arguments',
        ),
        ({"name": ""}, "here: must be an object with the name of a function"),
        ("f()", "here: not valid JSON"),
    ],
)
def test_calls_that_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConversationError) as caught:
        calls_of(call, "here")
    assert str(caught.value).startswith(message)


def test_results() -> None:
    text = {"type": "text", "text": "a"}
    for content, shown in [
        ("a\n", "a\n"),
        ([text, text], "aa"),
        ([text, "b"], '[{"type": "text", "text": "a"}, "b"]'),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        ([{"type": "file", "name": "a"}], '[{"type": "file", "name": "a"}]'),
        (None, "null"),
        ([], "[]"),
    ]:
        assert output_of(content, "here") == shown
    for content, message in [
        ([text, {"type": "image_url", "image_url": {}}], "here: image_url in a tool's result, but only text"),
        ({"a": float("nan")}, "here: a tool's result must be text or JSON"),
        (b"a", "here: a tool's result must be text or JSON"),
    ]:
        with pytest.raises(ConversationError, match=message):
            output_of(content, "here")


def test_signatures_that_are_refused() -> None:
    for tools, message in [
        ("no", 'key "tools": not valid JSON'),
        ({"name": "f"}, 'key "tools": must be a list of tools or JSON of one'),
        ([{"title": "f"}], 'key "tools", tool 0: must be an object with the name of a function'),
        ([{"name": "f"}, {"name": "g", "parameters": [1]}], 'tool 1, key "parameters": must be an object, not a list'),
    ]:
        with pytest.raises(ConversationError, match=message):
            signatures(tools_of(tools))
    assert signatures(tools_of([{"name": "f", "strict": True}, '{"name": "g", "parameters": {}}'])) == "f()\n\ng()"
