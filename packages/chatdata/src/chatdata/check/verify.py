"""`chatdata verify`: do the files of a build match its manifest and the format? Lists every problem.

quick     manifest, file sizes and headers, offsets, counts                       (milliseconds)
full      also SHA-256 of every file, tokenizer, contract of every document       (12.4 M tokens: 2 s)
semantic  also sources, order, and a share of the documents rendered again        (rerender.py)

A manifest is data from anywhere: nothing in it is used before `contradictions` found none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.arrow import values_of
from chatdata.build.run import MARK
from chatdata.disk import file_sha256
from chatdata.errors import ChatdataError, FormatError
from chatdata.progress import Progress, no_progress
from chatdata.render.contract import WHOLE_DOCUMENT, Finding, Rules, check_documents
from chatdata.shards.index import index_arrays, read_index
from chatdata.shards.manifest import FILE_KINDS, contradictions, parse_manifest
from chatdata.shards.read import Build, Split

SHOWN_PER_KIND = 10  # problems of one kind that are listed; the rest are counted
HEADER_BYTES = 128


def verify_quick(path: Path) -> list[str]:
    """Manifest, links, file sizes, .npy headers, offsets, and counts against the index. Reads no tokens."""
    return _quick(path)[1]


def verify_full(path: Path, progress: Progress = no_progress) -> list[str]:
    """Everything of quick, SHA-256 of every file, unknown files, the tokenizer, and the contract of every document."""
    build, problems, sound = _quick(path)
    if build is None:
        return problems
    problems += _hash_problems(build, progress)
    problems += _unknown_files(build)
    problems += _tokenizer_problems(build)
    for split in build.splits.values():
        problems += _split_problems(split, sound[split.name], progress)
    return problems


def _quick(path: Path) -> tuple[Build | None, list[str], dict[str, list[int]]]:
    """The build (None if its manifest cannot be used), what is wrong, and per split the shards that can be read."""
    try:
        manifest = parse_manifest(path)
    except FormatError as error:
        return None, [str(error)], {}
    problems = [f"{path / 'manifest.json'}, {problem}" for problem in contradictions(manifest)]
    if problems:
        return None, problems, {}
    build = Build(path, manifest)
    problems += _links(build)
    sound: dict[str, list[int]] = {}
    for name, split in build.splits.items():
        checked = [_check_shard(split, number) for number in range(len(split.shards))]
        problems += [problem for found, _ in checked for problem in found]
        sound[name] = [number for number, (_, readable) in enumerate(checked) if readable]
        problems += _check_sums(split)
    for name, sha256 in manifest["tokenizer"]["files"].items():
        file = path / "tokenizer" / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file_sha256(file) != sha256:
            problems.append(f"{file}: SHA-256 differs from the manifest's")
    return build, problems, sound


def _build_files(build: Build) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every shard file and its record in the manifest."""
    for split in build.splits.values():
        for number, shard in enumerate(split.shards):
            for kind in FILE_KINDS:
                yield split.path(kind, number), shard["files"][kind]


def _known_files(build: Build) -> Iterator[Path]:
    yield from (build.path / name for name in ("manifest.json", "report.json"))
    yield from (build.path / "tokenizer" / name for name in build.manifest["tokenizer"]["files"])
    yield from (file for file, _ in _build_files(build))


def _links(build: Build) -> list[str]:
    root, files = build.path.resolve(), [*_known_files(build)]
    files += [build.path / name for name in ("tokenizer", *build.splits)]
    return [f"{file}: a link out of the build" for file in files if not file.resolve().is_relative_to(root)]


def _check_sums(split: Split) -> list[str]:
    contents, problems = split.build.manifest["splits"][split.name], []
    for key in ("documents", "tokens", "supervised"):
        total = sum(shard[key] for shard in split.shards)
        if total != contents[key] or sum(entry[key] for entry in contents["entries"]) != total:
            problems.append(f"{split.build.path}: {split.name}: the manifest's {key} do not add up")
    if any(entry["rows"] != entry["documents"] + sum(entry["dropped"].values()) for entry in contents["entries"]):
        problems.append(f"{split.build.path}: {split.name}: the manifest's rows are not documents + dropped")
    return problems


def _check_shard(split: Split, number: int) -> tuple[list[str], bool]:
    """What is wrong with the files of a shard, and whether its documents can be read anyway."""
    shard, dtype = split.shards[number], split.build.manifest["dtype"]
    problems = list(split.file_problems(number))
    if problems:
        return problems, False
    lengths = {"tokens": shard["tokens"], "mask": shard["tokens"], "offsets": shard["documents"] + 1}
    for kind, length in lengths.items():
        expected_dtype = {"mask": "|u1", "offsets": "<i8"}.get(kind, dtype)
        problems += _check_header(split.path(kind, number), expected_dtype, length)
    if problems:
        return problems, False
    offsets = split.map("offsets", number)
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or not (offsets[1:] > offsets[:-1]).all():
        problems.append(f"{split.path('offsets', number)}: offsets do not rise from 0 to {shard['tokens']:,}")
    index_path = split.path("index", number)
    try:
        index = read_index(index_path, ["num_tokens", "num_supervised"])
    except FormatError as error:
        return [*problems, str(error)], False
    readable = not problems and index.num_rows == shard["documents"]
    if index.num_rows != shard["documents"]:
        problems.append(f"{index_path}: {index.num_rows:,} rows for {shard['documents']:,} documents")
    elif not np.array_equal(values_of(index["num_tokens"]), np.diff(offsets)):
        problems.append(f"{index_path}: num_tokens differs from the offsets")
    if int(values_of(index["num_supervised"]).sum()) != shard["supervised"]:
        problems.append(f"{index_path}: num_supervised does not add up to {shard['supervised']:,}")
    return problems, readable


def _check_header(file: Path, dtype: str, length: int) -> list[str]:
    """A .npy 1.0 header is compared as bytes, not parsed: numpy's parser fails in many ways on a damaged one."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"
    expected = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.ljust(HEADER_BYTES - 11).encode()
    with file.open("rb") as opened:
        header = opened.read(HEADER_BYTES)
    size, expected_size = file.stat().st_size, HEADER_BYTES + length * np.dtype(dtype).itemsize
    if header != expected + b"\n":
        found = re.match(rb"\x93NUMPY\x01\x00..{'descr': '([^']*)', .*'shape': (\([0-9, ]*\))", header, re.DOTALL)
        here = "{} of shape {}".format(*(part.decode("ascii", "replace") for part in found.groups())) if found else ""
        return [f"{file}: {here or 'another header'}, but the manifest says {dtype} of shape ({length},)"]
    if size != expected_size:
        return [f"{file}: {size:,} bytes, but {length:,} values of {dtype} make {expected_size:,}"]
    return []


def _hash_problems(build: Build, progress: Progress) -> list[str]:
    files, problems, done = list(_build_files(build)), [], 0
    total = sum(record["bytes"] for _, record in files)
    for file, record in files:
        if file.is_file() and file_sha256(file) != record["sha256"]:
            problems.append(f"{file}: SHA-256 differs from the manifest's")
        done += record["bytes"]
        progress("hash", done, total, "bytes")
    return problems


def _unknown_files(build: Build) -> list[str]:
    known = {*_known_files(build), build.path / MARK}
    folders = {build.path, *(file.parent for file in known)}
    unknown = []
    for folder, subfolders, names in os.walk(build.path):
        unknown += [path for path in (Path(folder, name) for name in names) if path not in known]
        unknown += [path for path in (Path(folder, name) for name in subfolders) if path not in folders]
    return shortened([f"{path}: not a file of the build" for path in sorted(unknown)], "not files of the build")


def _tokenizer_problems(build: Build) -> list[str]:
    recorded = build.manifest["tokenizer"]
    try:
        tokenizer = build.tokenizer
        found = {key: getattr(tokenizer, key) for key in ("vocab_size", "special_ids", "canary_sha256")}
    except (ChatdataError, OSError) as error:
        return [str(error)]
    return [
        f"{build.path / 'tokenizer'}: {key} differs from the manifest's"
        for key, value in found.items()
        if value != recorded[key]
    ]


def rules_of(manifest: dict[str, Any]) -> Rules:
    """The rules that a manifest sets for its documents."""
    tokenizer, recipe = manifest["tokenizer"], manifest["recipe"]
    policies = {key: recipe[key] for key in ("max_tokens", "overflow", "zero_supervised")}
    return Rules(tokenizer["special_ids"], tokenizer["vocab_size"], manifest["stage"], **policies)


def _split_problems(split: Split, sound: list[int], progress: Progress) -> list[str]:
    """Documents of the sound shards that break the contract; and sums of the ledger, if all shards can be read."""
    entries = split.build.manifest["splits"][split.name]["entries"]
    rules, problems, first, first_token = rules_of(split.build.manifest), [], 0, 0
    sums = {key: np.zeros(len(entries)) for key in ("documents", "tokens", "supervised", "truncated", "tokens_lost")}
    complete = len(sound) == len(split.shards)
    for number, shard in enumerate(split.shards):
        try:
            index = index_arrays(read_index(split.path("index", number))) if number in sound else None
        except FormatError as error:
            problems.append(str(error))
            index, complete = None, False
        if index is not None:
            tokens, mask, offsets = (split.map(kind, number) for kind in ("tokens", "mask", "offsets"))
            findings = check_documents(tokens, mask, offsets, index, rules, _reporter(progress, split, first_token))
            findings += _check_numbering(index, first, entries)
            for finding in findings:
                problems += _described(finding, split.path(finding.file, number), split.name, first)
            _add_sums(sums, index)
        first, first_token = first + shard["documents"], first_token + shard["tokens"]
    for i, entry in enumerate(entries) if complete else ():
        problems += [
            f"{split.build.path / 'manifest.json'}: {split.name} entry {i} ({entry['task']}): {key} is "
            f"{entry[key]:,}, but the index adds up to {int(values[i]):,}"
            for key, values in sums.items()
            if entry[key] != int(values[i])
        ]
    return problems


def _reporter(progress: Progress, split: Split, first: int) -> Callable[[int], None]:
    return lambda done: progress(f"check {split.name}", first + done, split.num_tokens, "tokens")


def _check_numbering(index: dict[str, np.ndarray], first: int, entries: list[dict[str, Any]]) -> list[Finding]:
    entry, known = index["entry"], (index["entry"] >= 0) & (index["entry"] < len(entries))
    tasks = np.array([line["task"] for line in entries], dtype=object)
    checks = {
        "doc does not count up": index["doc"] != first + np.arange(len(entry)),
        f"entry is not one of 0 … {len(entries) - 1}": ~known,
        "task differs from the entry's": known & (tasks[np.where(known, entry, 0)] != index["task"]),
        "negative row or position": (index["row"] < 0) | (index["position"] < 0),
    }
    found = ((kind, np.flatnonzero(wrong)) for kind, wrong in checks.items())
    return [Finding("index", kind, docs, np.full(len(docs), WHOLE_DOCUMENT)) for kind, docs in found if len(docs)]


def _add_sums(sums: dict[str, np.ndarray], index: dict[str, np.ndarray]) -> None:
    num_entries = len(sums["documents"])
    known = (index["entry"] >= 0) & (index["entry"] < num_entries)
    entry = index["entry"][known].astype(np.int64)
    lost = index["original_tokens"].astype(np.int64) - index["num_tokens"]
    columns = {"tokens": "num_tokens", "supervised": "num_supervised", "truncated": "truncated"}
    values = {key: index[column] for key, column in columns.items()} | {"tokens_lost": lost}
    values["documents"] = np.ones(len(known), dtype=np.int64)
    for key in sums:  # float64 is exact up to 2**53
        sums[key] += np.bincount(entry, weights=values[key][known], minlength=num_entries)


def _described(finding: Finding, file: Path, split: str, first: int) -> list[str]:
    places = zip(finding.documents[:SHOWN_PER_KIND].tolist(), finding.positions[:SHOWN_PER_KIND].tolist(), strict=True)
    lines = [
        f"{file}: {finding.kind}: {split} document {first + document}"
        + ("" if position == WHOLE_DOCUMENT else f", position {position:,}")
        for document, position in places
    ]
    rest = len(finding.documents) - SHOWN_PER_KIND
    return [*lines, f"{file}: {finding.kind}: and {rest:,} more documents"] if rest > 0 else lines


def shortened(problems: list[str], what: str) -> list[str]:
    """The first problems of a list, and a line that counts the rest."""
    rest = len(problems) - SHOWN_PER_KIND
    return [*problems[:SHOWN_PER_KIND], f"and {rest:,} more {what}"] if rest > 0 else problems
