"""Plain text for stage base: a text column of Parquet or JSONL, or text files (a file is a document).

A row: {"text": "Once upon a time there was a very small transistor."}
"""

from typing import Any

from chatdata.errors import TaskError
from chatdata.tasks.task import Task


def to_text(row: dict[str, Any]) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise TaskError('key "text": a row of plain text needs a string under it')
    return text


TASK = Task(
    name="text",
    summary="plain documents for stage base: path or repo",
    licence="yours",
    kind="text",
    to_conversation=to_text,
)
