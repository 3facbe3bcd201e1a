"""Texts a tokenizer is trained on: files of plain text, conversations, or a text column."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.conversation import REFUSED_KEYS, parse_conversation
from chatdata.errors import ChatdataError, SourceError
from chatdata.messages import as_parts
from chatdata.records import MESSAGE_KEYS
from chatdata.sources.file import SourceFile
from chatdata.sources.source import Source
from chatdata.tasks.task import load_tasks


def read_texts(files: tuple[Path, ...]) -> Iterator[str]:
    """Every text of .txt (by line), .jsonl, .json and .parquet files: a `text` column, or all texts of conversations.

    Raises SourceError or ConversationError naming file and row.
    """
    for path in files:
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        if path.suffix == ".txt":
            try:
                with path.open(encoding="utf-8") as lines:
                    yield from lines
            except UnicodeDecodeError:
                raise SourceError(f"{path}: not UTF-8; save it as UTF-8") from None
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            source = Source(path.name, load_tasks()["conversations"], (SourceFile(path, path.name),))
            for row, record in source.read(np.ones(source.num_rows, dtype=bool)):
                try:
                    yield from texts_of(record)
                except ChatdataError as error:
                    raise error.at(source.where(row)) from None
        else:
            raise SourceError(f"{path}: expected .txt, .jsonl, .json or .parquet")


def texts_of(record: Any) -> Iterator[str]:
    """All texts of a record: its `text`, or every message and part of a conversation."""
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        yield record["text"]
        return
    if isinstance(record, dict):  # what is next to the messages is not trained on here
        keys = MESSAGE_KEYS if any(record.get(key) for key in MESSAGE_KEYS) else record
        record = {key: value for key, value in record.items() if key in keys or key in REFUSED_KEYS}
    for message in parse_conversation(record)["messages"]:
        yield from (part["text"] for part in as_parts(message["content"], trained=True))
