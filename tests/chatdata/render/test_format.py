"""The table of the chat format, what is derived from it, and the places that it cannot reach by import."""

from __future__ import annotations

import json
from pathlib import Path

from chatdata.document import LINE_ENDS, SPAN_ROLES
from chatdata.render.format import NANOCHAT, PART_ROLES, ChatFormat, SpanFormat
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from chatdata.tokenizer.files import save_tokenizer

SMALL = ChatFormat(
    bos="^",
    user=SpanFormat("<", ">", supervised=False, label="user"),
    assistant_start="[",
    text=SpanFormat("", "", supervised=True, label="text"),
    python=SpanFormat("{", "}", supervised=True, label="call"),
    output=SpanFormat("(", ")", supervised=False, label="result"),
    reasoning=SpanFormat("", "", supervised=True, label="reasoning"),
    assistant_end="]",
    padding="]",
)


def test_what_follows_from_a_table() -> None:
    assert SMALL.delimiters == {
        "^": False,
        "<": False,
        ">": False,
        "[": False,
        "]": True,
        "{": True,
        "}": True,
        "(": False,
        ")": False,
    }
    assert SMALL.followers == {
        "": {"^"},
        "^": {"<"},
        "<": {">"},
        ">": {"[", ""},
        "[": {"]", "{", "("},
        "]": {"<", ""},
        "{": {"}"},
        "}": {"]", "{", "("},
        "(": {")"},
        ")": {"]", "{", "("},
    }
    roles = {token: SPAN_ROLES[role] for token, role in SMALL.text_after.items()}
    assert roles == {"<": "user", "[": "text", "{": "python", "}": "text", "(": "output", ")": "text"}


def test_nanochat() -> None:
    assert tuple(NANOCHAT.delimiters) == SPECIAL_TOKENS
    supervised = [token for token, value in NANOCHAT.delimiters.items() if value]
    assert supervised == ["<|assistant_end|>", "<|python_start|>", "<|python_end|>"]
    assert [getattr(NANOCHAT, role) for role in SPAN_ROLES] == list(NANOCHAT.spans)
    assert [span.supervised for span in NANOCHAT.spans] == [False, True, True, False, True]
    assert NANOCHAT.padding == "<|assistant_end|>"


def test_lines_of_a_shown_document() -> None:
    assert (NANOCHAT.bos, NANOCHAT.user.closing, NANOCHAT.assistant_end) == LINE_ENDS


def test_the_chat_template_writes_the_same_delimiters(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """That it renders the same conversations is tested in tests/chatdata/tokenizer, with transformers."""
    chat = NANOCHAT
    save_tokenizer(byte_tokenizer, tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    for role, name in enumerate(PART_ROLES):
        span = chat.spans[PART_ROLES[name]]
        text = "part['text']"
        if span.opening:
            text = f"'{span.opening}' ~ {text} ~ '{span.closing}'"
        if name == "reasoning":
            text = f"'<think>\\n' ~ {text} ~ '\\n</think>\\n\\n'"
        assert f"{'el' * bool(role)}if part['type'] == '{name}' -%}}" in template
        assert f"set piece = [{text}, {'mask' if span.supervised else 'false'}] -%}}" in template
    for text in (
        f"['{chat.user.opening}' ~ text ~ '{chat.user.closing}', false]",
        f"['{chat.assistant_start}', false]",
        f"['{chat.assistant_end}', doc.trained]",
    ):
        assert text in template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokens = [config[f"{kind}_token"] for kind in ("bos", "eos", "pad")]
    assert tokens == [chat.bos, chat.assistant_end, chat.padding]
