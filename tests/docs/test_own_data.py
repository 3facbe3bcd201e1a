"""docs/own_data.md, docs/exports.md: files are written, commands and scripts run in order, what they print is compared.

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

PAGES = {
    name: (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text("utf-8") for name in ("own_data", "exports")
}
FAILS = {"chatdata check": 3}  # other commands end with 0


def files_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGES[page], re.S | re.M)


def steps_of(page: str) -> list[tuple[str, str]]:
    """Commands and what they print."""
    console = "".join(re.findall(r"^```console\n(.*?)^```", PAGES[page], re.S | re.M))
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.M)


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


@pytest.mark.parametrize("page", PAGES)
def test_every_command_prints_what_is_shown(
    page: str, demo_mid: Path, tmp_path: Path, command_line: Callable, offline: None
) -> None:
    pytest.importorskip("trl", reason="trains with trl: uv sync")
    shutil.copytree(demo_mid, tmp_path / "out" / "demo-mid")
    for name, text in files_of(page):
        (tmp_path / name).write_text(text, encoding="utf-8")
    model_folder(tmp_path / "Qwen3-0.6B")
    for command, text in steps_of(page):
        shown = [line.rstrip() for line in text.rstrip().splitlines()]
        code, printed = run(command, tmp_path, command_line)
        lines = [line.rstrip() for line in printed.rstrip().splitlines()]
        failure = 1 if any(line.startswith("Error: ") for line in shown) else 0
        assert code == FAILS.get(" ".join(command.split()[:2]), failure), (command, printed)
        assert matches(shown, lines), f"{command}\n{printed}"


def test_the_page_has_what_it_promises() -> None:
    assert len(files_of("own_data")) == 9 and len(steps_of("own_data")) > 10
