"""`chatdata export`: what it prints, what it refuses, and that OUT appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

FORMATS = ["datasets", "olmo", "megatron", "llmc"]


@pytest.fixture
def work(demo_work: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_work / "out", tmp_path / "out")
    return tmp_path


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_printed(work: Path, to: str, command_line: Callable) -> None:
    result = command_line(f"chatdata export out/demo-sft --to {to} --out d", work)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    policy = "ignore" if to == "llmc" else "apply"
    assert [line.split(": ")[0] for line in lines[:2]] == ["d/train", "d/val"]
    assert all(line.endswith(f" supervised ({policy})") for line in lines[:2])
    assert "export train" in result.stderr
    as_json = command_line(f"chatdata export out/demo-sft --to {to} --out e --json", work)
    facts = json.loads(as_json.stdout)
    assert as_json.stderr == "" and list(facts) == ["out", "to", "mask", "splits", "notes"]
    assert (facts["mask"], facts["notes"]) == (policy, lines[2:])
    totals = json.loads((work / "out/demo-sft/manifest.json").read_text())["splits"]
    for name, split in facts["splits"].items():
        assert split["tokens"] == totals[name]["tokens"]
        assert split["supervised"] == totals[name]["tokens" if to == "llmc" else "supervised"]
    assert "{" not in as_json.stdout.split('"notes"')[1]


def test_the_settings_of_a_reader(work: Path, command_line: Callable) -> None:
    ids = json.loads((work / "out/demo-sft/manifest.json").read_text())["tokenizer"]["special_ids"]
    printed = command_line("chatdata export out/demo-sft --to olmo --out d", work).stdout
    assert f"eos_token_id={ids['<|assistant_end|>']}, bos_token_id={ids['<|bos|>']}" in printed
    assert "use_array_if_local=False" in printed and "OLMO_DATA_PREP_USE_ARRAY_IF_LOCAL=false" in printed
    masked = command_line("chatdata export out/demo-mid --to olmo --mask apply --out m --json", work)
    whole = command_line("chatdata export out/demo-mid --to olmo --out w --json", work)
    mask, every = (json.loads(result.stdout)["splits"]["train"] for result in (masked, whole))
    assert mask["supervised"] < every["supervised"] == every["tokens"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--to olmo --arrow", 2, "--extra-columns and --arrow go with --to datasets"),
        ("--to llmc --mask apply", 2, "--to llmc takes no --mask: its files have none"),
        ("--to olmo --out full", 1, "full: already exists; choose another --out"),
        ("--to olmo --out full/file", 1, "full/file: already exists; choose another --out"),
        ("--to olmo --out {work}", 1, "{work}: already exists; choose another --out"),
    ],
)
def test_what_is_refused(work: Path, options: str, code: int, message: str, command_line: Callable) -> None:
    (work / "full").mkdir()
    (work / "full" / "file").touch()
    line = f"chatdata export out/demo-sft --out d {options}".replace("{work}", str(work))
    result = command_line(line, work)
    assert (result.returncode, result.stderr) == (code, f"Error: {message}\n".replace("{work}", str(work)))
    assert sorted(os.listdir(work)) == ["full", "out"]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_whole_or_not_at_all(
    work: Path, to: str, failure: BaseException, command_line: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("chatdata.shards.export.sync", fail)
        result = command_line(f"chatdata export out/demo-sft --to {to} --out d", work)
    interrupted = failure is KeyboardInterrupt
    message = "interrupted" if interrupted else "d: no space left on the disk; nothing was written there"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130 if interrupted else 1, f"Error: {message}")
    assert os.listdir(work) == ["out"]
    (work / "d").mkdir()
    assert command_line(f"chatdata export out/demo-sft --to {to} --out d", work).returncode == 0
    assert sorted(os.listdir(work)) == ["d", "out"] and not any(p.name.startswith(".") for p in (work / "d").iterdir())
