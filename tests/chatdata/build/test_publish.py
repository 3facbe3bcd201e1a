"""A build appears whole or not at all: OUT that exists, a full disk, interruptions, two builds at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from chatdata import open_build

DEMO = ("build", "--stage", "mid", "--demo", "--limit", 20)


def test_output_folder_exists(tmp_path: Path, chatdata: Callable) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert chatdata(*DEMO, "--out", out).returncode == 0  # an empty folder is nobody's
    before = (out / "manifest.json").read_bytes()
    result = chatdata(*DEMO, "--out", out)
    assert result.returncode == 1
    assert result.stderr == f"Error: {out}: already exists; choose another --out, or --force to replace a build\n"
    assert chatdata("build", "--stage", "sft", "--demo", "--limit", 20, "--out", out, "--force").returncode == 0
    assert (out / "manifest.json").read_bytes() != before
    assert sorted(os.listdir(tmp_path)) == ["out", "out-firewall.json"]
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("precious")
    result = chatdata(*DEMO, "--out", mine, "--force")
    assert result.stderr == f"Error: {mine}: not a build (no readable manifest.json); --force replaces only a build\n"
    assert (result.returncode, os.listdir(mine)) == (1, ["chapter1.tex"])
    result = chatdata(*DEMO, "--out", mine / "chapter1.tex", "--force")
    assert result.stderr == f"Error: {mine / 'chapter1.tex'}: not a folder; --force replaces only a build\n"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_space_left(tiny_disk: Path, chatdata: Callable) -> None:
    out = tiny_disk / "out"
    result = chatdata("build", "--stage", "mid", "--demo", "--limit", 2000, "--out", out)
    assert result.stderr.splitlines()[-1] == f"Error: {out}: no space left on the disk; nothing was written there"
    assert (result.returncode, os.listdir(tiny_disk)) == (1, [])


def start_build(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """A build under way: its first line of progress has been seen."""
    code = "from chatdata.cli import main; main()"
    command = [sys.executable, "-c", code, "build", "--stage", "mid", "--demo", "--out", str(out), *arguments]
    # an empty cache: with units of other tests in it the build may end before it is interrupted
    environment = {**os.environ, "CHATDATA_CACHE": str(out.parent.with_name(f"{out.parent.name}-cache"))}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        # where the tests run in the background of a script, SIGINT is ignored, and by all that they start
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "rows" in process.stderr.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, number: int) -> None:
    process = start_build(tmp_path / "out")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    said = "Error: interrupted; no build was written, what was rendered is kept: the same command goes on from there"
    assert errors.splitlines()[-1] == said and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_killed_then_built_again(tmp_path: Path, chatdata: Callable) -> None:
    process = start_build(tmp_path / "out")
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == [".out.partial"]
    result = chatdata(*DEMO, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["out", "out-firewall.json"]
    assert len(open_build(tmp_path / "out")["train"]) > 0


def test_two_builds_racing_for_one_folder(tmp_path: Path, chatdata: Callable) -> None:
    process = start_build(tmp_path / "out")
    process.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the other one needs
    try:
        result = chatdata(*DEMO, "--out", tmp_path / "out")
    finally:
        process.send_signal(signal.SIGCONT)
    assert (result.returncode, result.stderr) == (
        1,
        f"Error: {tmp_path / 'out'}: another build is writing there; wait for it, or choose another --out\n",
    )
    process.communicate(timeout=60)
    assert process.returncode == 0
    open_build(tmp_path / "out")
