"""The index of a shard, which may be damaged: its columns, reading it, its columns as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatdata.arrow import to_numpy, values_of
from chatdata.document import INDEX_COUNTS, Span
from chatdata.errors import FormatError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def index_schema() -> pa.Schema:
    """Columns of the index, one row per document (docs/format.md)."""
    import pyarrow as pa

    span = pa.struct({"role": pa.uint8(), "start": pa.uint32(), "length": pa.uint32(), "trained": pa.bool_()})
    columns = {
        **dict.fromkeys(("doc", "row", "task_position"), pa.int64()),
        "task": pa.dictionary(pa.int32(), pa.string()),
        "entry": pa.int16(),
        **dict.fromkeys(INDEX_COUNTS, pa.int32()),
        "truncated": pa.bool_(),
        "digest": pa.binary(16),
        "spans": pa.list_(span),
    }
    return pa.schema(columns)


@contextmanager
def open_index(path: Path) -> Iterator[pq.ParquetFile]:
    """The index of one shard, open for reading. Whatever is wrong with it is a FormatError naming the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(index_schema()):
                raise FormatError(f"{path}: columns are not those of the format (docs/format.md)")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def read_index(path: Path, columns: list[str] | None = None, shard: Mapping[str, Any] | None = None) -> pa.Table:
    """The index of one shard as a table, typed and without nulls. Raises FormatError naming the file if it is not.

    shard: of the manifest. Its documents and tokens bound what the file may hold before any of it is read: equal rows
    and spans hardly take space on disk.
    """
    with open_index(path) as file:
        if shard is not None:
            metadata, documents, tokens = file.metadata, shard["documents"], shard["tokens"]
            if metadata.num_rows != documents:
                raise FormatError(f"{path}: {metadata.num_rows:,} rows for {documents:,} documents")
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            spans = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith("spans."))
            num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks)
            if spans > 3 * (tokens + documents) or num_bytes > 2**20 + 256 * documents + 32 * tokens:
                raise FormatError(f"{path}: {num_bytes:,} bytes unpacked, more than {tokens:,} tokens can have")
        table = file.read(columns)
        table.validate(full=True)
    for name in table.column_names:
        values = table[name].combine_chunks()
        parts = [values, values.values, *values.values.flatten()] if name == "spans" else [values]
        if any(part.null_count for part in parts):
            raise FormatError(f"{path}: column {name} has nulls")
    return table


def index_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of an index as arrays, [documents] each (digest: uint8 [documents, 16]), spans taken apart.

    num_spans is [documents]; span_role, span_start, span_length and span_trained are [sum of num_spans]. `task` is an
    array of str.
    """
    plain = [name for name in table.column_names if name not in ("task", "digest", "spans")]
    columns = {name: values_of(table[name]) for name in plain}
    task = table["task"].unify_dictionaries().combine_chunks()
    columns["task"] = np.array(task.dictionary.to_pylist(), dtype=object)[values_of(task.indices)]
    columns["digest"] = to_numpy(table["digest"].combine_chunks(), np.dtype("V16")).view(np.uint8).reshape(-1, 16)
    spans = table["spans"].combine_chunks()
    columns["num_spans"] = np.diff(values_of(spans.offsets)).astype(np.int64)
    for key, values in zip(Span._fields, spans.flatten().flatten(), strict=True):
        columns[f"span_{key}"] = values_of(values)
    return columns
