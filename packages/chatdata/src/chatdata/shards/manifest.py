"""The manifest of a build: its shape in format version 2 (docs/format.md), its build_id, and what it says of the files.

A manifest may come from anywhere. In one that `read_manifest` returns, every number fits int64, every file name is the
one the format gives it, so that no path leaves the build, no list or table is missing, and totals are sums.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from chatdata.disk import Count, Positive, convert, decode, file_sha256, shown
from chatdata.errors import FormatError
from chatdata.recipe import NATIVE, EntryHead, Overflow, Stage, ZeroSupervised
from chatdata.shards.index import read_index
from chatdata.tokenizer.bpe import MAX_UINT16_VOCAB, MAX_VOCAB, SPECIAL_TOKENS

FORMAT, VERSION = "chatdata", 2
FILE_KINDS = ("tokens", "mask", "offsets", "index")
# of a shard, by its number
FILE_NAMES = {kind: f"{kind}-{{:05d}}.{'parquet' if kind == 'index' else 'npy'}" for kind in FILE_KINDS}
LARGE_KINDS = ("tokens", "mask")  # hashed by `verify --level full` alone: 1 GB takes 0.6 s or more
HEADER_BYTES = 128  # of a .npy file
MARK = ".chatdata-build"  # a file in every folder of ours that is not OUT: no other folder is ever cleared

CHAT_FORMATS = r"^(nanochat|renderers:[^@\s]+@\S+|template:[0-9a-f]{64})\Z"
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
    train: list[EntryHead]
    limit: Positive | None
    val: list[EntryHead] = []


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
    vocab_size: Annotated[int, Meta(ge=1, le=MAX_VOCAB)]
    special_ids: dict[str, Annotated[int, Meta(ge=0, le=2**32 - 1)]]


class Counts(Struct):
    documents: Count
    tokens: Count
    supervised: Count


class Entry(Counts):
    task: str
    name: str
    subset: str
    split: str
    source: str
    entry: Count
    rows: Count
    truncated: Count
    tokens_lost: Count
    dropped: dict[str, Count]
    merged: Count


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
    shards: Annotated[list[Shard], Meta(min_length=1, description="a list of one or more shards")]
    entries: Annotated[list[Entry], Meta(min_length=1, description="a list of one or more entries")]


class Manifest(Head):
    """Other keys are allowed everywhere."""

    stage: Stage
    chat_format: Annotated[str, Meta(pattern=CHAT_FORMATS, description="the chat format")]
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


def other_files(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """Files, folders and links in the folder of a build, at any depth, that are not the build's."""
    known = {*(file for _, file, _ in build_files(folder, manifest)), folder / MARK}
    folders = {file.parent for file in known}

    def is_ours(path: Path) -> bool:
        return path in folders and not path.is_symlink() if path.is_dir() else path in known

    return sorted(path for path in folder.rglob("*") if not is_ours(path))


def contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """What does not go together in a manifest from `parse_manifest`, and names that are not the format's."""
    recipe, splits, tokenizer = manifest["recipe"], manifest["splits"], manifest["tokenizer"]
    name_of_format = re.split("[:@]", manifest["chat_format"].removeprefix("renderers:"))[0]
    found: list[tuple[str, Any, Any]] = [  # key, what it is, what it must be
        ("recipe.stage", recipe["stage"], manifest["stage"]),
        ("splits", sorted(splits), [name for name in ("train", "val") if name in recipe]),
        ("recipe.chat_format", recipe.get("chat_format"), name_of_format),
        ("dtype", manifest["dtype"], "<u4" if tokenizer["vocab_size"] > MAX_UINT16_VOCAB else "<u2"),
    ]
    for name in {"train", "val"} & set(splits):
        split, at = splits[name], f"splits.{name}"
        sources, asked = [source["name"] for source in manifest["sources"]], recipe.get(name, [])
        for i, (entry, wanted) in enumerate(zip(split["entries"], asked, strict=False)):
            expected = {key: wanted.get(key) for key in ("task", "name", "subset", "split")}
            expected["source"] = entry["source"] if entry["source"] in sources else sources
            expected |= {"entry": i, "rows": entry["documents"] + sum(entry["dropped"].values())}
            found += [(f"{at}.entries[{i}].{key}", entry[key], value) for key, value in expected.items()]
        found.append((f"{at}.entries", len(split["entries"]), len(asked)))
        for key, parts in product(("documents", "tokens", "supervised"), ("shards", "entries")):
            found.append((f"{at}.{key}", split[key], sum(part[key] for part in split[parts])))
        for (i, shard), kind in product(enumerate(split["shards"]), FILE_KINDS):
            file = shard["files"][kind]["file"]
            found.append((f"{at}.shards[{i}].files.{kind}.file", file, FILE_NAMES[kind].format(i)))
    for key, value, expected in found:
        if value != expected:
            yield f'key "{key}": {shown(value)}, but expected {shown(expected)}'
    for name in tokenizer["files"]:
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 255:
            yield f'key "tokenizer.files": {shown(name)} is not the name of a file in the folder tokenizer'
    ids = tokenizer["special_ids"]
    missing = [name for name in SPECIAL_TOKENS if name not in ids]
    if manifest["chat_format"] == NATIVE and missing:
        yield f'key "tokenizer.special_ids": {", ".join(missing)} missing'
    if len(set(ids.values())) != len(ids) or max(ids.values(), default=0) >= tokenizer["vocab_size"]:
        yield 'key "tokenizer.special_ids": must be distinct ids below vocab_size'


def build_files(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Every file that a build may have: kind, path, and what the manifest says of it (sha256, bytes or nothing)."""
    yield from (("other", folder / name, {}) for name in ("manifest.json", "report.json", "firewall.json"))
    for name, sha256 in manifest["tokenizer"]["files"].items():
        yield "tokenizer", folder / "tokenizer" / name, {"sha256": sha256}
    for name, split in manifest["splits"].items():
        for files in (shard["files"] for shard in split["shards"]):
            yield from ((kind, folder / name / files[kind]["file"], files[kind]) for kind in FILE_KINDS)


def file_problem(file: Path, record: dict[str, Any], hashed: bool = True) -> str | None:
    """What is wrong with a file by what the manifest says of it, nothing if that is nothing."""
    if not file.is_file():
        return "missing" if record else None
    size = file.stat().st_size
    if size != record.get("bytes", size):
        return f"{size:,} bytes, but the manifest says {record['bytes']:,}"
    differs = record and hashed and file_sha256(file) != record["sha256"]
    return "SHA-256 differs from the manifest's" if differs else None


def check_files(folder: Path, manifest: dict[str, Any]) -> tuple[list[str], dict[str, list[int]]]:
    """What is wrong with the files of a build, and for each split the shards whose documents can be read anyway.

    Checked at every opening: links, sizes, headers, offsets, index, and the SHA-256 of all but LARGE_KINDS. That is
    3 ms for the demo and 60 ms for a build of 1 GB. manifest: from `read_manifest`. If a file is a link out of the
    folder, none is read, and there are no splits in the result.
    """
    root, files = os.path.realpath(folder), list(build_files(folder, manifest))
    paths = [*(file for _, file, _ in files), *(folder / name for name in ("tokenizer", *manifest["splits"]))]
    if outside := [path for path in paths if not Path(os.path.realpath(path)).is_relative_to(root)]:
        return [f"{path}: a link out of the build" for path in outside], {}
    wrong = {f: problem for kind, f, record in files if (problem := file_problem(f, record, kind not in LARGE_KINDS))}
    problems, readable = [f"{file}: {problem}" for file, problem in wrong.items()], dict[str, list[int]]()
    for name, split in manifest["splits"].items():
        readable[name] = []
        for number, shard in enumerate(split["shards"]):
            paths_of = {kind: folder / name / shard["files"][kind]["file"] for kind in FILE_KINDS}
            if wrong.keys().isdisjoint(paths_of.values()):
                found, sound = _check_shard(paths_of, shard, manifest["dtype"])
                problems += found
                readable[name] += [number] if sound else []
    return problems, readable


def npy_header(descr: str, length: int) -> bytes:
    """The HEADER_BYTES of a one-dimensional .npy file, as NumPy writes them."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({length},), }}".ljust(HEADER_BYTES - 11)
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode() + b"\n"


def _check_shard(files: dict[str, Path], shard: dict[str, Any], dtype: str) -> tuple[list[str], bool]:
    """Where headers, offsets and index of a shard disagree, and whether its documents can be read anyway."""
    problems, num_tokens = [], shard["tokens"]
    arrays = {"tokens": (dtype, num_tokens), "mask": ("|u1", num_tokens), "offsets": ("<i8", shard["documents"] + 1)}
    for kind, (descr, length) in arrays.items():
        with files[kind].open("rb") as opened:
            header = opened.read(HEADER_BYTES)
        size, expected_size = files[kind].stat().st_size, HEADER_BYTES + length * np.dtype(descr).itemsize
        if header != npy_header(descr, length):  # not parsed: numpy fails in many ways on a damaged one
            known = re.match(rb"\x93NUMPY\x01\x00..{'descr': '([^']*)', .*'shape': (\([0-9, ]*\))", header, re.DOTALL)
            here = b" of shape ".join(known.groups()).decode("ascii", "replace") if known else "another header"
            problems.append(f"{files[kind]}: {here}, but the manifest says {descr} of shape ({length},)")
        elif size != expected_size:
            problems.append(f"{files[kind]}: {size:,} bytes, but {length:,} values of {descr} make {expected_size:,}")
    if problems:
        return problems, False
    offsets = np.fromfile(files["offsets"], "<i8", offset=HEADER_BYTES)
    if offsets[0] != 0 or offsets[-1] != num_tokens or not (offsets[1:] > offsets[:-1]).all():
        return [f"{files['offsets']}: offsets do not rise from 0 to {num_tokens:,}"], False
    try:
        index = read_index(files["index"], ["num_tokens", "num_supervised"], shard)
    except FormatError as error:
        return [str(error)], False
    lengths, supervised = (np.from_dlpack(column.combine_chunks()) for column in index.columns)
    if not np.array_equal(lengths, np.diff(offsets)):
        problems.append(f"{files['index']}: num_tokens differs from the offsets")
    if int(supervised.sum()) != shard["supervised"]:
        problems.append(f"{files['index']}: num_supervised does not add up to {shard['supervised']:,}")
    return problems, True
