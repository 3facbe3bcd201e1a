"""The manifest of a build: its shape in format version 1 (docs/format.md), reading it, and its build_id.

A manifest may come from anywhere. In one that `read_manifest` returns, every number fits int64, every file name is the
one the format gives it, so that no path leaves the build, and no list or table is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from chatdata.disk import convert, decode, shown
from chatdata.errors import FormatError
from chatdata.recipe import Overflow, Stage, ZeroSupervised
from chatdata.tokenizer.bpe import MAX_UINT16_VOCAB, SPECIAL_TOKENS

FORMAT, VERSION = "chatdata", 1
FILE_NAMES = {  # of a shard, by kind and number
    **{kind: f"{kind}-{{:05d}}.npy" for kind in ("tokens", "mask", "offsets")},
    "index": "index-{:05d}.parquet",
}
FILE_KINDS = tuple(FILE_NAMES)
MAX_COUNT = 2**53 - 1  # exact as a float as well; a build of this size is 16 petabytes

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits")]


class Head(Struct):
    """What every version of the format has."""

    format: str
    version: Count
    build_id: Sha256


class Recipe(Struct):
    stage: Stage
    seed: int
    max_tokens: Positive | None
    overflow: Overflow
    zero_supervised: ZeroSupervised
    shuffle: dict[str, bool]
    train: list[dict[str, Any]]
    val: list[dict[str, Any]] = []
    limit: Positive | None = None  # early manifests of version 1 have no such key


class SourceFile(Struct):
    name: str
    bytes: Count
    sha256: Sha256


class Source(Struct):
    name: str
    revision: str | None
    files: list[SourceFile]


class Tokenizer(Struct):
    files: dict[str, Sha256]
    canary_sha256: Sha256
    vocab_size: Annotated[int, Meta(ge=1, le=2**32)]
    special_ids: dict[str, Annotated[int, Meta(ge=0, le=2**32 - 1)]]


class Counts(Struct):
    documents: Count
    tokens: Count
    supervised: Count


class Entry(Counts):
    task: str
    subset: str
    split: str
    source: str
    entry: Count
    rows: Count
    truncated: Count
    tokens_lost: Count
    dropped: dict[str, Count]


class ShardFile(Struct):
    file: str
    sha256: Sha256
    bytes: Count


class ShardFiles(Struct):
    tokens: ShardFile
    mask: ShardFile
    offsets: ShardFile
    index: ShardFile


class Shard(Counts):
    documents: Positive
    tokens: Positive
    files: ShardFiles


class Split(Counts):
    shards: list[Shard]
    entries: list[Entry]


class Manifest(Head):
    """Other keys are allowed everywhere."""

    stage: Stage
    recipe: Recipe
    sources: list[Source]
    tokenizer: Tokenizer
    dtype: Literal["<u2", "<u4"]
    mask: str
    splits: dict[str, Split]


def build_id_of(manifest: dict[str, Any]) -> str:
    """SHA-256 over everything in the manifest but the id itself, in one spelling: sorted keys, no spaces, UTF-8."""
    content = {key: value for key, value in manifest.items() if key != "build_id"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build: every key, type and range is right, but parts may contradict each other.

    Raises FormatError naming the first wrong key.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        absent = "not a folder" if folder.exists() else "no such folder"
        what = "an unfinished build or no build" if folder.is_dir() else absent
        raise FormatError(f"{folder}: {what} (no manifest.json)")
    manifest: dict[str, Any] = decode(path.read_bytes(), dict, str(path), FormatError)
    head = convert(manifest, Head, str(path), FormatError)
    if head.format != FORMAT:
        raise FormatError(f"{path}: format {shown(head.format)}, not {FORMAT}")
    if head.version != VERSION:
        raise FormatError(
            f"{path}: format version {head.version}; this chatdata reads version {VERSION}: "
            "build it again, or read it with the chatdata that wrote it"
        )
    if head.build_id != build_id_of(manifest):
        raise FormatError(f"{path}: does not match its build_id: the manifest was changed after the build")
    convert(manifest, Manifest, str(path), FormatError)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build. Raises FormatError if there is none, it is damaged, or its version is unknown."""
    manifest = parse_manifest(folder)
    for problem in contradictions(manifest):
        raise FormatError(f"{folder / 'manifest.json'}, {problem}")
    return manifest


def contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """What does not go together in a manifest from `parse_manifest`, and names that are not the format's."""
    recipe, splits, tokenizer = manifest["recipe"], manifest["splits"], manifest["tokenizer"]
    found: list[tuple[str, Any, Any]] = [  # key, what it is, what it must be
        ("recipe.stage", recipe["stage"], manifest["stage"]),
        ("splits", sorted(splits), [name for name in ("train", "val") if name in recipe]),
        ("dtype", manifest["dtype"], "<u4" if tokenizer["vocab_size"] > MAX_UINT16_VOCAB else "<u2"),
    ]
    for name in {"train", "val"} & set(splits):
        split, at = splits[name], f"splits.{name}"
        found.append((f"{at}.entries", len(split["entries"]), len(recipe.get(name, []))))
        found += [(f"{at}.entries[{i}].entry", entry["entry"], i) for i, entry in enumerate(split["entries"])]
        found += [
            (f"{at}.shards[{i}].files.{kind}.file", shard["files"][kind]["file"], FILE_NAMES[kind].format(i))
            for i, shard in enumerate(split["shards"])
            for kind in FILE_KINDS
        ]
    for key, value, expected in found:
        if value != expected:
            yield f'key "{key}": {shown(value)}, but expected {shown(expected)}'
    for name in tokenizer["files"]:
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
            yield f'key "tokenizer.files": {shown(name)} is not the name of a file in the folder tokenizer'
    ids = tokenizer["special_ids"]
    if missing := [name for name in SPECIAL_TOKENS if name not in ids]:
        yield f'key "tokenizer.special_ids": {", ".join(missing)} missing'
    if len(set(ids.values())) != len(ids) or max(ids.values(), default=0) >= tokenizer["vocab_size"]:
        yield 'key "tokenizer.special_ids": must be distinct ids below vocab_size'
