"""The table of the chat format, what is derived from it, and the places that it cannot reach by import."""

from __future__ import annotations

import json
from pathlib import Path

from chatdata.document import LINE_ENDS, SPAN_ROLES
from chatdata.render.format import NANOCHAT, PYTHON, TEXT, ChatFormat, SpanFormat
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
    written = "{{- %s -}}"
    supervised = "{%%- generation -%%}{{- %s -}}{%%- endgeneration -%%}"
    for role, name in ((TEXT, "text"), (PYTHON, "python"), (3, "python_output")):
        span = chat.spans[role]
        text = f"'{span.opening}' + part['text'] + '{span.closing}'" if span.opening else "part['text']"
        branch = f"if part['type'] == '{name}' -%}}\n" + " " * 20
        assert branch + (supervised if span.supervised else written) % text + "\n" in template
    for text in (
        written % f"'{chat.user.opening}' + lead.text + joined(message['content']) + '{chat.user.closing}'",
        supervised % f"message['content'] + '{chat.assistant_end}'",
        supervised % f"'{chat.assistant_end}'",
        written % f"'{chat.assistant_start}'" + "{%- endif -%}",
    ):
        assert text in template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == (chat.bos, chat.assistant_end)
