"""`chatdata push` and `pull`, and addresses on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATDATA_CACHE", str(tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_there_and_back(demo_mid: Path, command_line: Callable, tmp_path: Path) -> None:
    address, build_id = f"file://{tmp_path}/place", json.loads((demo_mid / "manifest.json").read_text())["build_id"]

    def run(line: str, code: int = 0) -> str:
        result = command_line(line, tmp_path)
        assert result.returncode == code, result.stderr
        return result.stdout if code == 0 else result.stderr

    size = sum(map(len, contents(demo_mid).values()))
    assert run(f"chatdata push {demo_mid} {address}") == f"{address}: build {build_id[:12]}, {size:,} bytes\n"
    facts = json.loads(run(f"chatdata push {demo_mid} {address} --json"))
    assert facts == {"address": address, "build_id": build_id, "bytes": size, "removed": []}
    assert (
        run(f"chatdata pull {address} --out new/copy --expect {build_id[:12]}") == f"new/copy: build {build_id[:12]}\n"
    )
    assert contents(tmp_path / "new" / "copy") == contents(demo_mid)
    assert (
        run(f"chatdata pull {address} --out new/copy", 1) == "Error: new/copy: already exists; choose another --out\n"
    )
    cached = json.loads(run("chatdata cache --json"))
    assert (cached["builds"], cached["builds_bytes"] >= size) == ([build_id], True)
    partial = tmp_path / "cache" / "builds" / ".tmp-host" / "tokens"
    partial.parent.mkdir()
    partial.write_bytes(b"x" * 10_000)
    assert json.loads(run("chatdata cache --json"))["builds_bytes"] == cached["builds_bytes"] + 10_000
    assert "builds: 1 fetched builds, " in run("chatdata cache --prune 30")
    assert not partial.parent.exists()
    assert run(f"chatdata diff {address} new/copy") == f"identical: build {build_id[:12]}\n"
    refused = f"Error: {address}: build {build_id}, but expected 0123456789ab\n"
    for command in ("stats", "verify", "inspect", "plan --seq-len 64", "reproduce --sample 0"):
        name, *options = command.split()
        assert run(f"chatdata {name} {address} {' '.join(options)} --expect 0123456789ab", 1) == refused
    assert run(f"chatdata pull {address} --out other --expect 0123456789ab", 1) == refused
    assert not (tmp_path / "other").exists()


def test_only_builds_are_pushed(demo_mid: Path, command_line: Callable, tmp_path: Path) -> None:
    result = command_line(f"chatdata push . file://{tmp_path}/place", tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: .: an unfinished build or no build (no manifest.json)\n")
    result = command_line("chatdata reproduce out --out again", tmp_path)
    assert (result.returncode, result.stderr) == (1, "Error: out: no such folder (no manifest.json)\n")
    result = command_line(f"chatdata push {demo_mid} out/place", tmp_path)
    assert (result.returncode, result.stderr.partition(";")[0]) == (
        2,
        "Error: out/place: must be hf://datasets/OWNER/NAME[@REVISION], or a folder like s3://BUCKET/mid\n",
    )


def test_the_report_of_a_build_in_the_cache_is_written_here(
    demo_mid: Path, command_line: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("altair")
    result = command_line(f"chatdata report file://{demo_mid}", tmp_path)
    assert result.returncode == 0, result.stderr
    build_id = json.loads((demo_mid / "manifest.json").read_text())["build_id"]
    assert [path.name for path in tmp_path.glob("*.html")] == [f"{build_id[:12]}-report.html"]


def test_training_from_an_address(demo_mid: Path, command_line: Callable, tmp_path: Path) -> None:
    """run.json has the address; trace finds the build even where that is gone."""
    address = f"file://{tmp_path}/place"
    assert command_line(f"chatdata push {demo_mid} {address}", tmp_path).returncode == 0
    settings = "--init random:d1 --seq-len 64 --device-batch-size 2 --steps 10 --device cpu"
    for data, out in ((demo_mid, "local"), (address, "remote")):
        result = command_line(f"chattrain run --data {data} {settings} --out {out}", tmp_path)
        assert result.returncode == 0, result.stderr
    local, remote = (
        [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        for out in ("local", "remote")
    )
    assert [entry.get("batch") for entry in remote] == [entry.get("batch") for entry in local] and len(remote) >= 10
    assert json.loads((tmp_path / "remote" / "run.json").read_text())["data"] == address
    (tmp_path / "place" / "manifest.json").unlink()
    traced = command_line("chattrain trace remote --step 3", tmp_path)
    assert traced.returncode == 0 and "simple_spelling" in traced.stdout, traced.stderr
