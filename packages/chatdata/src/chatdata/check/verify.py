"""`chatdata verify`: do the files of a build match its manifest and the format? Lists every problem.

quick     what `open_build` checks: manifest, sizes, headers, SHA-256 of small files (milliseconds)
full      also SHA-256 of tokens and mask, tokenizer, contract of every document  (12.4 M tokens: 2 s)
semantic  also sources, order, and a share of the documents rendered again        (rerender.py)

A manifest is data from anywhere: nothing in it is used before `contradictions` found none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.disk import file_sha256
from chatdata.errors import ChatdataError, FormatError
from chatdata.progress import Progress, no_progress
from chatdata.render.contract import Finding, Rules, check_documents
from chatdata.render.spans import WHOLE_DOCUMENT
from chatdata.shards.index import index_arrays, read_index
from chatdata.shards.manifest import LARGE_KINDS, build_files, check_files, contradictions, other_files, parse_manifest
from chatdata.shards.read import Build, Split

SHOWN_PER_KIND = 10  # problems of one kind that are listed; the rest are counted


def verify_quick(path: Path) -> list[str]:
    """Everything that `open_build` checks (see `check_files`). Reads no tokens."""
    return _quick(path)[1]


def verify_full(path: Path, progress: Progress = no_progress) -> list[str]:
    """Everything of quick, SHA-256 of every file, unknown files, the tokenizer, and the contract of all documents."""
    build, problems, sound = _quick(path)
    if build is None:
        return problems
    others = [f"{file}: not a file of the build" for file in other_files(path, build.manifest)]
    problems += shortened(others, "not files of the build")
    if not sound:  # a link out of the build: no file was read, and none will be
        return problems
    problems += hash_problems(build, progress)
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
    return (None, problems, {}) if problems else (Build(path, manifest), *check_files(path, manifest))


def hash_problems(build: Build, progress: Progress) -> list[str]:
    """Of tokens and mask: `check_files` hashes all others."""
    found, problems, done = build_files(build.path, build.manifest), [], 0
    files = [(file, record) for kind, file, record in found if kind in LARGE_KINDS]
    total = sum(record["bytes"] for _, record in files)
    for file, record in files:
        if file.is_file() and file_sha256(file) != record["sha256"]:
            problems.append(f"{file}: SHA-256 differs from the manifest's")
        done += record["bytes"]
        progress("hash", done, total, "bytes")
    return problems


def _tokenizer_problems(build: Build) -> list[str]:
    recorded = build.manifest["tokenizer"]
    try:
        found = {key: getattr(build.tokenizer, key) for key in ("vocab_size", "special_ids", "canary_sha256")}
    except (ChatdataError, OSError) as error:
        return [str(error)]
    wrong = [key for key, value in found.items() if value != recorded[key]]
    return [f"{build.path / 'tokenizer'}: {key} differs from the manifest's" for key in wrong]


def rules_of(manifest: dict[str, Any]) -> Rules:
    """The rules that a manifest sets for its documents."""
    tokenizer, recipe = manifest["tokenizer"], manifest["recipe"]
    policies = {key: recipe[key] for key in ("max_tokens", "overflow", "zero_supervised", "chat_format")}
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
        here = f"{split.build.path / 'manifest.json'}: {split.name} entry {i} ({entry['task']})"
        wrong = {key: int(values[i]) for key, values in sums.items() if entry[key] != int(values[i])}
        problems += [f"{here}: {key} is {entry[key]:,}, but the index adds up to {n:,}" for key, n in wrong.items()]
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
        "negative row or task position": (index["row"] < 0) | (index["task_position"] < 0),
    }
    found = ((kind, np.flatnonzero(wrong)) for kind, wrong in checks.items())
    return [Finding("index", kind, docs, np.full(len(docs), WHOLE_DOCUMENT)) for kind, docs in found if len(docs)]


def _add_sums(sums: dict[str, np.ndarray], index: dict[str, np.ndarray]) -> None:
    num_entries = len(sums["documents"])
    known = (index["entry"] >= 0) & (index["entry"] < num_entries)
    entry = index["entry"][known].astype(np.int64)
    values = {"documents": np.ones(len(known)), "tokens": index["num_tokens"], "supervised": index["num_supervised"]}
    values["tokens_lost"] = index["original_tokens"].astype(np.int64) - index["num_tokens"]
    values["truncated"] = index["truncated"]
    for key in sums:  # float64 is exact up to 2**53
        sums[key] += np.bincount(entry, weights=values[key][known], minlength=num_entries)


def _described(finding: Finding, file: Path, split: str, first: int) -> list[str]:
    places = zip(finding.documents[:SHOWN_PER_KIND].tolist(), finding.positions[:SHOWN_PER_KIND].tolist(), strict=True)
    lines = []
    for document, position in places:
        at = "" if position == WHOLE_DOCUMENT else f", position {position:,}"
        lines.append(f"{file}: {finding.kind}: {split} document {first + document}{at}")
    rest = len(finding.documents) - SHOWN_PER_KIND
    return [*lines, f"{file}: {finding.kind}: and {rest:,} more documents"] if rest > 0 else lines


def shortened(problems: list[str], what: str) -> list[str]:
    """The first problems of a list, and a line that counts the rest."""
    rest = len(problems) - SHOWN_PER_KIND
    return [*problems[:SHOWN_PER_KIND], f"and {rest:,} more {what}"] if rest > 0 else problems
