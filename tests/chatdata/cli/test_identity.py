from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import chatdata as library
from chatdata.identity.conversations import identity_conversations, identity_facts
from chatdata.identity.persona import Persona
from chatdata.render.specification import render_conversation
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

ROOT = Path(__file__).parents[3]


def test_the_command(tmp_path: Path, chatdata: Callable, korvo: Persona, byte_tokenizer: Tokenizer) -> None:
    result = chatdata("identity", "me.toml", "--out", "me.jsonl", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    rows = [json.loads(line) for line in (tmp_path / "me.jsonl").read_text().splitlines()]
    assert [{"messages": row} for row in rows] == identity_conversations(korvo, 1000)
    facts = identity_facts(korvo, [{"messages": row} for row in rows])
    assert result.stdout.splitlines() == [
        f"me.jsonl: 1,000 conversations, {facts['answers']:,} answers, {facts['answers_with_name']:,} of them name "
        "Korvo; 3 of 3 facts used",
        "only named, because they have no phrasings: Klingon (phrasings exist for English, Spanish, French, German, "
        "Italian, Portuguese, Dutch, Chinese, Japanese, Hindi)",
        f"this persona can give up to {facts['largest_rows']:,} different conversations",
    ]
    # the build takes it
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    (tmp_path / "r.toml").write_text('stage = "sft"\n[shuffle]\ntrain = false\n[[train]]\ntask = "identity"\n')
    build = ["build", "--recipe", "r.toml", "--tokenizer", "t", "--identity", "me.jsonl", "--out", "out"]
    built = chatdata(*build, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    train = library.open_build(tmp_path / "out")["train"]
    assert len(train) == 1000
    assert train[0].tokens.tolist() == render_conversation(byte_tokenizer, {"messages": rows[0]}).tokens.tolist()
    # not again, unless told to; another number of rows
    refused = chatdata("identity", "me.toml", "--out", "me.jsonl", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "Error: me.jsonl: already exists; choose another --out, or --force to replace it\n"
    forced = chatdata("identity", "me.toml", "--out", "me.jsonl", "--rows", 3, "--force", "--json", cwd=tmp_path)
    assert json.loads(forced.stdout) == {"out": "me.jsonl", **identity_facts(korvo, identity_conversations(korvo, 3))}
    assert len((tmp_path / "me.jsonl").read_text().splitlines()) == 3
    built_files = ["out", "r.toml", "t"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me.jsonl", "me.toml", *built_files]


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("me.toml", "--out", "me.json"), 2, "--out me.json: name a file that ends in .jsonl, as `chatdata build"),
        (("me.toml", "--out", "no/me.jsonl"), 2, "--out no/me.jsonl: there is no folder no"),
        (("me.toml", "--out", "d.jsonl", "--force"), 2, "--out d.jsonl is a folder; name a file"),
        (("no.toml", "--out", "me.jsonl"), 1, "no.toml: no such file; a persona is a TOML file with at least a line"),
        (("me.toml", "--out", "me.jsonl", "--rows", 10**9), 1, "me.toml: 1,000,000,000 rows are more than the "),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, chatdata: Callable, arguments: tuple, code: int, error: str, korvo: Persona
) -> None:
    (tmp_path / "d.jsonl").mkdir()
    result = chatdata("identity", *arguments, cwd=tmp_path)
    assert result.returncode == code and result.stdout == ""
    assert result.stderr.startswith(f"Error: {error}") and result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "me.toml"]


def test_the_documented_persona(tmp_path: Path, chatdata: Callable) -> None:
    text = (ROOT / "docs" / "conversations.md").read_text()
    (tmp_path / "me.toml").write_text(re.findall(r"```toml\n(.*?)```", text, re.S)[0])
    command = "identity me.toml --out me.jsonl"
    assert f"    chatdata {command}\n" in text
    result = chatdata(*command.split(), cwd=tmp_path)
    assert result.returncode == 0 and "only named" not in result.stdout
    assert result.stdout.splitlines() == re.findall(r"^    (?!chatdata)(\S.*)$", text.split(command)[1], re.M)[:2]
