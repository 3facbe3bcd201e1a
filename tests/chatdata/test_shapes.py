"""The shapes that public chat datasets have, as small rows of our own: what they become, or why they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata.conversation import Reading, parse_conversation
from chatdata.errors import ConversationError
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "days": {"type": "integer", "default": 1},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "city": {"type": "string", "description": "its English\nname"},
        },
        "required": ["city"],
    },
}
SIGNATURE = (
    "# Weather of a city. city: its English name\nget_weather(city: str, days: int = 1, unit: Literal['C', 'F'] = None)"
)


def call(name: str, arguments: Any, id: str | None = None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def says(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def parts(*parts: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"type": kind, "text": text} for kind, text in parts]


PARALLEL = [
    ("python", "get_weather(city='Oslo')"),
    ("python_output", '{"sky": "grey"}'),
    ("python", "get_weather(city='Rome')"),
    ("python_output", '{"sky": "blue"}'),
    ("text", "Grey and blue."),
]
BECOME: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "Hermes function calling": (
        {
            "id": "a1",
            "conversations": [
                {"from": "system", "value": "You may call functions."},
                {"from": "human", "value": "Sky over Oslo?"},
                {"from": "gpt", "value": '<tool_call>\n{"name": "get_weather"}\n</tool_call>'},
                {"from": "tool", "value": "<tool_response>\ngrey\n</tool_response>"},
                {"from": "gpt", "value": "It is grey."},
            ],
            "tools": json.dumps([{"type": "function", "function": WEATHER}]),
            "category": "weather",
            "subcategory": "sky",
            "task": "Sky of a city",
        },
        [
            system(f"You may call functions.\n\n{SIGNATURE}"),
            user("Sky over Oslo?"),
            says(
                parts(
                    ("text", '<tool_call>\n{"name": "get_weather"}\n</tool_call>'),
                    ("python_output", "<tool_response>\ngrey\n</tool_response>"),
                    ("text", "It is grey."),
                )
            ),
        ],
    ),
    "glaive in ShareGPT form": (
        {
            "conversations": [
                {"from": "human", "value": "Sky over Oslo?"},
                {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": '{"sky": "grey"}'},
                {"from": "gpt", "value": "It is grey."},
            ],
            "tools": json.dumps([WEATHER]),
            "system": "Be brief.",
        },
        [
            system(f"Be brief.\n\n{SIGNATURE}"),
            user("Sky over Oslo?"),
            says(parts(*PARALLEL[:2], ("text", "It is grey."))),
        ],
    ),
    "xLAM": (
        {
            "id": 7,
            "query": "Sky over Oslo and Rome?",
            "tools": json.dumps(
                [
                    {
                        "name": "sky.over-city",
                        "description": "Sky of a city",
                        "parameters": {
                            "city": {"description": "its name", "type": "str"},
                            "days": {"description": "how many", "type": "int, optional"},
                            "type": {"description": "day or night", "type": "str", "default": "day"},
                        },
                    }
                ]
            ),
            "answers": '[{"name": "sky.over-city", "arguments": {"city": "Oslo"}}, {"name": "f", "arguments": {}}]',
        },
        [
            system(
                "# Sky of a city. city: its name; days: how many; type: day or night\n"
                "call('sky.over-city', city: str, days: int = None, type: str = 'day')"
            ),
            user("Sky over Oslo and Rome?"),
            says(parts(("python", "call('sky.over-city', city='Oslo')"), ("python", "f()"))),
        ],
    ),
    "ToolBench": (
        {
            "id": "Step 3: ask",
            "conversations": [
                {"from": "system", "value": "You can use tools."},
                {"from": "user", "value": "Sky over Oslo?"},
                {"from": "assistant", "value": "Thought: look\nAction: sky\nAction Input: {}"},
                {"from": "tool", "value": "grey"},
                {"from": "assistant", "value": "Action: Finish"},
            ],
        },
        [
            system("You can use tools."),
            user("Sky over Oslo?"),
            says(
                parts(
                    ("text", "Thought: look\nAction: sky\nAction Input: {}"),
                    ("python_output", "grey"),
                    ("text", "Action: Finish"),
                )
            ),
        ],
    ),
    "OpenAI fine-tuning with parallel calls": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                user("Sky over Oslo and Rome?"),
                says(
                    None,
                    tool_calls=[
                        call("get_weather", '{"city": "Oslo"}', "c1"),
                        call("get_weather", '{"city": "Rome"}', "c2"),
                    ],
                ),
                {"role": "tool", "tool_call_id": "c2", "content": '{"sky": "blue"}'},
                {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "grey"}'},
                says("Grey and blue."),
            ],
            "parallel_tool_calls": True,
        },
        [system("Be brief."), user("Sky over Oslo and Rome?"), says(parts(*PARALLEL))],
    ),
    "LLaMA-Factory tools": (
        {
            "conversations": [
                {"from": "human", "value": "Sky over Oslo and Rome?"},
                {
                    "from": "function_call",
                    "value": '[{"name": "get_weather", "arguments": {"city": "Oslo"}}, '
                    '{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}]',
                },
                {"from": "observation", "value": {"sky": "grey"}},
                {"from": "observation", "value": {"sky": "blue"}},
                {"from": "gpt", "value": "Grey and blue."},
            ],
            "tools": "",
        },
        [user("Sky over Oslo and Rome?"), says(parts(*PARALLEL))],
    ),
    "axolotl's train": (
        {
            "conversations": [
                {"from": "human", "value": "Hi", "train": False},
                {"from": "gpt", "value": "Hello", "train": False},
                {"from": "human", "value": "Bye", "train": None},
                {"from": "gpt", "value": "Bye", "train": True},
            ]
        },
        [user("Hi"), says("Hello", trained=False), user("Bye"), says("Bye")],
    ),
    "Alpaca with history": (
        {
            "instruction": "Now in French",
            "input": "Bye",
            "output": "Au revoir",
            "system": "Translate.",
            "history": [["Hi in French", "Salut"]],
        },
        [system("Translate."), user("Hi in French"), says("Salut"), user("Now in French\n\nBye"), says("Au revoir")],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"},
        [user("Who?\n\nAda wrote it."), says("Ada")],
    ),
    "UltraChat": (
        {"prompt": "Hi", "prompt_id": "0f", "messages": [user("Hi"), says("Hello")]},
        [user("Hi"), says("Hello")],
    ),
    "Tulu 3": ({"id": "p_1", "messages": [user("Hi"), says("Hello")], "source": "a/b"}, [user("Hi"), says("Hello")]),
    "SmolTalk2": (
        {
            "messages": [user("Hi"), says("<think>\nA greeting.\n</think>\nHello")],
            "chat_template_kwargs": {
                "custom_instructions": "",
                "enable_thinking": True,
                "python_tools": [],
                "xml_tools": [],
            },
            "source": "a",
        },
        [user("Hi"), says(parts(("reasoning", "A greeting."), ("text", "Hello")))],
    ),
    "OpenThoughts": (
        {
            "difficulty": 3,
            "source": "x",
            "domain": "maths",
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "gpt", "value": "<think>One and one.</think>\n\n2</think>"},
            ],
        },
        [user("1+1?"), says(parts(("reasoning", "One and one."), ("text", "2</think>")))],
    ),
    "OpenHermes with weights": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "Hi", "weight": 0},
                {"from": "gpt", "value": "Hello", "weight": 0.0},
                {"from": "human", "value": "Bye", "weight": None},
                {"from": "gpt", "value": "Bye", "weight": 1},
            ],
            "system_prompt": None,
        },
        [system("Be brief."), user("Hi"), says("Hello", trained=False), user("Bye"), says("Bye")],
    ),
    "gpt-oss style duplicates": (
        {
            "messages": [
                {"role": "system", "content": "Reason in English.", "thinking": None},
                {**user("1+1?"), "thinking": None},
                says("2", thinking="One and one."),
            ]
        },
        [system("Reason in English."), user("1+1?"), says(parts(("reasoning", "One and one."), ("text", "2")))],
    ),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, [user("Hi"), says("Hello")]),
    "prompt and completion as messages": (
        {"prompt": [user("Hi")], "completion": [says("Hello")]},
        [user("Hi"), says("Hello")],
    ),
    "question and answer": (
        {"question": "1+1?", "answer": "2", "id": "q1", "license": "MIT"},
        [user("1+1?"), says("2")],
    ),
    "answers": ({"query": "1+1?", "answers": ["2"]}, [user("1+1?"), says("2")]),
    "answers in brackets": ({"query": "1+1?", "answers": "[2]"}, [user("1+1?"), says("[2]")]),
    "empty texts": ([user(""), says("")], [user(""), says("")]),
    "null beside calls": (
        [user("Hi"), says(None, function_call={"name": "f", "arguments": None}), {"role": "function", "content": 5}],
        [user("Hi"), says(parts(("python", "f()"), ("python_output", "5")), trained=False)],
    ),
    "1,000 turns": ([user("Hi"), says("Hello")] * 500, [user("Hi"), says("Hello")] * 500),
}


@pytest.mark.parametrize("shape", BECOME)
def test_become(shape: str) -> None:
    record, messages = BECOME[shape]
    before = json.dumps(record)
    found = parse_conversation(record)
    assert found["messages"] == messages
    assert found.get("counts", {}) == ({"results_after_text": 1} if shape[:4] in ("Herm", "Tool") else {})
    assert json.dumps(record) == before
    assert parse_conversation({"messages": messages}) == {"messages": messages}


# these two have texts and objects under one key, for which Arrow has no type
@pytest.mark.parametrize(
    "shape", [shape for shape in BECOME if shape not in ("LLaMA-Factory tools", "null beside calls")]
)
def test_parquet_makes_no_difference(shape: str, tmp_path: Path) -> None:
    record, messages = BECOME[shape]
    table = pa.Table.from_pylist([record if isinstance(record, dict) else {"messages": record}])
    pq.write_table(table, tmp_path / "row.parquet")
    source = Source("row", load_tasks()["conversations"], (SourceFile(tmp_path / "row.parquet", "row.parquet"),))
    ((_, row),) = source.read(np.ones(1, dtype=bool))
    assert parse_conversation(row)["messages"] == messages


REFUSED: dict[str, tuple[Any, str]] = {
    "ChatML in a text": (
        {"text": "<|im_start|>user\nHi<|im_end|>"},
        'key "text": a conversation that a template has already rendered; give its messages',
    ),
    "preference pairs": (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        'key "chosen" next to the messages: compares answers, but every answer here is trained on',
    ),
    "multi-modal": (
        {"messages": [user("What is it?"), says("A cat")], "images": ["cat.png"]},
        'key "images" next to the messages: belongs to the messages, but only text is trained on',
    ),
    "multi-modal parts": (
        [user([{"type": "image_url", "image_url": {"url": "cat.png"}}])],
        "message 0, key \"content\", part 0: unknown part type 'image_url': only text is trained on",
    ),
    "OASST's trees": (
        {"message_tree_id": "t", "prompt": {"text": "Hi", "role": "prompter", "replies": []}},
        'key "message_tree_id": a tree of replies; write the path from its root to one leaf as messages',
    ),
    "OASST's messages": (
        {"message_id": "m", "parent_id": "t", "text": "Hi", "role": "prompter"},
        'key "parent_id": a tree of replies; write the path from its root to one leaf as messages',
    ),
    "glaive's one string": (
        {"system": "SYSTEM: Help.", "chat": "USER: Hi\n\nASSISTANT: Hello <|endoftext|>"},
        'key "chat": one string with a whole conversation; take the ShareGPT version of the dataset',
    ),
    "several answers": (
        {"query": "1+1?", "answers": ["2", "two"]},
        'message 1, key "tool_calls": must be an object with the name of a function',
    ),
    "null content": (
        [user("Hi"), says(None)],
        'message 1, key "content": must be a string or a list of parts, not null',
    ),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_refused(shape: str) -> None:
    record, message = REFUSED[shape]
    with pytest.raises(ConversationError) as caught:
        parse_conversation(record)
    assert str(caught.value) == message


def test_readings() -> None:
    merge = Reading(consecutive="merge")
    row = [user("a"), user("b"), says("<think>t</think>c"), says("d"), says(None, tool_calls=[call("f", {})])]
    assert parse_conversation(row, merge) == {
        "messages": [user("a\n\nb"), says(parts(("reasoning", "t"), ("text", "c\n\nd"), ("python", "f()")))],
        "counts": {"merged": 3},
    }
    assert parse_conversation(row[1:3], Reading(reasoning="drop")) == {
        "messages": [user("b"), says("c")],
        "counts": {"reasoning_dropped": 1},
    }
    with pytest.raises(ConversationError, match=r'^message 1: has reasoning, but the recipe says reasoning = "error"$'):
        parse_conversation(row[1:3], Reading(reasoning="error"))
    columns = Reading(columns=(("completion", "a"), ("prompt", "q")))
    assert parse_conversation({"q": "Hi", "a": "Hello"}, columns) == {"messages": [user("Hi"), says("Hello")]}
    with pytest.raises(ConversationError, match='columns reads another key as "prompt"; set ignore'):
        parse_conversation({"q": "Hi", "a": "Hello", "prompt": "x"}, columns)
