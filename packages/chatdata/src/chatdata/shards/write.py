"""Write one shard: tokens, mask, offsets and index."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatdata.disk import file_sha256
from chatdata.document import check_ids
from chatdata.shards.manifest import FILE_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SHARD_TOKENS = 2**27  # 256 MiB of uint16 tokens: few files, and a shard still copies in seconds
INDEX_ROWS = 1 << 17  # in a row group of the index: its spans take about 30 MB while they are gathered


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

    With `threads` the index is written alongside the other files: 0.3 of the 0.5 s that 14 M tokens take.
    ids may have any integer dtype: they are range-checked before the cast, because numpy silently wraps 65,536 to 0.
    Files are written, not memory-mapped: a full disk is then an OSError and not a SIGBUS.
    """
    index_path = folder / FILE_NAMES["index"].format(number)
    writing = threads.submit(_write_index, index_path, index) if threads else None
    num_tokens, num_supervised = int(lengths.sum()), 0
    tokens_file = _NpyFile(folder / FILE_NAMES["tokens"].format(number), dtype, num_tokens)
    mask_file = _NpyFile(folder / FILE_NAMES["mask"].format(number), np.dtype("|u1"), num_tokens)
    offsets_file = _NpyFile(folder / FILE_NAMES["offsets"].format(number), np.dtype("<i8"), len(lengths) + 1)
    with tokens_file.file, mask_file.file, offsets_file.file:
        if not writing:
            _write_index(index_path, index)
        for ids, mask in chunks:
            check_ids(ids, min(vocab_size, np.iinfo(dtype).max + 1))
            tokens_file.write(ids.astype(dtype, copy=False))
            mask_file.write(mask)
            num_supervised += int(np.count_nonzero(mask))
        offsets_file.write(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8"))
        files = {"tokens": tokens_file.finish(), "mask": mask_file.finish(), "offsets": offsets_file.finish()}
    if writing:
        writing.result()
    size = index_path.stat().st_size
    files["index"] = {"file": index_path.name, "sha256": file_sha256(index_path), "bytes": size}
    return {"documents": len(lengths), "tokens": num_tokens, "supervised": num_supervised, "files": files}


def _write_index(path: Path, index: Iterable[pa.Table]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = index_schema()
    with path.open("wb") as file:
        with pq.ParquetWriter(pa.PythonFile(file), schema, compression="zstd", version="2.6") as writer:
            for table in index:
                writer.write_table(table.cast(schema), row_group_size=INDEX_ROWS)
        file.flush()
        os.fsync(file.fileno())


class _NpyFile:
    """A 1-D .npy 1.0 file of known length, written in pieces and hashed on the way."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        header = io.BytesIO()
        contents = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(header, contents)
        self.path, self.dtype, self.left = path, dtype, length
        self.digest = hashlib.sha256(header.getvalue())
        self.file = path.open("wb")
        self.file.write(header.getvalue())

    def write(self, values: np.ndarray) -> None:
        assert values.dtype == self.dtype and values.ndim == 1, (values.dtype, self.dtype)
        self.left -= len(values)
        data = np.ascontiguousarray(values).data.cast("B")
        self.digest.update(data)
        self.file.write(data)

    def finish(self) -> dict[str, Any]:
        """Sync the file and return its manifest record."""
        assert self.left == 0, f"{self.path.name}: {self.left} values missing"
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.path.stat().st_size
        return {"file": self.path.name, "sha256": self.digest.hexdigest(), "bytes": size}
