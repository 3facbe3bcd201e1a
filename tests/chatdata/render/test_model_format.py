"""Other chat formats: ids as the families' templates give them, masks, spans, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_folders import QWEN_SPLIT, llama_folder, make_folder, qwen_folder, trl_template
from common_form import conversations
from hypothesis import given, settings

from chatdata.conversation import Reading, parse_conversation
from chatdata.document import SPAN_ROLES, Document
from chatdata.errors import BuildError, ConversationError, TokenizerError, UsageError
from chatdata.render.messages import to_messages
from chatdata.render.model_format import (
    ModelFormat,
    canary_conversations,
    check_canaries,
    load_format,
    render_in_format,
)
from chatdata.tokenizer.folder import read_folder

WEATHER = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Paris?"},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "text": "look"},
                {"type": "text", "text": "Wait."},
                {"type": "python", "text": "weather(city='Paris')"},
                {"type": "python_output", "text": "mild"},
                {"type": "text", "text": "Mild."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye"},
    ]
}


PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {
        "qwen3": qwen_folder(root / "qwen3", trl_template("qwen3")),
        "llama-3": llama_folder(root / "llama-3", trl_template("llama3_2")),
        "qwen3 training": qwen_folder(root / "qwen3t", trl_template("qwen3_training")),
        "llama-3 training": llama_folder(root / "llama3t", trl_template("llama3_training")),
    }


def format_of(folders: dict[str, Path], name: str) -> ModelFormat:
    return load_format(name if name in ("qwen3", "llama-3") else "template", read_folder(folders[name]))


def spans_of(document: Document) -> list[tuple[str, bool, str]]:
    decode = document.tokenizer.decode
    return [
        (SPAN_ROLES[s.role], s.trained, decode(document.tokens[s.start : s.start + s.length].tolist()))
        for s in document.spans
    ]


def test_qwen3_by_name(folders: dict[str, Path]) -> None:
    document, left_out = render_in_format(format_of(folders, "qwen3"), WEATHER)
    assert document.conversation_markup() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
        '⟦Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nmild\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Mild.<|im_end|>⟧\n"
        "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye<|im_end|>⟧"
    )
    assert left_out == {"reasoning_left_out": 1}  # of an earlier turn
    assert spans_of(document) == [
        ("user", False, "<|im_start|>system\nBe brief.<|im_end|>\n"),
        ("user", False, "<|im_start|>user\nParis?<|im_end|>\n"),
        ("text", True, "Wait."),
        ("python", True, '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'),
        ("output", False, "<|im_start|>user\n<tool_response>\nmild\n</tool_response><|im_end|>\n"),
        ("text", True, "Mild.<|im_end|>"),
        ("user", False, "<|im_start|>user\nThanks<|im_end|>\n"),
        ("text", True, "<think>\n\n</think>\n\nBye<|im_end|>"),
    ]


def test_llama_3_by_name(folders: dict[str, Path]) -> None:
    document, left_out = render_in_format(format_of(folders, "llama-3"), WEATHER)
    assert document.conversation_markup() == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nParis?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "weather", '
        '"parameters": {"city": "Paris"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"mild"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Mild.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye<|eot_id|>⟧"
    )
    assert left_out == {"reasoning_left_out": 1, "text_left_out": 1}


def test_template_keeps_reasoning_apart(folders: dict[str, Path]) -> None:
    document, left_out = render_in_format(format_of(folders, "qwen3 training"), WEATHER)
    assert not left_out
    assert spans_of(document)[1:4] == [
        ("reasoning", True, "<think>\nlook\n</think>\n\n"),
        ("text", True, "Wait."),
        ("python", True, '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'),
    ]


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "qwen3 training", "llama-3 training"])
def test_ids_are_those_of_apply_chat_template(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[name])
    num_refused = 0
    for conversation in [WEATHER, *canary_conversations()]:
        messages, _ = to_messages(conversation)
        try:
            document, _ = render_in_format(format_of(folders, name), conversation)
        except ConversationError:
            num_refused += 1  # llama3_training writes no calls
            continue
        expected = theirs.apply_chat_template(
            messages, tools=conversation.get("tools"), date_string="26 Jul 2024", return_dict=True
        )["input_ids"]
        assert document.tokens.tolist() == expected
    assert num_refused == (13 if name == "llama-3 training" else 0)


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "qwen3 training"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_next_to_the_messages_are_listed_as_the_template_does(
    folders: dict[str, Path], name: str, system: list[dict]
) -> None:
    from transformers import AutoTokenizer

    function = {"name": "track", "description": "Find <it>", "parameters": {"type": "object", "properties": {}}}
    messages = [*system, {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    record = {"messages": messages, "tools": json.dumps([function])}
    listed = [{"type": "function", "function": function}]
    parsed = parse_conversation(record, Reading(tools="given"))
    assert parsed == {"messages": messages, "tools": listed}
    document, _ = render_in_format(format_of(folders, name), parsed)
    theirs = AutoTokenizer.from_pretrained(folders[name])
    expected = theirs.apply_chat_template(messages, tools=listed, date_string="26 Jul 2024", return_dict=True)
    assert document.tokens.tolist() == expected["input_ids"] and "track" in document.text()
    answer = "".join(text for supervised, text in document.runs() if supervised)
    assert answer.startswith(("Here.", "<think>")) and "track" not in answer


@pytest.mark.parametrize("name", ["qwen3 training", "llama-3 training"])
def test_masks_are_those_of_trl(folders: dict[str, Path], name: str) -> None:
    """TRL's templates mark what is trained; Qwen's also train on the newline after the end of a message."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[name])
    newline = theirs.encode("\n", add_special_tokens=False)[0]
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    for conversation in canary_conversations():
        messages, _ = to_messages(conversation)
        if name == "llama-3 training" and any("tool_calls" in message for message in messages):
            continue
        document, _ = render_in_format(format_of(folders, name), conversation)
        marked = theirs.apply_chat_template(
            messages, tools=conversation.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        expected = np.array(marked["assistant_masks"])
        after_end = (document.tokens == newline) & (np.roll(document.tokens, 1) == end)
        expected[after_end] = 0
        assert document.mask.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "qwen3 training"])
@settings(deadline=None, max_examples=40)
@given(conversation=conversations())
def test_trained_spans_are_the_mask(folders: dict[str, Path], name: str, conversation: Any) -> None:
    try:
        document, _ = render_in_format(format_of(folders, name), conversation)
    except ConversationError as error:
        assert "\n" not in str(error)
        return
    covered, end = np.zeros(len(document), dtype=np.uint8), 0
    for span in document.spans:
        assert span.start >= end and span.length > 0
        end = span.start + span.length
        covered[span.start : end] = span.trained
    assert document.mask.tolist() == covered.tolist()


def test_an_untrained_message_has_mask_0(folders: dict[str, Path]) -> None:
    user = {"role": "user", "content": "Hi"}
    messages = [
        user,
        {"role": "assistant", "content": "Ha", "trained": False},
        user,
        {"role": "assistant", "content": "Ho"},
    ]
    for name in ("qwen3", "llama-3", "qwen3 training"):
        document, _ = render_in_format(format_of(folders, name), {"messages": messages})
        assert [(role, trained) for role, trained, _ in spans_of(document)] == [
            *(("user", False), ("text", False)),
            *(("user", False), ("text", True)),
        ]
        end = "<|eot_id|>" if name == "llama-3" else "<|im_end|>"
        trained = [text for is_trained, text in document.runs() if is_trained]
        assert len(trained) == 1 and trained[0].endswith(f"Ho{end}")


def test_a_text_that_spells_a_special_token_is_refused(folders: dict[str, Path]) -> None:
    for text in ("see <|im_end|>", "<|im_start|>system"):
        conversation = parse_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": text}])
        with pytest.raises(ConversationError, match=r"message 1: the text '<.im_.*' would become the special token"):
            render_in_format(format_of(folders, "qwen3"), conversation)


def test_what_a_format_cannot_hold_is_refused_in_one_line(folders: dict[str, Path]) -> None:
    parts = [{"type": "python", "text": "f()"}, {"type": "python", "text": "g()"}]
    two_calls: Any = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]}
    with pytest.raises(ConversationError, match=r"refuses it: Llama-3 .* single tool call"):
        render_in_format(format_of(folders, "llama-3"), two_calls)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
            "message 1: .* does not end it with a special token",
        ),
        (
            "{% for m in messages %}{{ m.content + '<|im_end|>' if loop.last else m.content }}{% endfor %}",
            "one way inside",
        ),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}<|im_end|>{% endfor %}", "message 0: .* as it is"),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.index0 %}<|im_end|>{% endif %}{% endfor %}",
            "across its edge",
        ),
        ("{{ raise_exception('no!') }}", "refuses it: no!"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(tmp_path: Path, template: str, message: str) -> None:
    model_format = load_format("template", read_folder(qwen_folder(tmp_path / "x", template)))
    user, assistant = {"role": "user", "content": "the wea"}, {"role": "assistant", "content": "ther"}
    conversation: Any = {"messages": [user, assistant, user, assistant]}
    if "across" in message:
        conversation = {"messages": [user, assistant]}
    with pytest.raises(ConversationError, match=message):
        render_in_format(model_format, conversation)


def test_today_is_a_fixed_day(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '\n\n' + m.content }}<|im_end|>{% endfor %}"
    model_format = load_format("template", read_folder(qwen_folder(tmp_path / "x", template)))
    document, _ = render_in_format(model_format, {"messages": WEATHER["messages"][-2:]})
    assert document.text() == "26 Jul 2024\n\nThanks<|im_end|>\n\nBye<|im_end|>"


def test_a_template_may_end_what_is_whole_in_its_own_way(folders: dict[str, Path], tmp_path: Path) -> None:
    """Phi 3's writes its eos token where no generation prompt is wanted."""
    folder = tmp_path / "phi"
    make_folder(folder, trl_template("phi3"), QWEN_SPLIT, PHI, [], {"eos_token": "<|endoftext|>"})
    model_format = load_format("template", read_folder(folder))
    document, _ = render_in_format(model_format, {"messages": WEATHER["messages"][-2:]})
    assert document.conversation_markup() == "<|user|>\nThanks<|end|>\n<|assistant|>\n⟦Bye<|end|>\n<|endoftext|>⟧"


def test_canaries_find_another_template(folders: dict[str, Path], tmp_path: Path) -> None:
    check_canaries(format_of(folders, "qwen3"))
    check_canaries(format_of(folders, "llama-3"))
    other = qwen_folder(tmp_path / "other", trl_template("qwen3").replace("<tool_call>\\n", "<tool_call>"))
    with pytest.raises(BuildError, match=r"write different tokens, .*use --chat-format template"):
        check_canaries(load_format("qwen3", read_folder(other)))
    with pytest.raises(
        BuildError, match=r"other: message 1: the chat template writes it in one way .*name the chat format$"
    ):
        check_canaries(load_format("template", read_folder(other)))


def test_a_template_without_a_generation_prompt(tmp_path: Path) -> None:
    """The role in front of an answer would be supervised; a template that begins with the answer has no such role."""
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    message = r"writes '<\|im_start\|>assistant\\n' in front of an answer, but not for add_generation_prompt"
    with pytest.raises(TokenizerError, match=message):
        load_format("template", read_folder(qwen_folder(tmp_path / "turn", turn)))
    plain = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    folder = read_folder(qwen_folder(tmp_path / "plain", plain))
    chat = [{"role": "user", "content": "a "}, {"role": "assistant", "content": "b"}]
    document, _ = render_in_format(load_format("template", folder), parse_conversation(chat))
    assert document.conversation_markup() == "a ⟦b<|im_end|>⟧"


def test_formats_by_other_names_are_refused(folders: dict[str, Path]) -> None:
    tokenizer = read_folder(folders["qwen3"])
    for name in ("qwen4", "auto", "default", "custom"):
        with pytest.raises(UsageError, match=r"Known: .*'qwen3'.*; or nanochat, or template"):
            load_format(name, tokenizer)
    with pytest.raises(TokenizerError, match=r"is no tokenizer for llama-3: .*begin_of_text"):
        load_format("llama-3", tokenizer)
