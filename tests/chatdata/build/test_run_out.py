"""A build appears whole or not at all: OUT that exists, a full disk, interruptions, two builds at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from chatdata import open_build
from chatdata.build.run import check_out, partial_folder, publish
from chatdata.errors import BuildError
from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer

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
    assert sorted(os.listdir(tmp_path)) == ["out"]
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("precious")
    result = chatdata(*DEMO, "--out", mine, "--force")
    no_build = f"Error: {mine}: an unfinished build or no build (no manifest.json); --force replaces only a build "
    assert result.stderr == no_build + "that this chatdata can read\n"
    assert (result.returncode, os.listdir(mine)) == (1, ["chapter1.tex"])
    result = chatdata(*DEMO, "--out", mine / "chapter1.tex", "--force")
    assert result.stderr == f"Error: {mine / 'chapter1.tex'}: not a folder; --force replaces only a build\n"


def test_what_cannot_be_done_is_said_before_any_work(tmp_path: Path, chatdata: Callable) -> None:
    """OUT is the folder we are in, or the cache cannot be written: one line, and nothing is rendered or left behind."""
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    replace = "a finished folder would replace the one you are in; name a folder in it"
    broken = f"{tmp_path}/file/units: cannot be written (not a directory)"
    for out, cache, code, message in (
        (".", tmp_path / "cache", 2, f"--out {tmp_path}/here: {replace}"),
        ("out", tmp_path / "file", 1, f"{broken}; CHATDATA_CACHE may name another one"),
    ):
        environment = {**os.environ, "CHATDATA_CACHE": str(cache)}
        result = chatdata(*DEMO, "--out", out, cwd=tmp_path / "here", env=environment)
        assert (result.returncode, result.stderr) == (code, f"Error: {message}\n")
        assert sorted(os.listdir(tmp_path)) == ["file", "here"] and os.listdir(tmp_path / "here") == []


def test_a_full_cache_may_be_read_only(tmp_path: Path, command_line: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others share a cache, it holds everything and need not be written."""
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    assert command_line(shlex.join(["chatdata", *map(str, DEMO), "--out", "a"]), tmp_path).returncode == 0

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/proc/none"))  # noqa: SIM115, PTH123
    line = shlex.join(["chatdata", *map(str, DEMO), "--out"])
    assert command_line(f"{line} b", tmp_path).returncode == 0
    assert (
        "units: cannot be written (no such file or directory)"
        in command_line(f"{line.replace('20', '21')} c", tmp_path).stderr
    )


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


def test_no_space_left_for_the_cache(tiny_disk: Path, tmp_path: Path, chatdata: Callable) -> None:
    environment = {**os.environ, "CHATDATA_CACHE": str(tiny_disk)}
    command = ("build", "--stage", "mid", "--demo", "--limit", 2000, "--out", tmp_path / "out")
    result = chatdata(*command, "--workers", 1, env=environment)
    message = "no space left on the disk for rendered units; CHATDATA_CACHE may name another one"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, f"Error: {tiny_disk / 'units'}: {message}")
    assert not (tmp_path / "out").exists()


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
    said = "Error: interrupted; no build was written, but rendered work units are kept: run the same command to resume"
    assert errors.splitlines()[-1] == said and "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_killed_then_built_again(tmp_path: Path, chatdata: Callable) -> None:
    process = start_build(tmp_path / "out")
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path) == [".out.partial"]
    result = chatdata(*DEMO, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["out"]
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


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def build_of(tmp_path: Path, tokenizer: Tokenizer, chatdata: Callable, lines: list, *arguments: object) -> object:
    save_tokenizer(tokenizer, tmp_path / "t")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.toml").write_text('stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "out"]
    return chatdata(*command, *arguments)


def test_force_never_takes_more_than_a_build(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    (out / "checkpoints").mkdir()
    with pytest.raises(BuildError, match=r"holds more than a build: checkpoints; --force would delete it$"):
        check_out(out, force=True)
    (out / "checkpoints").rmdir()
    check_out(out, force=True)
    for name in ("my-notes.txt", "train/my-notes.txt", "tokenizer/.hidden", "train/mine/notes.txt", "val/notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
        result = build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force")
        first = name if (out / name).parent.name not in ("mine", "val") else str(Path(name).parent)
        more = " and 1 more" if first != name else ""
        problem = f"holds more than a build: {first}{more}; --force would delete it"
        assert (result.returncode, result.stderr) == (1, f"Error: {out}: {problem}\n")
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
        if first != name:
            (out / first).rmdir()
    (out / "train/elsewhere").symlink_to(tmp_path)
    assert (
        "holds more than a build: train/elsewhere"
        in build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force").stderr
    )
    (out / "train/elsewhere").unlink()
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force").returncode == 0
    mine = tmp_path / ".out.partial"
    mine.mkdir()
    (mine / "thesis").write_text("precious")
    with pytest.raises(BuildError, match="in the way and not a build's"), partial_folder(out):
        pass
    assert (mine / "thesis").read_text() == "precious"
    (mine / "thesis").unlink()
    old = tmp_path / ".out.old"
    old.mkdir()
    (old / "thesis").write_text("precious")
    result = build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force")
    assert "in the way" in result.stderr and (old / "thesis").exists() and open_build(out)


def test_an_interruption_while_replacing_brings_the_old_build_back(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    before = (out / "manifest.json").read_bytes()
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), partial_folder(out) as partial:
        publish(partial, out)
    monkeypatch.undo()
    assert (out / "manifest.json").read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


DIE = """
import os, shutil
from pathlib import Path
from chatdata.build import run as publish
place, rename, remove, sync, unlink = {place!r}, Path.rename, publish._remove, publish.sync, Path.unlink
def dying_sync(path):
    if place == ("synced" if path.name.endswith(".partial") else "renamed"): os._exit(137)
    sync(path)
def dying_rename(self, to):
    if place == "between" and self.name.endswith(".partial"): os._exit(137)
    return rename(self, to)
def dying_unlink(self, missing_ok=False):
    unlink(self, missing_ok)
    if place == "removing" and self.parent.name.endswith(".old") and self.name == "manifest.json": os._exit(137)
publish.sync, Path.rename, Path.unlink = dying_sync, dying_rename, dying_unlink
from chatdata.cli import main
main()
"""


@pytest.mark.parametrize("place", ["synced", "between", "renamed", "removing"])
def test_killed_at_any_place_of_publishing_the_next_build_goes_on(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable, place: str
) -> None:
    out = tmp_path / "out"
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    before = (out / "manifest.json").read_bytes()
    flags = ["--max-tokens", "3", "--overflow", "truncate", "--force"]
    again = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", out, *flags]
    killed = subprocess.run([sys.executable, "-c", DIE.format(place=place), *map(str, again)], capture_output=True)
    assert killed.returncode == 137, killed.stderr
    if place != "between":  # and then it is beside it, and comes back
        assert open_build(out).manifest
        assert ((out / "manifest.json").read_bytes() == before) == (place == "synced")
    with partial_folder(out):
        assert open_build(out).manifest
        assert ((out / "manifest.json").read_bytes() == before) == (place in ("synced", "between"))
    result = chatdata(*again)
    assert result.returncode == 0, result.stderr
    assert (out / "manifest.json").read_bytes() != before
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    assert chatdata("verify", out, "--level", "full").returncode == 0


def test_links_are_followed_and_kept(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    (tmp_path / "big" / "a").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big" / "a")
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI]).returncode == 0
    assert build_of(tmp_path, byte_tokenizer, chatdata, [HI], "--force").returncode == 0
    assert (tmp_path / "out").is_symlink() and sorted(os.listdir(tmp_path / "big")) == ["a"]
    (tmp_path / "out").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "a link to nowhere" in build_of(tmp_path, byte_tokenizer, chatdata, [HI]).stderr
