"""Reading the index of a shard that may be damaged, for `verify` and the report.

`Split.index` and `Split.index_table` (read.py) are for everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatdata.arrow import values_of
from chatdata.errors import FormatError
from chatdata.shards.write import index_schema

if TYPE_CHECKING:
    import pyarrow as pa


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The index of one shard as a table, typed and without nulls. Raises FormatError naming the file if it is not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if not file.schema_arrow.equals(index_schema()):
            raise FormatError(f"{path}: columns are not those of the format (docs/format.md)")
        table = file.read(columns)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    for name in table.column_names:
        values = table[name].combine_chunks()
        parts = [values, values.values, *values.values.flatten()] if name == "spans" else [values]
        if any(part.null_count for part in parts):
            raise FormatError(f"{path}: column {name} has nulls")
    return table


def index_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """The columns of an index as arrays, [documents] each (digest: uint8 [documents, 16]), spans taken apart.

    num_spans is [documents]; span_role, span_start and span_length are [sum of num_spans]. `task` is an array of str.
    """
    plain = [name for name in table.column_names if name not in ("task", "digest", "spans")]
    columns = {name: values_of(table[name]) for name in plain}
    task = table["task"].unify_dictionaries().combine_chunks()
    columns["task"] = np.array(task.dictionary.to_pylist(), dtype=object)[values_of(task.indices)]
    digests = b"".join(table["digest"].to_pylist())
    columns["digest"] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
    spans = table["spans"].combine_chunks()
    columns["num_spans"] = np.diff(values_of(spans.offsets)).astype(np.int64)
    for key, values in zip(("role", "start", "length"), spans.flatten().flatten(), strict=True):
        columns[f"span_{key}"] = values_of(values)
    return columns
