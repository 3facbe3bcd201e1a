"""docs/own_data.md: its files are written, its commands and scripts run in order, and what they print is compared.

A line `…` stands for any lines. The model's folder is made here: a small tokenizer, trl's copy of the model's template,
and random weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_folders import qwen_folder, trl_template

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, re.S | re.M)
CONSOLE = "".join(re.findall(r"^```console\n(.*?)^```", PAGE, re.S | re.M))
STEPS = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", CONSOLE, re.M)
FAILS = {"chatdata check": 3}  # other commands end with 0


def model_folder(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    qwen_folder(folder, trl_template("qwen3"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|endoftext|>"}))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=400, intermediate_size=64, head_dim=16, **sizes)).save_pretrained(folder)


def run(command: str, folder: Path, command_line: Callable) -> tuple[int, str]:
    """Exit code and output; with standard error if the command fails."""
    if command.startswith("python "):
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.chdir(folder)
            runpy.run_path(command.split()[1], run_name="__main__")
        return 0, out.getvalue()
    if not command.startswith("chat"):
        return subprocess.run(command, shell=True, cwd=folder, check=True).returncode, ""
    result = command_line(command, folder)
    return result.returncode, result.stdout + (result.stderr if result.returncode == 1 else "")


def matches(shown: list[str], printed: list[str]) -> bool:
    """Whether the lines are those shown; `…` is any number of lines."""
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(line + "\n" for line in printed)) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_mid: Path) -> Path:
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(demo_mid, folder / "out" / "demo-mid")
    for name, text in FILES:
        (folder / name).write_text(text, encoding="utf-8")
    model_folder(folder / "Qwen3-0.6B")
    return folder


def test_every_command_prints_what_is_shown(folder: Path, command_line: Callable, offline: None) -> None:
    pytest.importorskip("trl", reason="trains with trl: uv sync")
    for command, text in STEPS:
        shown = [line.rstrip() for line in text.rstrip().splitlines()]
        code, printed = run(command, folder, command_line)
        lines = [line.rstrip() for line in printed.rstrip().splitlines()]
        failure = 1 if any(line.startswith("Error: ") for line in shown) else 0
        assert code == FAILS.get(" ".join(command.split()[:2]), failure), (command, printed)
        assert matches(shown, lines), f"{command}\n{printed}"


def test_the_page_has_what_it_promises() -> None:
    assert len(FILES) == 10 and len(STEPS) > 10
    collate = re.search(r"^def collate.*?\n\n", PAGE, re.S | re.M)
    assert collate and len(collate[0].strip().splitlines()) <= 15
