"""The page on other chat formats: its row becomes what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_folders import llama_folder, qwen_folder, trl_template

from chatdata.conversation import parse_conversation
from chatdata.render.model_format import load_format, render_in_format
from chatdata.tokenizer.folder import read_folder

PAGE = Path(__file__).parents[2] / "docs" / "chat_formats.md"


@pytest.mark.parametrize("name", ["qwen3", "llama-3"])
def test_the_row_becomes_what_is_shown(tmp_path: Path, name: str) -> None:
    text = PAGE.read_text()
    (row,) = re.findall(r"```json\n(.*?)```", text, re.S)
    shown = re.findall(r"`([\w-]+)`[^`]*:\n\n```\n(.*?)\n```", text, re.S)
    make, template = {"qwen3": (qwen_folder, "qwen3"), "llama-3": (llama_folder, "llama3_2")}[name]
    model_format = load_format(name, read_folder(make(tmp_path / name, trl_template(template))))
    document, _ = render_in_format(model_format, parse_conversation(json.loads(row)))
    assert document.conversation_markup() == dict(shown)[name]
