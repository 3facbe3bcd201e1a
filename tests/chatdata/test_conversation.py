from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from common_form import conversations
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.conversation import METADATA_KEYS, REFUSED_KEYS, Reading, parse_conversation
from chatdata.errors import ConversationError
from chatdata.render.specification import render_conversation
from chatdata.tokenizer.bpe import Tokenizer

DOCS = Path(__file__).parents[2] / "docs"
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_accepted_forms_are_one() -> None:
    common = {"messages": HI}
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 7}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]], "source": "x"}
    nulls = {"messages": [{**HI[0], "tool_calls": None}, {**HI[1], "name": None}], "conversations": None}
    for record in (HI, common, sharegpt, parts, nulls):
        assert parse_conversation(record) == common


NO_MESSAGES = (
    'no messages: expected the key "messages" (or ShareGPT\'s "conversations"), or "prompt" and "completion"; '
    "columns in the recipe takes other names"
)
ALTERNATE = "after an optional system message roles alternate user, assistant, starting with user"
REFUSED: list[tuple[Any, str]] = [
    ("Hi", "a conversation is a list of messages or an object with messages, not a string"),
    ({}, NO_MESSAGES),
    ({"messages": []}, '"messages" is empty: a conversation needs at least one user message'),
    ({"messages": "Hi"}, '"messages" must be a list of messages, not a string'),
    (["Hi"], "message 0: must be an object with role and content, not a string"),
    ([{"role": "user"}], 'message 0: no key "content"'),
    ([{"content": "Hi"}], 'message 0: no key "role"'),
    ([{"from": "human"}], 'message 0: no key "value"'),
    (
        [{"role": "robot", "content": "x"}],
        "message 0, key \"role\": unknown role 'robot'; valid: system, developer, user, assistant, tool, function",
    ),
    (
        [{"from": "bot", "value": "x"}],
        "message 0, key \"from\": unknown role 'bot'; valid: system, human, user, gpt, assistant, function_call, "
        "observation, tool",
    ),
    ([{"role": "user", "content": 5}], 'message 0, key "content": must be a string or a list of parts, not a number'),
    ([{"role": "user", "content": None}], 'message 0, key "content": must be a string or a list of parts, not null'),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}],
        "message 0, key \"content\", part 0: unknown part type 'image_url': only text is trained on",
    ),
    (
        [HI[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}],
        "message 1, key \"content\", part 0: unknown part type 'image': only text is trained on",
    ),
    (
        [HI[0], {"role": "assistant", "content": [{"type": "pyton", "text": "x"}]}],
        'message 1, key "content", part 0: unknown part type \'pyton\'; did you mean "python"?',
    ),
    (
        [HI[0], {"role": "assistant", "content": [{"type": "text", "text": 5}]}],
        'message 1, key "content", part 0, key "text": must be a string, not a number',
    ),
    (
        [HI[0], {"role": "assistant", "content": [{"type": "text"}]}],
        'message 1, key "content", part 0: must be an object with "type" and "text"',
    ),
    (
        [{"role": "user", "content": [{"type": "python", "text": "1+1"}]}],
        'message 0, key "content", part 0: only the assistant has python parts, not the user',
    ),
    (
        [HI[0], {**HI[1], "tool_calls": [{"id": 1}]}],
        'message 1, key "tool_calls": must be an object with the name of a function',
    ),
    (
        [{**HI[0], "tool_calls": [{"id": 1}]}],
        'message 0, key "tool_calls": not understood in a message of role user; remove it if it is only metadata',
    ),
    (
        [HI[0], HI[0]],
        f'message 1, key "role": user where assistant must come; {ALTERNATE}; '
        'consecutive = "merge" in the recipe joins them',
    ),
    ([HI[1]], f'message 0, key "role": assistant where user must come; {ALTERNATE}'),
    ([*HI, {"role": "system", "content": "x"}], f'message 2, key "role": system where user must come; {ALTERNATE}'),
    ([{"role": "system", "content": "x"}], "message 0: a system message must be followed by a user message"),
    (
        json.loads('[{"role": "user", "content": "a\\ud800"}]'),
        'message 0, key "content": lone surrogate U+D800 at character 1; not valid Unicode text',
    ),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_refused(record: Any, message: str) -> None:
    with pytest.raises(ConversationError) as caught:
        parse_conversation(record)
    assert str(caught.value) == message


def test_the_table_in_the_docs_is_true(byte_tokenizer: Tokenizer) -> None:
    """Each row of docs/conversations.md is a JSON record and what becomes of it."""
    table = (DOCS / "conversations.md").read_text().replace("\\|", "|")
    rows = re.findall(r"^\| [^`].* \| `(.+)` \| (refused: )?`(.+)`(, counted)? \|$", table, re.M)
    assert len(rows) == table.count("\n| ") - len(["the head"]) > 50
    for record, refused, shown, counted in rows:
        try:
            found = parse_conversation(json.loads(record))
            markup = render_conversation(byte_tokenizer, json.loads(record)).conversation_markup()
        except ConversationError as error:
            assert (refused, shown) == ("refused: ", str(error)), record
        else:
            assert ("", f"<|bos|>↵{shown}") == (refused, markup.replace("\n", "↵")), record
            assert bool(counted) == ("counts" in found), record


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ConversationError, match=r"message 0, key \"content\": lone surrogate U\+D800"):
        parse_conversation([{"role": "user", "content": "a\ud800"}])
    with pytest.raises(ConversationError, match=r"part 0, key \"text\": lone surrogate U\+DFFF"):
        parse_conversation([HI[0], {"role": "assistant", "content": [{"type": "python", "text": "\udfff"}]}])
    with pytest.raises(ConversationError, match='key "text": must be a string'):
        parse_conversation([HI[0], {"role": "assistant", "content": [{"type": "python", "text": b"1"}]}])


def test_content_is_never_left_out_in_silence() -> None:
    part = {"type": "text", "text": "Hello", "train": False}
    media = "belongs to the messages, but only text is trained on"
    better = "compares answers, but every answer here is trained on"
    for record, message in [
        ([HI[0], {"role": "assistant", "content": [part]}], 'part 0, key "train": not understood'),
        ({"messages": HI, "images": ["cat.png"]}, f'key "images" next to the messages: {media}'),
        ({"messages": HI, "label": False}, f'key "label" next to the messages: {better}'),
        ({"messages": HI, "kto_tag": 0}, f'key "kto_tag" next to the messages: {better}'),
        ({"chosen": HI, "rejected": HI}, f'key "chosen" next to the messages: {better}'),
        (
            {"messages": HI, "chat_template_kwargs": {"a": 1}},
            'key "chat_template_kwargs" next to the messages: changes',
        ),
        *(
            (
                {"messages": HI, key: value},
                f"key {json.dumps(key)} next to the messages would be left out; if that is right, "
                f"set ignore = [{json.dumps(key)}] in the recipe",
            )
            for key, value in [
                ("history", [["Hi", "Hello"]]),
                ("conversations", HI),
                ("notes", "x"),
                ('a"\x1b', {"b": 1}),
            ]
        ),
    ]:
        with pytest.raises(ConversationError, match=re.escape(message)):
            parse_conversation(record)


def test_metadata_next_to_the_messages_is_not_rendered() -> None:
    empty = {key: value for key in (*REFUSED_KEYS, "tools", "notes") for value in (None, "", [], {})}
    numbers = {"n": 3, "loss": 0.5, "flag": True, "none": None}
    documented = {key: ["anything", {"at": "all"}] for key in METADATA_KEYS}
    assert parse_conversation({"messages": HI, **empty, **numbers, **documented}) == {"messages": HI}
    assert not METADATA_KEYS & REFUSED_KEYS.keys()


def test_the_lists_of_keys_in_the_docs_are_the_codes() -> None:
    page = (DOCS / "conversations.md").read_text()
    metadata, refused = (
        set(re.findall(r"`(\w+)`", re.search(rf"{start}:\n\n(.+?)\n\n", page, re.DOTALL)[1]))
        for start in ("These keys are metadata", "These are refused")
    )
    assert (metadata, refused) == (METADATA_KEYS, set(REFUSED_KEYS))


@given(conversations())
@settings(max_examples=300, deadline=None)
def test_the_common_form_is_accepted_as_it_is(conversation: dict[str, Any]) -> None:
    found = parse_conversation(conversation)
    assert parse_conversation(found) == found
    if "<think>" not in json.dumps(conversation):
        assert found == conversation


ROLES = ["system", "developer", "user", "assistant", "tool", "function", "human", "gpt", "function_call", "observation"]
WORDS = [
    "",
    "a",
    "f",
    "<think>a</think>b",
    '{"name": "f"}',
    '[{"name": "f", "arguments": {"a": 1e999}}]',
    "[[",
    "\ud800",
]
KEYS = ["role", "content", "from", "value", "tool_calls", "tool_call_id", "name", "weight", "train", "thinking", "text"]
KEYS += [
    "messages",
    "conversations",
    "tools",
    "history",
    "prompt",
    "completion",
    "query",
    "answers",
    "instruction",
    "id",
]
KEYS += ["function", "arguments", "parameters", "properties", "type", "items", "required", "output", "input", "trained"]
ODD = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 0.5, float("nan"), b"a", *WORDS, *ROLES]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": ODD}, optional=dict.fromkeys(KEYS[2:], ODD))
    )
    | st.dictionaries(st.sampled_from(KEYS), ODD, max_size=5)
)
@settings(max_examples=400, deadline=None)
def test_what_is_refused_is_refused_in_one_line(record: Any) -> None:
    try:
        found = parse_conversation(record, Reading(consecutive="merge"))
    except ConversationError as error:
        assert len(str(error).splitlines()) == 1
        return
    again = parse_conversation({"messages": found["messages"]})
    assert again == {"messages": found["messages"]}
    json.dumps(found, ensure_ascii=False).encode()


def _calls(*names: str) -> dict[str, Any]:
    """An assistant message that calls functions; a name may be `f:id`."""
    named = [name.partition(":") for name in names]
    calls = [{"id": id or None, "function": {"name": name, "arguments": "{}"}} for name, _, id in named]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


@pytest.mark.parametrize(
    ("messages", "texts"),
    [
        ([_calls("f:1", "g:2"), _result("b", tool_call_id="2"), _result("a", tool_call_id="1")], "f() a g() b"),
        ([_calls("f", "g"), _result("a", tool_call_id="2"), _result("b")], "f() a g() b"),
        ([_calls("f:1", "g:1"), _result("a", tool_call_id="1"), _result("b", tool_call_id="1")], "f() a g() b"),
        ([_calls("f:1", "g:2"), _result("a", name="f")], "f() a g()"),
        ([_calls("f"), _result("a"), _calls("g")], "f() a g()"),
        ([{"from": "gpt", "value": "Look"}, {"from": "function_call", "value": '{"name": "f"}'}], "Look f()"),
        (
            [{"from": "function_call", "value": {"name": name}} for name in "fg"] + [_result("a"), _result("b")],
            "f() a g() b",
        ),
        ([HI[1], _result("a"), _result("b"), HI[1]], "Hello a b Hello"),
    ],
)
def test_each_call_is_followed_by_its_result(messages: list[Any], texts: str) -> None:
    found = parse_conversation([HI[0], *messages])["messages"]
    assert [message["role"] for message in found] == ["user", "assistant"]
    assert " ".join(part["text"] for part in found[1]["content"]) == texts


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([_calls("f"), HI[0]], 'message 1: the call of "f" has no result; only the last calls may lack theirs'),
        ([_calls("f"), _calls("g")], 'message 2, key "role": assistant where user must come'),
        ([_calls("f:1", "g:2"), _result("b", tool_call_id="2")], 'message 1: the call of "f" has no result'),
        ([_calls("f:1"), _result("b", tool_call_id="2")], "message 2: no call before it has the id '2'"),
        ([_calls("f"), _result("a"), _result("b")], "message 3: a result without a call"),
        ([_calls("f"), _result("a", name="g")], "message 2, key \"name\": 'g', but the call is of 'f'"),
        ([{"from": "function_call", "value": "f()"}], 'message 1, key "value": not valid JSON'),
        ([{"from": "function_call", "value": "[]"}], 'message 1, key "value": must be an object with the name of a'),
    ],
)
def test_calls_and_results_that_do_not_match(messages: list[Any], error: str) -> None:
    with pytest.raises(ConversationError, match=f"^{re.escape(error)}"):
        parse_conversation([HI[0], *messages])


def test_flags_of_a_merged_message() -> None:
    rounds = [HI[0], {**_calls("f"), "weight": 0}, _result("a"), {**_calls("g"), "train": True}, _result("b")]
    parts = [
        {"type": "python", "text": "f()", "trained": False},
        {"type": "python_output", "text": "a"},
        {"type": "python", "text": "g()"},
        {"type": "python_output", "text": "b"},
    ]
    assert parse_conversation(rounds)["messages"][1] == {"role": "assistant", "content": parts, "trained": False}
    end = {"type": "text", "text": "Hello"}
    assert parse_conversation([*rounds, HI[1]])["messages"][1] == {"role": "assistant", "content": [*parts, end]}
    untrained = {"role": "assistant", "content": [*parts, {**end, "trained": False}], "trained": False}
    assert parse_conversation([*rounds, {**HI[1], "training": False}])["messages"][1] == untrained


def test_an_empty_instruction_leaves_the_input() -> None:
    record = {"instruction": "", "input": "text", "output": "answer"}
    expected = [{"role": "user", "content": "text"}, {"role": "assistant", "content": "answer"}]
    assert parse_conversation(record) == {"messages": expected}
