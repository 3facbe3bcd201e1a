"""Builds at addresses: a Hub on 127.0.0.1, folders, and what may go wrong on the way."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, closed_port

from chatdata import open_build
from chatdata.errors import FormatError, MissingSource, SourceError, UsageError
from chatdata.shards.address import local_build, place_of
from chatdata.sources import hub as hub_module

REPO, ADDRESS = "me/chats", "hf://datasets/me/chats"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "builds"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub_module, "_unreachable", {})


@pytest.fixture
def build(demo_mid: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_mid, tmp_path / "build")


def build_id(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["build_id"]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def partial_files(cache: Path) -> list[Path]:
    return [path for path in cache.glob(".tmp-*/**/*") if path.is_file() and path.name != "manifest.json"]


def test_a_local_path_is_returned_as_it_is(build: Path) -> None:
    assert local_build(build) == build and local_build(str(build), build_id(build)[:12]) == build
    with pytest.raises(FormatError, match=f"^{build}: build {build_id(build)}, but expected 0123456789ab$"):
        open_build(build, "0123456789ab")
    with pytest.raises(UsageError, match=f'^expect "{build_id(build)[:11]}": give at least the first 12 digits'):
        local_build(build, build_id(build)[:11])


def test_names() -> None:
    for address in (ADDRESS, "hf://me/chats", "hf://datasets/me/chats/", f"{ADDRESS}@main"):
        assert (place_of(address).name, place_of(address).repo) == (f"{ADDRESS}@main", REPO)
    assert place_of("hf://me/chats@refs/pr/1").revision == "refs/pr/1"
    assert place_of("file:///a/b/").root == "/a/b"
    for wrong, reason in (
        ("hf://chats", r"must be hf://datasets/OWNER/NAME\[@REVISION\], or a folder like s3://BUCKET/mid"),
        ("out/mid", "must be hf://datasets/OWNER.*"),
        ("gopher://chats", "Protocol not known: gopher"),
        ("oss://x/chats", "Install ossfs to access .*"),
    ):
        with pytest.raises(UsageError, match=f"^{wrong}: {reason}$"):
            place_of(wrong)


def test_a_folder_is_fetched_once(build: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"file://{build}"
    folder = local_build(address)
    assert folder == cache / build_id(build) and contents(folder) == contents(build)
    assert re.search(r"^fetch: [\d,]+ of [\d,]+ bytes$", capsys.readouterr().err, re.M)
    (build / "train" / "tokens-00000.npy").unlink()
    assert open_build(address, build_id(build)).path == folder
    (build / "manifest.json").unlink()
    with pytest.raises(FormatError, match=f"^{address}: an unfinished build or no build"):
        open_build(address)
    assert capsys.readouterr().err == "" and partial_files(cache) == []


def test_one_request_by_branch_none_by_commit(build: Path, cache: Path, hub: HubServer) -> None:
    commit = hub.push(REPO, {**contents(build), "README.md": b"# A card"})
    folder = local_build(ADDRESS)
    assert contents(folder) == contents(build)  # without the card
    hub.take_requests()
    assert local_build("hf://me/chats") == folder
    assert hub.take_requests() == [("GET", f"/api/datasets/{REPO}/revision/main")]
    assert local_build(f"{ADDRESS}@{commit}") == folder
    assert len(hub.take_requests()) == 2  # the manifest: which build it is
    assert local_build(f"{ADDRESS}@{commit}") == folder
    assert hub.take_requests() == []


def test_another_build_at_the_address(build: Path, cache: Path, hub: HubServer, golden_sft: Path) -> None:
    hub.push(REPO, contents(build))
    local_build(ADDRESS)
    hub.push(REPO, contents(golden_sft))
    hub.take_requests()
    with pytest.raises(FormatError, match=f"^{ADDRESS}@main: build {build_id(golden_sft)}, but expected "):
        local_build(ADDRESS, build_id(build)[:12])
    assert [path.rpartition("/")[2] for _, path in hub.take_requests() if "resolve" in path] == ["manifest.json"] * 2
    assert local_build(ADDRESS) == cache / build_id(golden_sft)
    assert sorted(path.name for path in cache.glob("[0-9a-f]*")) == sorted(map(build_id, (build, golden_sft)))


def test_offline(
    build: Path, cache: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.push(REPO, contents(build))
    folder = local_build(ADDRESS, quiet=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_build(ADDRESS) == folder
    used = f"; using the build fetched before, {build_id(build)}\n"
    assert capsys.readouterr().err == f"{ADDRESS}@main: HF_HUB_OFFLINE is set{used}"
    with pytest.raises(FormatError, match="but expected 0123456789ab"):
        local_build(ADDRESS, "0123456789ab")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    use_hub(monkeypatch, closed_port())
    assert local_build(ADDRESS) == folder
    assert "cannot be downloaded from http://127.0.0.1" in capsys.readouterr().err
    with pytest.raises(MissingSource, match=r"^hf://datasets/me/other@main: cannot be downloaded from"):
        local_build("hf://me/other")


def test_what_the_hub_does_not_have(build: Path, cache: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"^me/chats is not a dataset on the Hub \(or is private: `hf auth login`\)$"):
        local_build(ADDRESS)
    hub.push(REPO, contents(build), "private")
    hub.private.add(REPO)
    with pytest.raises(SourceError, match=r"^me/chats is not a dataset on the Hub"):
        local_build(f"{ADDRESS}@private")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert contents(local_build(f"{ADDRESS}@private")) == contents(build)
    hub.push(REPO, {"README.md": b"# Nothing yet"})
    with pytest.raises(SourceError, match=r'^me/chats has no revision "v2" on the Hub$'):
        local_build(f"{ADDRESS}@v2")
    with pytest.raises(FormatError, match=r"^hf://datasets/me/chats@main: an unfinished build or no build"):
        local_build(ADDRESS)


@pytest.mark.parametrize("scheme", ["file", "hf"])
def test_damage_on_the_way(scheme: str, build: Path, cache: Path, hub: HubServer, tmp_path: Path) -> None:
    sound, place = contents(build), tmp_path / "place"
    name = "val/mask-00000.npy"
    flipped = sound[name][:-1] + bytes([sound[name][-1] ^ 1])

    def put(content: bytes) -> str:
        if scheme == "hf":
            hub.push(REPO, {**sound, name: content})
            return ADDRESS
        shutil.copytree(build, place, dirs_exist_ok=True)
        (place / name).write_bytes(content)
        return f"file://{place}"

    for content, problem in ((flipped, "SHA-256 differs from the manifest's"), (sound[name][:-5], "bytes, but the")):
        with pytest.raises(FormatError, match=f"/{name}: .*{problem}.*; the build was not fetched$"):
            open_build(put(content))
        assert not list(cache.glob("[0-9a-f]*"))
    hub.take_requests()
    assert contents(local_build(put(sound[name]))) == sound
    fetched = {path.rpartition("/")[2] for method, path in hub.take_requests() if method == "GET" and "resolve" in path}
    # the whole files of the failed fetch are there
    assert fetched <= {"mask-00000.npy", "manifest.json", "report.json", "firewall.json"}


def test_a_folder_where_the_manifest_should_be(build: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "place" / "manifest.json").mkdir(parents=True)
    with pytest.raises(FormatError, match=r"place: an unfinished build or no build \(no manifest.json\)$"):
        local_build(f"file://{tmp_path}/place")
    assert contents(local_build(f"file://{build}")) == contents(build)


def test_whole_files_of_a_killed_fetch_are_used(build: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = cache / f".tmp-{platform.node()}" / build_id(build)
    shutil.copytree(build / "train", partial / "train")
    (partial / "train" / "mask-00000.npy").write_bytes(b"half")
    (partial / "report.json").write_bytes(b"half")
    (build / "train" / "tokens-00000.npy").unlink()  # not asked for again
    folder = local_build(f"file://{build}")
    assert contents(folder).keys() == contents(build).keys() | {"train/tokens-00000.npy"}
    assert (folder / "report.json").read_bytes() == (build / "report.json").read_bytes()
    assert list(cache.glob(".tmp-*")) == []


def stats(address: str, hub: HubServer) -> subprocess.Popen[str]:
    """`chatdata stats ADDRESS`, started in a process of its own."""
    code = "import sys; sys.argv[1:1] = ['stats']; from chatdata.cli import main; main()"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, address], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_fetch(build: Path, cache: Path, hub: HubServer) -> None:
    """kill -9 after a few files: nothing to read is left. Again: only the others are fetched."""
    hub.push(REPO, contents(build))

    def whole_files() -> set[str]:
        names = {"/".join(path.relative_to(cache).parts[2:]) for path in partial_files(cache)}
        return {name for name in names if not name.startswith(".cache/")} - {"report.json", "firewall.json"}

    def kill_at_the_last(path: str) -> None:
        if path.endswith("/val/mask-00000.npy"):  # held back until another file is whole
            while process.poll() is None and not whole_files():
                time.sleep(0.01)
            process.kill()

    hub.on_get = kill_at_the_last
    process = stats(ADDRESS, hub)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not list(cache.glob("[0-9a-f]*"))
    hub.on_get = lambda path: None
    whole = whole_files()
    hub.take_requests()
    assert contents(local_build(ADDRESS)) == contents(build) and not partial_files(cache)
    gets = [path.partition("/resolve/")[2] for method, path in hub.take_requests() if method == "GET"]
    fetched = {path.partition("/")[2] for path in gets}
    assert whole and fetched >= contents(build).keys() - whole and not fetched & whole


def test_two_readers_fetch_once(build: Path, cache: Path, hub: HubServer) -> None:
    hub.push(REPO, contents(build))
    readers = [stats(ADDRESS, hub) for _ in range(2)]
    printed = [reader.communicate(timeout=60) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0] and printed[0][0] == printed[1][0], printed
    given = [path for method, path in hub.take_requests() if method == "GET" and path.endswith(".npy")]
    assert len(given) == len(set(given)) and contents(cache / build_id(build)) == contents(build)


def test_an_unwritable_cache(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .*; CHATDATA_CACHE may name another one"):
        local_build(f"file://{build}")
