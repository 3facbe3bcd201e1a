"""Every command that reads a build: refused with the first line of `verify`, or the build is left as it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chatdata.check.verify import verify_quick

READERS = [
    "chatdata stats b",
    "chatdata inspect b --doc 0",
    "chatdata inspect b --task demo_math",
    "chatdata plan b --seq-len 512",
    "chatdata report b --out r.html",
    "chatdata export b --to olmo --out o",
    "chatdata diff b whole",
    "chatdata diff whole b",
    "chatdata tokenizer show b",
    "chatdata build --stage mid --demo --limit 3 --tokenizer b --out made",
    "chattrain run --data b --init random:1x64x2 --seq-len 64 --device cpu --dry-run",
    "chattrain run --data b --init random:1x64x2 --seq-len 64 --device cpu --mask last-turn --dry-run",
]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 8
    file.write_bytes(data)


def link(file: Path) -> None:
    file.rename(file.parents[2] / file.name)
    file.symlink_to(file.parents[2] / file.name)


def edit(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"stage": "mid"', '"stage": "sft", "stage": "mid"', 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit of offsets": lambda out: flip(out / "train/offsets-00000.npy", 128 + 8 * 9),
    "a flipped bit of the index": lambda out: flip(out / "val/index-00000.parquet", -1),
    "a flipped bit of the tokenizer": lambda out: flip(out / "tokenizer/tokenizer.json", 400),
    "a link out of the build": lambda out: link(out / "train/mask-00000.npy"),
    "a key twice": lambda out: edit(out / "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line(damage: str, demo_mid: Path, tmp_path: Path, command_line: Callable) -> None:
    shutil.copytree(demo_mid, tmp_path / "whole")
    DAMAGE[damage](shutil.copytree(demo_mid, tmp_path / "b"))
    (problem,) = verify_quick(tmp_path / "b")
    for command in READERS:
        result = command_line(command, tmp_path)
        assert (result.returncode, result.stdout) == (1, ""), command
        assert result.stderr == f"Error: {problem.removeprefix(f'{tmp_path}/')}\n", command
    assert not (tmp_path / "made").exists() and not (tmp_path / "r.html").exists()


def test_reading_changes_nothing(demo_mid: Path, tmp_path: Path, command_line: Callable) -> None:
    for name in ("whole", "b"):
        shutil.copytree(demo_mid, tmp_path / name)
    files = [path for path in sorted((tmp_path / "b").rglob("*")) if path.is_file()]
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    for command in READERS:
        assert command_line(command, tmp_path).returncode == 0, command
    assert [path for path in sorted((tmp_path / "b").rglob("*")) if path.is_file()] == files
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in files] == before
