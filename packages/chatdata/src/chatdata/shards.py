"""The format on disk, written and read (docs/format.md is its description).

OUT/manifest.json                        written last, by rename
OUT/{train,val}/tokens-00000.npy         `<u2` or `<u4` [num_tokens]
OUT/{train,val}/mask-00000.npy           `|u1` [num_tokens], 0 or 1, aligned with the token
OUT/{train,val}/offsets-00000.npy        `<i8` [num_documents + 1], 0 … num_tokens
OUT/{train,val}/index-00000.parquet      one row per document
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from chatdata.disk import write_whole
from chatdata.document import Document
from chatdata.errors import FormatError
from chatdata.manifest import KINDS, file_name, read_manifest
from chatdata.masks import apply_policy

if TYPE_CHECKING:
    import datasets
    import polars as pl
    import pyarrow as pa

    from chatdata.masks import MaskPolicy, Ranges
    from chatdata.tokenizer import Tokenizer

MAX_SHARD_TOKENS = 2**27  # 256 MiB of uint16 tokens: few files, and a shard still copies in seconds
INDEX_ROWS = 1 << 17  # in a row group of the index: its spans take about 30 MB while it is made


def index_schema() -> pa.Schema:
    """Columns of the index, one row per document (docs/format.md)."""
    import pyarrow as pa

    span = pa.struct([("role", pa.uint8()), ("start", pa.uint32()), ("length", pa.uint32())])
    return pa.schema(
        [
            ("doc", pa.int64()),
            ("row", pa.int64()),
            ("position", pa.int64()),
            ("task", pa.dictionary(pa.int32(), pa.string())),
            ("entry", pa.int16()),
            ("num_tokens", pa.int32()),
            ("num_supervised", pa.int32()),
            ("num_turns", pa.int32()),
            ("num_tool_calls", pa.int32()),
            ("original_tokens", pa.int32()),
            ("truncated", pa.bool_()),
            ("digest", pa.binary(16)),
            ("spans", pa.list_(span)),
        ]
    )


def shard_bounds(lengths: np.ndarray, max_tokens: int = MAX_SHARD_TOKENS) -> list[tuple[int, int]]:
    """[first, last) documents per shard: a shard closes before the document that would pass `max_tokens`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds, first, used = [], 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, used + max_tokens, side="right")))
        bounds.append((first, last))
        first, used = last, int(ends[last - 1])
    return bounds


def write_shard(
    folder: Path,
    number: int,
    chunks: Iterator[tuple[np.ndarray, np.ndarray]],
    lengths: np.ndarray,
    index: Iterable[pa.Table],
    dtype: np.dtype,
    vocab_size: int,
    threads: Executor | None = None,
) -> dict[str, Any]:
    """Write one shard from (ids, mask) chunks in document order and tables of the index; return its manifest record.

    With `threads` the index is written beside the other files: 0.3 of the 0.5 s that 14 M tokens take.
    ids may be of any integer dtype: they are range-checked before the cast, because numpy wraps 65,536 to 0 in silence.
    Files are written, not memory-mapped: a full disk is then an OSError and not a SIGBUS.
    """
    path = folder / file_name("index", number)
    written = threads.submit(_write_index, path, index) if threads else None
    num_tokens, num_supervised = int(lengths.sum()), 0
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
    record: dict[str, Any] = {"documents": len(lengths), "tokens": num_tokens}
    with (
        _NpyFile(folder / file_name("tokens", number), dtype, num_tokens) as tokens_file,
        _NpyFile(folder / file_name("mask", number), np.dtype("|u1"), num_tokens) as mask_file,
        _NpyFile(folder / file_name("offsets", number), np.dtype("<i8"), len(offsets)) as offsets_file,
    ):
        for ids, mask in chunks:
            check_range(ids, min(vocab_size, np.iinfo(dtype).max + 1))
            tokens_file.write(ids.astype(dtype, copy=False))
            mask_file.write(mask)
            num_supervised += int(np.count_nonzero(mask))
        offsets_file.write(offsets)
    if written:
        written.result()
    else:
        _write_index(path, index)
    record["supervised"] = num_supervised
    record["files"] = {
        "tokens": tokens_file.record(),
        "mask": mask_file.record(),
        "offsets": offsets_file.record(),
        "index": {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size},
    }
    return record


def _write_index(path: Path, index: Iterable[pa.Table]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("wb") as file:
        with pq.ParquetWriter(pa.PythonFile(file), index_schema(), compression="zstd", version="2.6") as writer:
            for table in index:
                writer.write_table(table.cast(index_schema()), row_group_size=INDEX_ROWS)
        file.flush()
        os.fsync(file.fileno())


def check_range(ids: np.ndarray, limit: int) -> None:
    """Raise FormatError if an id is negative or ≥ `limit`."""
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < limit):
        bad = int(ids.max()) if int(ids.max()) >= limit else int(ids.min())
        raise FormatError(f"token id {bad} is outside 0 … {limit - 1}: it does not fit the vocabulary of the shards")


class _NpyFile:
    """A 1-D .npy 1.0 file of known length written in pieces, hashed on the way and synced at the end."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self.path, self.dtype, self.left = path, dtype, length
        self.digest = hashlib.sha256()
        self.length = length

    def __enter__(self) -> _NpyFile:
        header = io.BytesIO()
        contents = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(header, contents)
        self.file = self.path.open("wb", buffering=0)
        self._write(header.getvalue())
        return self

    def write(self, values: np.ndarray) -> None:
        assert values.dtype == self.dtype and values.ndim == 1, (values.dtype, self.dtype)
        self.left -= len(values)
        self._write(np.ascontiguousarray(values).data.cast("B"))

    def _write(self, data: Any) -> None:
        self.digest.update(data)
        view = memoryview(data)
        while len(view):  # an unbuffered write may be short
            view = view[self.file.write(view) :]

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                assert self.left == 0, f"{self.path.name}: {self.left} of {self.length} values missing"
                os.fsync(self.file.fileno())
        finally:
            self.file.close()

    def record(self) -> dict[str, Any]:
        return {"file": self.path.name, "sha256": self.digest.hexdigest(), "bytes": self.path.stat().st_size}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a file of sorted keys, whole or not at all."""
    write_whole(path, (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode())


def open_build(path: str | Path) -> Build:
    """Open a build for reading. Sizes of all files are checked against the manifest; nothing is read yet.

    Raises FormatError if the folder is no finished build or a file is missing or of the wrong size.
    """
    folder = Path(path)
    build = Build(folder, read_manifest(folder))
    for split in build.splits.values():
        for number, shard in enumerate(split.shards):
            for kind in KINDS:
                file, expected = split.path(kind, number), shard["files"][kind]["bytes"]
                if not file.is_file():
                    raise FormatError(f"{file}: missing")
                if file.stat().st_size != expected:
                    raise FormatError(f"{file}: {file.stat().st_size:,} bytes, but the manifest says {expected:,}")
    return build


@dataclass(frozen=True)
class Build:
    """One output folder, open for reading: `build["train"]`, `build.manifest`, `build.tokenizer`."""

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def splits(self) -> dict[str, Split]:
        return {name: Split(self, name) for name in self.manifest["splits"]}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from chatdata.tokenizer import load_tokenizer

        return load_tokenizer(self.path / "tokenizer")

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise KeyError(f"{self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(split):,} documents" for name, split in self.splits.items())
        return f"Build({str(self.path)!r}, stage {self.manifest['stage']}, {sizes})"


@dataclass(frozen=True)
class Split:
    """The documents of one split, memory-mapped. `split[i]` is a Document, `split.index` a polars frame."""

    build: Build
    name: str

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.build.manifest["splits"][self.name]["shards"]

    def path(self, kind: str, number: int) -> Path:
        return self.build.path / self.name / self.shards[number]["files"][kind]["file"]

    @cached_property
    def _maps(self) -> dict[tuple[str, int], np.ndarray]:
        return {}

    def map(self, kind: str, number: int) -> np.ndarray:
        """The memory-mapped array of a shard: kind "tokens", "mask" or "offsets"."""
        key = (kind, number)
        if key not in self._maps:
            try:
                array = np.load(self.path(kind, number), mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise FormatError(f"{self.path(kind, number)}: not a readable .npy file: {error}") from None
            self._maps[key] = array.view(np.ndarray)
        return self._maps[key]

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.cumsum([0, *(shard["documents"] for shard in self.shards)])

    @cached_property
    def _first_tokens(self) -> np.ndarray:
        return np.cumsum([0, *(shard["tokens"] for shard in self.shards)])

    @property
    def num_tokens(self) -> int:
        return int(self._first_tokens[-1])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where documents start in the split (int64 [documents + 1]), over all shards."""
        parts = [self.map("offsets", n)[:-1] + self._first_tokens[n] for n in range(len(self.shards))]
        return np.concatenate([*parts, [self.num_tokens]]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    @overload
    def __getitem__(self, i: SupportsIndex) -> Document: ...

    @overload
    def __getitem__(self, i: slice) -> list[Document]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> Document | list[Document]:
        """Document `i` (views of the maps: nothing is copied), or a list of documents for a slice."""
        if isinstance(i, slice):
            return [self._document(j) for j in range(*i.indices(len(self)))]
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self):,} in {self.name}")
        return self._document(i % len(self))

    def __iter__(self) -> Iterator[Document]:
        return (self._document(i) for i in range(len(self)))

    def _document(self, i: int) -> Document:
        number = int(np.searchsorted(self._first_documents, i, side="right")) - 1
        start, stop = self.map("offsets", number)[i - self._first_documents[number] :][:2].tolist()
        tokens, mask = (self.map(kind, number)[start:stop] for kind in ("tokens", "mask"))
        return Document(tokens, mask, tokenizer=self.build.tokenizer)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the split: a view within one shard, a copy only where the range crosses shards."""
        return self._range("tokens", start, stop)

    def mask(self, start: int, stop: int, policy: MaskPolicy = "supervised") -> np.ndarray:
        """Mask [start, stop) of the split, as `tokens`; a new array under another policy (masks.py) than the stored."""
        stored = self._range("mask", start, stop)
        if policy == "supervised":
            return stored
        return apply_policy(self, policy, stored, np.array([start]), np.array([stop - start]))

    @cached_property
    def ranges(self) -> dict[str, Ranges]:
        """What mask policies have read of the index (filled by masks.py)."""
        return {}

    def _range(self, kind: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.num_tokens:,} in {self.name}")
        number = int(np.searchsorted(self._first_tokens[:-1], start, side="right")) - 1
        pieces = []
        while True:
            first, last = self._first_tokens[number : number + 2].tolist()
            pieces.append(self.map(kind, number)[start - first : min(stop, last) - first])
            if stop <= last:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            start, number = last, number + 1

    def to_dataset(self, policy: MaskPolicy = "supervised") -> datasets.Dataset:
        """The split for `datasets` and TRL: input_ids, labels, assistant_masks, a row per document (dataset.py)."""
        from chatdata.dataset import to_dataset

        return to_dataset(self, policy)

    def index_table(self) -> pa.Table:
        """The index as a pyarrow table (see `index_schema`), without polars; `read_table` would import pandas."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.ParquetFile(self.path("index", n)).read() for n in range(len(self.shards))])

    @cached_property
    def index(self) -> pl.DataFrame:
        """The index as a polars frame: doc, row, position, task, entry, num_tokens, … (docs/format.md)."""
        import polars as pl

        return pl.DataFrame(pl.from_arrow(self.index_table()))
