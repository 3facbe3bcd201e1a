"""The chat template of a tokenizer folder renders tools, reasoning and flags to our ids and mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from common_form import conversations
from hypothesis import given, settings

from chatdata.conversation import parse_conversation
from chatdata.render.specification import render_conversation, render_for_completion
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

USER = {"role": "user", "content": "Sky?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_sky",
            "description": "Sky of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "days": {"type": ["integer", "null"], "default": 1},
                    "unit": {"enum": ["C", "it's", 3]},
                    "x-y": {"type": "array", "items": {"type": "string"}},
                    "city": {"type": "string", "description": "its English\nname"},
                    "any": {"anyOf": [{"type": "object"}, {"type": "boolean"}], "description": "what"},
                    "free": {},
                },
                "required": ["city"],
            },
        },
    },
    {"name": "a-b", "parameters": {"n": {"type": "int"}, "m": {"type": "List[int], optional"}, "k": {"default": "x"}}},
    {"name": "ping", "description": "Answers."},
]


def call(name: str, arguments: Any, id: str | None = None) -> dict[str, Any]:
    return {**({"id": id} if id else {}), "type": "function", "function": {"name": name, "arguments": arguments}}


def says(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def result(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


PARTS = [
    {"type": "reasoning", "text": "Look."},
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "sky()", "trained": False},
    {"type": "python_output", "text": "grey"},
    {"type": "text", "text": "grey.", "trained": False},
]
RECORDS: dict[str, dict[str, Any]] = {
    "tools without a system text": {"messages": [USER], "tools": TOOLS},
    "tools, system and developer": {
        "messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, USER, says("Grey")],
        "tools": TOOLS[2:],
    },
    "parallel calls, results in another order": {
        "messages": [
            USER,
            says(
                "Look:",
                tool_calls=[call("f", {"a": 1}, "x"), call("a.b", {"x-y": None, "class": [True], "c.d": 1}, "y")],
            ),
            result("two", tool_call_id="y"),
            result({"é": 1}, tool_call_id="x"),
            says("Done."),
            USER,
        ]
    },
    "calls without ids": {
        "messages": [
            USER,
            says(None, tool_calls=[call("f", {}), call("a-b", {"q": "it's\n"})]),
            result("1"),
            result("2"),
        ]
    },
    "calls that have no results": {"messages": [USER, says("", tool_calls=[call("f", {}, "x")])]},
    "the older form": {
        "messages": [
            USER,
            says(None, function_call={"name": "python", "arguments": {"code": "1+1"}}),
            {"role": "function", "name": "python", "content": "2"},
            says("<think>\nok </think>\n\n2"),
        ]
    },
    "rounds of calls": {
        "messages": [
            USER,
            says("a", tool_calls=[call("f", {})], reasoning_content=" why\n"),
            result([{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]),
            says("b", tool_calls=[call("g", {})], weight=0),
            result("3"),
            says("c", train=False),
        ]
    },
    "a result behind a text": {
        "messages": [USER, says("<tool_call>f</tool_call>"), result("1"), result("2"), says("c")]
    },
    "reasoning": {"messages": [USER, says("Grey", reasoning="Look."), USER, says("<think>a</think><think>b</think>c")]},
    "empty and unclosed reasoning": {
        "messages": [USER, says(" <think>\n</think> <think>b</think> \n c"), USER, says("<think>c", thinking="")]
    },
    "not trained": {"messages": [USER, says("Grey", train=False), USER, says("Blue", weight=1)]},
    "parts": {"messages": [USER, says(PARTS), USER, says(PARTS[1:4], trained=False), USER, says("x", trained=False)]},
}


@pytest.fixture(scope="module")
def auto(byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(byte_tokenizer, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def rendered(auto: Any, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    found = auto.apply_chat_template(
        record["messages"], tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("name", RECORDS)
def test_ids_and_mask_are_ours(auto: Any, byte_tokenizer: Tokenizer, name: str) -> None:
    record = RECORDS[name]
    ours = render_conversation(byte_tokenizer, record)
    ids, mask = rendered(auto, record)
    assert auto.decode(ids) == byte_tokenizer.decode(ours.tokens.tolist())
    assert (ids, mask) == (ours.tokens.tolist(), ours.mask.tolist())
    assert rendered(auto, parse_conversation(record)) == (ids, mask)


def test_a_prompt_after_a_result_continues_the_message(auto: Any, byte_tokenizer: Tokenizer) -> None:
    messages = RECORDS["calls without ids"]["messages"]
    prompt = auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == render_conversation(byte_tokenizer, messages).tokens.tolist()[:-1]
    prompt = auto.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == render_for_completion(byte_tokenizer, messages[:2])


@given(conversations())
@settings(max_examples=100, deadline=None)
def test_any_conversation_in_the_common_form(
    auto: Any, byte_tokenizer: Tokenizer, conversation: dict[str, Any]
) -> None:
    ours = render_conversation(byte_tokenizer, conversation)
    ids, _ = rendered(auto, conversation)
    if "<|" not in str(conversation):  # a template cannot keep a special token's text apart from the token
        assert ids == ours.tokens.tolist()


def test_what_a_template_refuses(auto: Any) -> None:
    for messages, error in [
        ([USER, says(None, tool_calls=[call("f", '{"a": 1}')])], "arguments of f must be an object, not a string"),
        ([USER, USER], "a message of user cannot come here"),
        ([says("a")], "a message of assistant cannot come here"),
        ([USER, says([{"type": "image", "text": ""}])], "unknown part type image"),
    ]:
        with pytest.raises(jinja2.exceptions.TemplateError, match=error):
            auto.apply_chat_template(messages)


def test_padding_is_known_by_position(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The pad token ends documents, too: a collator that goes by the id takes their ends for padding."""
    save_tokenizer(byte_tokenizer, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|assistant_end|>"
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[1, 0, 0], [1, 1, 1]]
    chats = [[USER, says("Red.")], [USER, says("A long story.")]]
    documents = [render_conversation(byte_tokenizer, {"messages": chat}) for chat in chats]
    rows = [{"input_ids": document.tokens.tolist()} for document in documents]
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    end, lengths = tokenizer.pad_token_id, [len(document) for document in documents]
    by_position = transformers.DataCollatorForSeq2Seq(tokenizer)(labelled)
    by_id = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    for row, length in enumerate(lengths):
        assert by_position["labels"][row, length - 1] == end and (by_position["labels"][row, length:] == -100).all()
        assert by_id["labels"][row, length - 1] == -100
    assert end not in by_id["labels"]
