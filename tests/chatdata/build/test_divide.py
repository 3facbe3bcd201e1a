from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chatdata.build.divide import content_hash, in_val_rows
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source
from chatdata.tasks import load_tasks

ROWS = [{"prompt": f"{n}?", "completion": f"{n}!", "score": None if n % 2 else n} for n in range(50)]


def test_the_hash_is_that_of_docs_recipes() -> None:
    # sha256 of {"a":"é","b":[{"c":1}]}
    assert content_hash({"b": [{"c": 1, "d": None}], "a": "é"}) == 0x278E7FF1AF8BBE59 / 2**64
    assert 0 <= content_hash({"a": "\ud800"}) < 1


def test_the_sides_are_the_same_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    task = load_tasks()["conversations"]
    sources = [Source("a", task, (SourceFile(tmp_path / f"a.{kind}", "a"),)) for kind in ("jsonl", "parquet")]
    sides = [in_val_rows(source, 0.3).tolist() for source in sources]
    assert sides[0] == sides[1] and 5 < sum(sides[0]) < 25
