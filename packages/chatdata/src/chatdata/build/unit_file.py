"""A work unit on disk: an Arrow file with a row per rendered document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chatdata.arrow import bytes_to_arrow, list_to_arrow, map_batches, strings_to_arrow, to_arrow, to_numpy
from chatdata.render.batch import SPAN_DTYPE, RenderedBatch

if TYPE_CHECKING:
    import pyarrow as pa


_COUNTS = ("num_tokens", "num_supervised", "num_turns", "num_tool_calls", "num_spans", "num_mismatches")


def _schema(dtype: np.dtype) -> pa.Schema:
    """A row per document. Lists of fixed-width values: read back as views of the mapped file."""
    import pyarrow as pa

    return pa.schema(
        [
            ("tokens", pa.list_(pa.from_numpy_dtype(dtype))),
            ("mask", pa.list_(pa.uint8())),
            *((name, pa.int32()) for name in _COUNTS),
            ("spans", pa.list_(pa.binary(SPAN_DTYPE.itemsize))),
            ("digest", pa.binary(16)),
            ("mismatches", pa.list_(pa.string())),
        ]
    )


def _to_batch(columns: RenderedBatch) -> pa.RecordBatch:
    import pyarrow as pa

    counts = {name: to_arrow(getattr(columns, name).astype(np.int32)) for name in _COUNTS}
    arrays = {
        "tokens": list_to_arrow(to_arrow(columns.tokens), columns.num_tokens),
        "mask": list_to_arrow(to_arrow(columns.mask), columns.num_tokens),
        **counts,
        "spans": list_to_arrow(bytes_to_arrow(columns.spans), columns.num_spans),
        "digest": bytes_to_arrow(columns.digests),
        "mismatches": list_to_arrow(strings_to_arrow(columns.mismatches), columns.num_mismatches),
    }
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def read_unit(path: Path, dtype: np.dtype) -> list[RenderedBatch]:
    """A unit's documents as views of the mapped file, a Columns per record batch."""
    return [
        RenderedBatch(
            tokens=to_numpy(batch.column("tokens").values, dtype),
            mask=to_numpy(batch.column("mask").values, np.dtype(np.uint8)),
            **{name: to_numpy(batch.column(name), np.dtype(np.int32)) for name in _COUNTS},
            spans=to_numpy(batch.column("spans").values, SPAN_DTYPE),
            digests=to_numpy(batch.column("digest"), np.dtype("V16")),
            mismatches=batch.column("mismatches").values,
        )
        for batch in map_batches(path)
    ]
