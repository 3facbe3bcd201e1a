"""Documents are tested: what they show is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import chatdata as library

ROOT = Path(__file__).parents[2]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / name).read_text(), re.S)


def test_add_a_task(tmp_path: Path, demo_mid: Path, chatdata: Callable) -> None:
    (tmp_path / "capitals.py").write_text(blocks("add_a_task.md", "python")[0])
    (tmp_path / "capitals.toml").write_text(blocks("add_a_task.md", "toml")[0])
    (tmp_path / "capitals.jsonl").write_text(json.dumps({"country": "France", "capital": "Paris"}) + "\n")
    command = "build --recipe capitals.toml --task-file capitals.py --tokenizer out/demo-mid --out out/capitals"
    assert f"    chatdata {command}\n" in (ROOT / "docs" / "add_a_task.md").read_text()
    arguments = command.replace("out/demo-mid", str(demo_mid)).split()
    result = chatdata(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = library.open_build(tmp_path / "out" / "capitals")["train"][0].text()
    assert text.endswith("What is the capital of France?<|user_end|><|assistant_start|>Paris<|assistant_end|>")
    (tmp_path / "capitals.jsonl").write_text(json.dumps({"country": "France", "capital": ""}) + "\n")
    result = chatdata(*arguments, "--force", cwd=tmp_path)
    assert result.stderr == 'Error: capitals.jsonl line 1: key "capital": must not be empty\n'


def test_building(tmp_path: Path, chatdata: Callable) -> None:
    text = (ROOT / "docs" / "building.md").read_text()
    commands = re.findall(r"^    chatdata (.*)$", text, re.M)
    assert len(commands) == 11
    for command in commands:
        if "--engine ray" in command:
            continue  # test_units.py builds with Ray
        result = chatdata(*command.split(), cwd=tmp_path)
        assert result.returncode == ("diff" in command), (command, result.stderr)
    (tmp_path / "script.py").write_text(blocks("building.md", "python")[0])
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    manifest = json.loads((tmp_path / "out" / "demo-sft" / "manifest.json").read_text())
    assert result.stdout == f"{manifest['splits']['train']['tokens']}\n", result.stderr


def test_reading_without_chatdata(demo_mid: Path) -> None:
    code = (ROOT / "docs" / "format.md").read_text().split("## Reading without chatdata\n")[1]
    code = "\n".join(line[4:] for line in code.splitlines()).replace('"OUT', f'"{demo_mid}')
    names: dict = {}
    exec(code, names)
    document = library.open_build(demo_mid)["train"][0]
    assert names["first"].tolist() == document.tokens.tolist()


def test_index_columns_are_documented() -> None:
    from chatdata.shards import index_schema

    table = (ROOT / "docs" / "format.md").read_text().split("## Index columns")[1].split("## Manifest")[0]
    named = [name for cell in re.findall(r"^\| ([a-z_, ]+) \|", table, re.M) for name in cell.split(", ")]
    assert named[1:] == index_schema().names


def test_every_recipe_key_is_documented() -> None:
    from chatdata.recipe import _ENTRY_KEYS, _TOP_KEYS

    text = (ROOT / "docs" / "recipes.md").read_text()
    for key in [*_TOP_KEYS, *_ENTRY_KEYS, "words", "words_sha256", "holdout"]:
        assert re.search(rf"\b{key}\b", text), key
