"""The manifest: read, its build_id, and what one of format version 1 looks like: every key, its type and its range
(docs/format.md).

A manifest may come from anywhere. After `manifest_problems` found nothing, every number fits int64, every file name
is the one the format gives it, so that no path leaves the build, and no list or table is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatdata.errors import FormatError
from chatdata.tokenizer.bpe import MAX_UINT16_VOCAB, SPECIAL_TOKENS

FORMAT, VERSION = "chatdata", 1
FILE_KINDS = ("tokens", "mask", "offsets", "index")  # files of a shard
MAX_COUNT = 2**53  # exact as a float as well; a build of this size is 16 petabytes
_COUNT = range(MAX_COUNT)
_SHA256 = "sha256"  # stands for a string of 64 hexadecimal digits

_ENTRY = {
    **dict.fromkeys(("task", "subset", "split", "source"), str),
    **dict.fromkeys(("entry", "rows", "documents", "tokens", "supervised", "truncated", "tokens_lost"), _COUNT),
    "dropped": {str: _COUNT},
}
_SHARD = {
    **{key: range(1, MAX_COUNT) for key in ("documents", "tokens")},
    "supervised": _COUNT,
    "files": {kind: {"file": str, "sha256": _SHA256, "bytes": _COUNT} for kind in FILE_KINDS},
}
_MANIFEST = {
    "format": str,
    "version": _COUNT,
    "build_id": _SHA256,
    "stage": ("base", "mid", "sft"),
    "recipe": {
        "stage": ("base", "mid", "sft"),
        "seed": int,
        "max_tokens": (None, range(1, MAX_COUNT)),
        "overflow": ("keep", "truncate", "drop", "error"),
        "zero_supervised": ("keep", "drop", "error"),
        "shuffle": {str: bool},
        "train": [dict],
    },
    "sources": [
        {"name": str, "revision": (None, str), "files": [{"name": str, "bytes": _COUNT, "sha256": _SHA256}]},
    ],
    "tokenizer": {
        "files": {str: _SHA256},
        "canary_sha256": _SHA256,
        "vocab_size": range(1, 2**32 + 1),
        "special_ids": {str: range(2**32)},
    },
    "dtype": ("<u2", "<u4"),
    "mask": str,
    "splits": {
        str: {**dict.fromkeys(("documents", "tokens", "supervised"), _COUNT), "shards": [_SHARD], "entries": [_ENTRY]}
    },
}


def file_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}.{'parquet' if kind == 'index' else 'npy'}"


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def build_id_of(manifest: dict[str, Any]) -> str:
    """SHA-256 over everything in the manifest but the id itself."""
    return hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "build_id"})).hexdigest()


def parse_manifest(folder: Path) -> Any:
    """The manifest of a build as it stands there, of our format and version and with its own build_id, but not checked
    any further. Raises FormatError."""
    path = folder / "manifest.json"
    if not path.is_file():
        absent = "not a folder" if folder.exists() else "no such folder"
        what = "an unfinished build or no build" if folder.is_dir() else absent
        raise FormatError(f"{folder}: {what} (no manifest.json)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise FormatError(f"{path}: format {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] != VERSION:
            raise FormatError(
                f"{path}: format version {manifest['version']}; this chatdata reads version {VERSION}: "
                "build it again, or read it with the chatdata that wrote it"
            )
        if build_id_of(manifest) != manifest["build_id"]:
            raise FormatError(f"{path}: does not match its build_id: the manifest was changed after the build")
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # 5,000 digits, 1,000 brackets
        raise FormatError(f"{path}: damaged: {type(error).__name__} {str(error).splitlines()[0]}") from None
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build. Raises FormatError if there is none, it is damaged, or its version is unknown."""
    manifest = parse_manifest(folder)
    for problem in manifest_problems(manifest):
        raise FormatError(f"{folder / 'manifest.json'}: {problem}")
    return manifest


def manifest_problems(manifest: Any) -> list[str]:
    """What keeps a manifest from being used, one line each, naming the key; [] if it can be."""
    return list(_mismatches(manifest, _MANIFEST, "")) or list(_contradictions(manifest))


def _mismatches(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Where `value` is not of `shape`: a type, a range of integers, a tuple of possible shapes, [shape of each item],
    {key: shape} with other keys allowed beside, {str: shape of each value}, or a string or None for itself."""
    wrong = f"{where or 'the manifest'}: {_shown(value)}, but expected {_words(shape)}"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield wrong
        elif str in shape:
            for key, item in value.items():
                yield from _mismatches(item, shape[str], f"{where}[{_shown(key)}]")
        else:
            for key, part in shape.items():
                inner = f"{where}.{key}" if where else key
                if key in value:
                    yield from _mismatches(value[key], part, inner)
                else:
                    yield f"{inner}: missing"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield wrong
        else:
            for i, item in enumerate(value):
                yield from _mismatches(item, shape[0], f"{where}[{i}]")
    elif not _fits(value, shape):
        yield wrong


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, option) for option in shape)
    if isinstance(shape, range):
        return type(value) is int and value in shape  # True is an int in Python, but no count
    if isinstance(shape, type):
        return type(value) is shape
    if shape is _SHA256:
        return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value is shape if shape is None else isinstance(value, str) and value == shape


def _words(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_words(option) for option in shape)
    if isinstance(shape, range):
        return f"an integer of {shape.start} … {shape.stop - 1}"
    if shape is _SHA256:
        return "64 hexadecimal digits"
    names: dict[type | None, str] = {str: "a string", int: "an integer", bool: "true or false", None: "null"}
    names |= {dict: "a table", list: "a list"}
    return names.get(type(shape) if isinstance(shape, (dict, list)) else shape) or repr(shape)


def _shown(value: Any) -> str:
    """A value of anybody's, short and printable."""
    try:
        text = ascii(value)
    except ValueError:  # an integer of more than 4,300 digits
        text = "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def _contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """Of a manifest of the right shape: names that are not the format's, and parts that do not go together."""
    splits, tokenizer, recipe = manifest["splits"], manifest["tokenizer"], manifest["recipe"]
    limit = recipe.get("limit")  # early manifests of version 1 have no such key
    if not _fits(limit, (None, range(1, MAX_COUNT))):
        yield f"recipe.limit: {_shown(limit)}, but expected null or a positive integer"
    if recipe["stage"] != manifest["stage"]:
        yield f"stage {manifest['stage']}, but recipe.stage {recipe['stage']}"
    if "train" not in splits or not set(splits) <= {"train", "val"}:
        yield f"splits: {_shown(sorted(splits))}, but expected train, and val if the recipe has one"
    for name, split in splits.items():
        if len(split["entries"]) != len(recipe[name] if isinstance(recipe.get(name), list) else []):
            yield f"splits.{_shown(name)}.entries: {len(split['entries'])}, not as many as the recipe has"
        for number, entry in enumerate(split["entries"]):
            if entry["entry"] != number:
                yield f"splits.{_shown(name)}.entries[{number}].entry: {entry['entry']}, but expected {number}"
        for number, shard in enumerate(split["shards"]):
            for kind in FILE_KINDS:
                found, expected = shard["files"][kind]["file"], file_name(kind, number)
                if found != expected:
                    yield (
                        f"splits.{_shown(name)}.shards[{number}].files.{kind}.file: {_shown(found)}, "
                        f"but expected {expected!r}"
                    )
    for name in tokenizer["files"]:
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", "..") or len(name) > 255:
            yield f"tokenizer.files: {_shown(name)} is not the name of a file in the folder tokenizer"
    ids = list(tokenizer["special_ids"].values())
    missing = [name for name in SPECIAL_TOKENS if name not in tokenizer["special_ids"]]
    if missing:
        yield f"tokenizer.special_ids: {', '.join(missing)} missing"
    if len(set(ids)) != len(ids) or max(ids, default=0) >= tokenizer["vocab_size"]:
        yield "tokenizer.special_ids: not distinct ids below vocab_size"
    if (manifest["dtype"] == "<u4") != (tokenizer["vocab_size"] > MAX_UINT16_VOCAB):
        yield f"dtype {manifest['dtype']} does not go with a vocabulary of {tokenizer['vocab_size']:,}"
