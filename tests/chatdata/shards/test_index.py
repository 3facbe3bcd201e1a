"""An index is held to what its shard can have before any of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata.errors import FormatError
from chatdata.shards.index import index_schema, read_index

ROW: dict[str, Any] = {
    **dict.fromkeys(("doc", "row", "task_position", "entry", "num_supervised", "num_turns", "num_tool_calls"), 0),
    "untrained_turns": 0,
    "num_tokens": 5,
    "original_tokens": 5,
    "truncated": False,
    "task": "t",
    "digest": bytes(16),
    "spans": [
        {"role": 0, "start": 1, "length": 2, "trained": False},
        {"role": 1, "start": 3, "length": 2, "trained": True},
    ],
}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, index_schema()), path, compression="zstd")
    return path


def test_rows_and_spans_that_a_shard_can_have(tmp_path: Path) -> None:
    path = written(tmp_path / "index.parquet", [ROW, ROW])
    assert read_index(path, shard={"documents": 2, "tokens": 10}).num_rows == 2
    with pytest.raises(FormatError, match=r"index\.parquet: 2 rows for 3 documents$"):
        read_index(path, shard={"documents": 3, "tokens": 15})


@pytest.mark.parametrize(
    "bomb", [{"spans": 1_000_000 * ROW["spans"]}, {"task": "a" * 50_000_000}, {"spans": 7 * ROW["spans"][:1]}]
)
def test_what_unpacks_to_more_than_the_tokens_explain(tmp_path: Path, bomb: dict[str, Any]) -> None:
    """A million equal spans, or a long name, take a few kilobytes on disk. Seven spans are more than five tokens."""
    path = written(tmp_path / "index.parquet", [ROW | bomb])
    assert path.stat().st_size < 50_000
    with pytest.raises(FormatError, match=r"index\.parquet: [\d,]+ bytes unpacked, more than 5 tokens can have$"):
        read_index(path, ["num_tokens"], {"documents": 1, "tokens": 5})
