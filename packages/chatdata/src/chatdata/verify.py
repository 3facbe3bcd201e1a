"""`chatdata verify`: is what lies on disk what the manifest says? Every problem is listed, not only the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chatdata.errors import FormatError
from chatdata.shards import KINDS, Build, Split, file_sha256, read_manifest

_DTYPES = {"mask": "|u1", "offsets": "<i8"}


def verify_quick(path: Path) -> list[str]:
    """Manifest, file sizes, .npy headers, offsets, and counts against the index. Reads offsets and index, no tokens."""
    try:
        build = Build(path, read_manifest(path))
    except FormatError as error:
        return [str(error)]
    problems = []
    for split in build.splits.values():
        for number in range(len(split.shards)):
            problems += _check_shard(split, number, build.manifest["dtype"])
        for key in ("documents", "tokens", "supervised"):
            total = sum(shard[key] for shard in split.shards)
            entries = sum(entry[key] for entry in build.manifest["splits"][split.name]["entries"])
            if total != build.manifest["splits"][split.name][key] or entries != total:
                problems.append(f"{path}: {split.name}: the manifest's {key} do not add up")
    for name, sha256 in build.manifest["tokenizer"]["files"].items():
        file = path / "tokenizer" / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file_sha256(file) != sha256:
            problems.append(f"{file}: SHA-256 differs from the manifest's")
    return problems


def _check_shard(split: Split, number: int, dtype: str) -> list[str]:
    shard = split.shards[number]
    problems = []
    for kind in KINDS:
        file, expected = split.path(kind, number), shard["files"][kind]["bytes"]
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != expected:
            problems.append(f"{file}: {file.stat().st_size:,} bytes, but the manifest says {expected:,}")
    if problems:
        return problems
    lengths = {"tokens": shard["tokens"], "mask": shard["tokens"], "offsets": shard["documents"] + 1}
    for kind, length in lengths.items():
        try:
            array = split.map(kind, number)
        except FormatError as error:
            problems.append(str(error))
            continue
        expected_dtype = _DTYPES.get(kind, dtype)
        if array.dtype.str != expected_dtype or array.shape != (length,):
            problems.append(
                f"{split.path(kind, number)}: {array.dtype.str} of shape {array.shape}, "
                f"but the manifest says {expected_dtype} of shape ({length},)"
            )
    return problems or _check_offsets(split, number, shard)


def _check_offsets(split: Split, number: int, shard: dict[str, Any]) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems = []
    offsets = split.map("offsets", number)
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or not (np.diff(offsets) > 0).all():
        problems.append(f"{split.path('offsets', number)}: offsets do not rise from 0 to {shard['tokens']:,}")
    index_path = split.path("index", number)
    try:
        index = pq.read_table(index_path, columns=["num_tokens", "num_supervised"])
    except (pa.ArrowException, OSError) as error:
        return [*problems, f"{index_path}: not a readable Parquet file: {str(error).splitlines()[0]}"]
    if index.num_rows != shard["documents"]:
        problems.append(f"{index_path}: {index.num_rows:,} rows for {shard['documents']:,} documents")
    elif not np.array_equal(index["num_tokens"].to_numpy(), np.diff(offsets)):
        problems.append(f"{index_path}: num_tokens differs from the offsets")
    if int(index["num_supervised"].to_numpy().sum()) != shard["supervised"]:
        problems.append(f"{index_path}: num_supervised does not add up to {shard['supervised']:,}")
    return problems
