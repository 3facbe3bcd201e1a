"""Builds sent to addresses: a Hub on 127.0.0.1 and folders."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

from chatdata import open_build
from chatdata.errors import BuildError, ChatdataError, FormatError, MissingSource
from chatdata.progress import no_progress
from chatdata.shards.address import push as push_build
from chatdata.shards.read import Build

REPO, ADDRESS = "me/chats", "hf://datasets/me/chats"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("chatdata.sources.hub._unreachable", {})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server


@pytest.fixture
def build(demo_mid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_mid, tmp_path / "build")


def push(build: Build, address: str, card: str) -> dict[str, Any]:
    return push_build(build.path, build.manifest, address, card, no_progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def puts(hub: HubServer) -> int:
    return sum(method == "PUT" for method, _ in hub.take_requests())


def head(hub: HubServer, branch: str = "main") -> dict[str, bytes]:
    return hub.commits[REPO][hub.refs[REPO][branch]]


def test_one_commit_with_the_card(build: Path, hub: HubServer) -> None:
    opened = open_build(build)
    facts = push(opened, ADDRESS, "# A card")
    sizes = [len(content) for content in contents(build).values()]
    assert facts == {
        "address": f"{ADDRESS}@main",
        "build_id": opened.manifest["build_id"],
        "bytes": sum(sizes),
        "removed": [],
    }
    assert head(hub) == contents(build) | {"README.md": b"# A card", ".gitattributes": b"*.npy filter=lfs"}
    assert len(hub.commits[REPO]) == 2 and hub.private == {REPO}  # the repository's first commit, and ours
    assert puts(hub) == 8
    push(opened, "hf://me/chats", "# A card")
    assert puts(hub) == 0


def test_files_of_an_older_build_go(build: Path, golden_sft: Path, hub: HubServer) -> None:
    """And only they: what people added to the repository stays."""
    kept = {"LICENSE": b"MIT", "docs/train/tokens-00000.npy": b""}
    hub.push(REPO, {**contents(golden_sft), "val/tokens-00001.npy": b"", "tokenizer/old.json": b"", **kept})
    facts = push(open_build(build), ADDRESS, "# A card")
    gone = contents(golden_sft).keys() - contents(build).keys() | {"val/tokens-00001.npy", "tokenizer/old.json"}
    assert facts["removed"] == sorted(gone)
    assert head(hub) == contents(build) | kept | {"README.md": b"# A card"}


def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/a/place"


@pytest.mark.parametrize("what", ["data.csv", "manifest.json", "train/tokens-00000.npy/x"])
def test_only_builds_are_replaced(what: str, build: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.push(REPO, {what: b"{}", "README.md": b"# Mine"})
    (tmp_path / "a" / "place" / what).parent.mkdir(parents=True)
    (tmp_path / "a" / "place" / what).write_bytes(b"{}")
    before = dict(hub.refs[REPO])
    for address, name in ((ADDRESS, f"{ADDRESS}@main"), (store(tmp_path), store(tmp_path))):
        with pytest.raises(BuildError, match=f"^{name}: not a build, it holds {what}; choose another address$"):
            push(open_build(build), address, "")
    assert hub.refs[REPO] == before and puts(hub) == 0


def test_a_branch_that_moves_meanwhile(build: Path, hub: HubServer) -> None:
    hub.push(REPO, {".gitattributes": b""})
    hub.on_put = lambda: hub.push(REPO, {"theirs.csv": b"1"})
    with pytest.raises(MissingSource, match=r"^hf://datasets/me/chats@main: the Hub refused it: .* '412 "):
        push(open_build(build), ADDRESS, "")
    assert head(hub) == {"theirs.csv": b"1"}


def test_without_access(build: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(MissingSource, match=r"the Hub refused it: .* '401 Unauthorized' for url"):
        push(open_build(build), ADDRESS, "")
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.push(REPO, {".gitattributes": b""})
    with pytest.raises(ChatdataError, match=r'^me/chats has no revision "v2" on the Hub$'):
        push(open_build(build), f"{ADDRESS}@v2", "")


def test_a_folder(build: Path, golden_sft: Path, tmp_path: Path) -> None:
    place = tmp_path / "a" / "place"
    push(open_build(golden_sft), store(tmp_path), "")
    (place / "notes.txt").touch()
    facts = push(open_build(build), store(tmp_path) + "/", "# For the Hub")
    assert facts["removed"] == sorted(contents(golden_sft).keys() - contents(build).keys())
    assert contents(place) == contents(build) | {"notes.txt": b""}


def test_a_damaged_build_is_refused(build: Path, tmp_path: Path) -> None:
    """Opening it does not read the mask."""
    copy = shutil.copytree(build, tmp_path / "copy")
    mask = copy / "val" / "mask-00000.npy"
    mask.write_bytes(mask.read_bytes()[:-1] + b"\x02")
    with pytest.raises(FormatError, match=f"^{mask}: SHA-256 differs from the manifest's; the build was not pushed$"):
        push(open_build(copy), store(tmp_path), "")
    assert not (tmp_path / "a").exists()


def test_whole_files_are_not_sent_again(build: Path, tmp_path: Path) -> None:
    """A push that was killed left no manifest, half a file, and one that is damaged."""
    place = tmp_path / "a" / "place"
    push(open_build(build), store(tmp_path), "")
    (place / "manifest.json").unlink()
    sound = place / "train" / "tokens-00000.npy"
    written = sound.stat().st_mtime_ns
    (place / "train" / "mask-00000.npy").write_bytes(b"half")
    damaged = place / "val" / "mask-00000.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x02")
    push(open_build(build), store(tmp_path), "")
    assert contents(place) == contents(build) and sound.stat().st_mtime_ns == written


def test_a_killed_push(build: Path, hub: HubServer, tmp_path: Path) -> None:
    """kill -9 in the middle: nothing is there. Again: only what is missing is sent."""
    code = "import sys; sys.argv[1:1] = ['push']; from chatdata.cli import main; main()"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, build, ADDRESS], env=env, stderr=subprocess.DEVNULL)
    numbers = itertools.count(1)

    def kill_at_the_fourth() -> None:
        if next(numbers) > 3:
            while process.poll() is None and len(hub.lfs) < 3:
                time.sleep(0.01)
            process.kill()
            raise ConnectionAbortedError  # its file is not taken

    hub.on_put = kill_at_the_fourth
    assert process.wait(60) == -signal.SIGKILL
    assert head(hub).keys() == {".gitattributes"}
    hub.on_put = lambda: None
    sent = set(hub.lfs)
    hub.take_requests()
    push(open_build(build), ADDRESS, "")
    sent_again = {path.removeprefix("/lfs/") for method, path in hub.take_requests() if method == "PUT"}
    assert len(sent) == 3 and len(sent_again) == 5 and not sent_again & sent
    assert contents(build).items() <= head(hub).items()
