"""Rows that cannot be read are named: file and line or row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chatdata.tokenizer.bpe import Tokenizer
from chatdata.tokenizer.files import save_tokenizer


def test_rows_that_cannot_be_read(tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable) -> None:
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    column = pa.array([b"ok", b"\xff\xfe"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"question": column, "answer": column}), tmp_path / "g.parquet")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom chatdata.tasks import Task\n"
        "@dataclass\nclass Row:\n    n: int\n"
        "TASK = Task('mine', 's', 'MIT', lambda row: 1 / 0, generate=lambda s, o: lambda i: i, "
        "splits={'': {'train': 0}})\n"
    )
    for entry, error in [
        ("task = 'gsm8k'\npath = 'g.parquet'", "g.parquet row 0 … 1: text that is not UTF-8"),
        ("task = 'conversations'\npath = 'deep.jsonl'", "deep.jsonl line 1: not valid JSON"),
        ("task = 'mine'\nrows = 1", 'mine train row 0: the row does not fit task "mine": ZeroDivisionError'),
    ]:
        (tmp_path / "r.toml").write_text(f"stage = 'mid'\n[[train]]\n{entry}\n")
        command = ["build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "o"]
        result = chatdata(*command, "--task-file", tmp_path / "mine.py")
        assert result.stderr.splitlines()[-1].startswith(f"Error: {error}"), result.stderr
        assert "Traceback" not in result.stderr
