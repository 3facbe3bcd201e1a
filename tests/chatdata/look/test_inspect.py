from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import chatdata as library
from chatdata.look.inspect import token_rows
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": [{"type": "python", "text": "b"}, {"type": "python_output", "text": "c"}]},
]
#      token                  id  mask  mid in, target  sft in, target
ROWS = [
    ("<|bos|>", 256, 0, 256, 257, 256, -100),
    ("<|user_start|>", 257, 0, 257, 97, 257, -100),
    ("a", 97, 0, 97, 258, 97, -100),
    ("<|user_end|>", 258, 0, 258, 259, 258, -100),
    ("<|assistant_start|>", 259, 0, 259, 261, 259, 261),
    ("<|python_start|>", 261, 1, 261, 98, 261, 98),
    ("b", 98, 1, 98, 262, 98, 262),
    ("<|python_end|>", 262, 1, 262, 263, 262, -100),
    ("<|output_start|>", 263, 0, 263, 99, 263, -100),
    ("c", 99, 0, 99, 264, 99, -100),
    ("<|output_end|>", 264, 0, 264, 260, 264, 260),
    ("<|assistant_end|>", 260, 1, 260, 256, None, None),
]


def test_inputs_and_targets_of_a_conversation(byte_tokenizer: Tokenizer) -> None:
    document = library.render_conversation(byte_tokenizer, CHAT)
    rows = token_rows(document, ("mid", "sft"))
    assert [row["idx"] for row in rows] == list(range(12))
    keys = ("token", "id", "mask", "mid_input", "mid_target", "sft_input", "sft_target")
    assert [tuple(row[key] for key in keys) for row in rows] == ROWS
    assert [tuple(row.values()) for row in token_rows(document, ())] == [(i, *row[:3]) for i, row in enumerate(ROWS)]


def test_conversation_from_a_file_and_from_stdin(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "chat.json").write_text(json.dumps(CHAT, indent=1))
    arguments = ("inspect", "--tokenizer", tmp_path / "t", "--stage", "sft")
    shown = chatdata(*arguments, "--conversation", tmp_path / "chat.json").stdout.splitlines()
    assert shown[0].split() == ["idx", "token", "id", "mask", "sft_input", "sft_target"]
    assert shown[6].split() == ["5", "'<|python_start|>'", "261", "1", "261", "98"]
    assert shown[12].split() == ["11", "'<|assistant_end|>'", "260", "1", "·", "·"]
    assert shown[-1] == "12 tokens, 4 supervised"
    as_json = chatdata(*arguments, "--conversation", "-", "--json", input=json.dumps(CHAT)).stdout.splitlines()
    assert json.loads(as_json[4]) == {
        "idx": 4,
        "token": "<|assistant_start|>",
        "id": 259,
        "mask": 0,
        "sft_input": 259,
        "sft_target": 261,
    }


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "{file} line 1: not one JSON conversation: Expecting property name enclosed in double quotes"),
        ("[]", '{file}: "messages" is empty: a conversation needs at least one user message'),
        (None, "{file}: no such file"),
    ],
)
def test_bad_conversation_file(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, content: str | None, error: str
) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    result = chatdata("inspect", "--conversation", file, "--tokenizer", tmp_path / "t")
    assert (result.returncode, result.stderr) == (1, "Error: " + error.replace("{file}", str(file)) + "\n")


def test_documents_of_a_build(demo_mid: Path, chatdata: Callable) -> None:
    build = library.open_build(demo_mid)
    shown = chatdata("inspect", demo_mid, "--doc", 3).stdout
    assert build["train"][3].conversation_markup() in shown
    task = build["train"].index["task"][3]
    assert f"train document 3 · task {task} · " in shown
    shown = chatdata("inspect", demo_mid, "--task", "spelling_bee").stdout
    assert shown.count("task spelling_bee") == 3 and "⟦" in shown and "'.count('" in shown
    as_json = json.loads(chatdata("inspect", demo_mid, "--split", "val", "--doc", 0, "--json").stdout)
    assert as_json["text"] == build["val"][0].text() and as_json["mask"] == build["val"][0].mask.tolist()
    colour = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured = chatdata("inspect", demo_mid, "--doc", 3, env=colour).stdout
    assert "\x1b[1;32m" in coloured and "⟦" not in coloured
    for arguments, error in [
        (("--doc", 10**6), f"--doc 1000000: train has documents 0 … {len(build['train']) - 1}"),
        (
            ("--task", "gsm8k"),
            "--task gsm8k: train has conversations, demo_choice, demo_math, identity, simple_spelling, ",
        ),
        (("--split", "test"), f'{demo_mid} has no split "test"; it has train, val'),
    ]:
        result = chatdata("inspect", demo_mid, *arguments)
        assert result.returncode == 2 and result.stderr.startswith(f"Error: {error}")
    assert chatdata("inspect").returncode == 2


def test_terminal_escapes_are_shown_not_sent(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "c.jsonl").write_text('[{"role": "user", "content": "\\u001b[2Jgone"}]\n')
    (tmp_path / "r.toml").write_text('stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "out"]
    assert chatdata(*command).returncode == 0
    shown = chatdata("inspect", tmp_path / "out").stdout
    assert "\x1b" not in shown and "\\x1b[2Jgone" in shown
