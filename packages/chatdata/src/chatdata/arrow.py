"""NumPy arrays as Arrow arrays and back, without copying and without importing pandas."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def to_arrow(values: np.ndarray) -> pa.Array:
    """An Arrow array over the same memory, of fixed-size binary values if `values` are bytes or structures.

    `pa.array` does the same for numbers, but imports pandas first: 1.8 s of every build.
    """
    import pyarrow as pa

    kind = pa.binary(values.dtype.itemsize) if values.dtype.kind == "V" else pa.from_numpy_dtype(values.dtype)
    data = pa.py_buffer(np.ascontiguousarray(values).view(np.uint8))
    return pa.Array.from_buffers(kind, len(values), [None, data])


def list_to_arrow(values: pa.Array, counts: np.ndarray) -> pa.Array:
    """An Arrow array of lists: the first `counts[0]` of `values`, then the next `counts[1]`, …"""
    import pyarrow as pa

    return pa.ListArray.from_arrays(to_arrow(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)), values)


def strings_to_arrow(values: Sequence[str]) -> pa.Array:
    """An Arrow array of strings, copied: `pa.array` imports pandas first (see `to_arrow`)."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def to_numpy(array: pa.Array, dtype: np.dtype) -> np.ndarray:
    """The values of an Arrow array of fixed-width values without nulls, over the same memory."""
    start = array.offset * dtype.itemsize
    return np.frombuffer(array.buffers()[1], dtype=np.uint8)[start : start + len(array) * dtype.itemsize].view(dtype)


def values_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of numbers or booleans (as uint8) without nulls. Arrow's own `to_numpy` imports pandas first."""
    import pyarrow as pa

    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(column.cast(pa.uint8()) if pa.types.is_boolean(column.type) else column)


def map_batches(path: Path) -> list[pa.RecordBatch]:
    """The record batches of an Arrow file, memory-mapped. No file stays open: a large build reads thousands."""
    import pyarrow as pa

    with path.open("rb") as file:
        buffer = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    reader = pa.ipc.open_file(buffer)
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def without_nulls(value: Any) -> Any:
    """Arrow's Python objects without the keys that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
