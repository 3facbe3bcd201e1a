"""Rows rendered in a model's chat format, as the batch renderer lays documents out."""

import json
from collections import Counter
from typing import Any

import numpy as np

from chatdata.conversation import Conversation, parse_conversation
from chatdata.document import Document
from chatdata.errors import ChatdataError
from chatdata.render.batch import SPAN_DTYPE, RenderedBatch, check_ids, rendered_batch
from chatdata.render.format import PART_ROLES, PYTHON, USER
from chatdata.render.model_format import ModelFormat, render_in_format
from chatdata.render.pieces import INVALID, TALLIES, Pieces
from chatdata.sources.source import Rows, Source
from chatdata.tasks.task import call_task

COUNTED = ("num_turns", "untrained_turns", "num_tool_calls", "num_spans")


def render_row(model_format: ModelFormat, source: Source, record: Any) -> tuple[Document, Counter[str], Conversation]:
    """The document of a raw row, its counts (COUNTED and of TALLIES), and the row in the common form.

    Raises ConversationError, and what the task raises.
    """
    conversation = parse_conversation(call_task(source.task, source.task.to_conversation, record), source.reading)
    document, counts = render_in_format(model_format, conversation)
    counts.update(conversation.get("counts", {}))
    counts["num_turns"] = sum(message["role"] != "system" for message in conversation["messages"])
    counts["untrained_turns"] = sum(message.get("trained") is False for message in conversation["messages"])
    counts["num_tool_calls"] = sum(span.role == PYTHON for span in document.spans)
    counts["num_spans"] = len(document.spans)
    return document, counts, conversation


def render_rows(model_format: ModelFormat, source: Source, rows: np.ndarray, raw: Rows) -> RenderedBatch:
    """Raw rows (numbered `rows`), rendered one by one. A row that cannot be used is a token with a note that says why.

    Raises the error of the first such row, with its place, if the recipe does not want them dropped.
    """
    tokenizer = model_format.tokenizer
    found, notes = list[tuple[Document, Counter[str], Any]](), list[tuple[int, str]]()
    records = source.rows_of(rows, raw)
    for row, record in zip(rows.tolist(), records, strict=True):
        try:
            found.append(render_row(model_format, source, record))
        except ChatdataError as error:
            if source.reading.invalid == "error":
                raise error.at(source.where(row)) from None
            notes.append((len(found), json.dumps([INVALID, str(error)])))
            unusable = Document(np.zeros(1, tokenizer.dtype), np.zeros(1, np.uint8))
            found.append((unusable, Counter(), {"messages": []}))
    documents, counts, _ = zip(*found, strict=True)
    parts = [(0, USER, "")]  # document, role, text: for the calculator
    for i, content in ((i, message["content"]) for i, (*_, of) in enumerate(found) for message in of["messages"]):
        if not isinstance(content, str):
            parts += [(i, USER, ""), *((i, PART_ROLES[part["type"]], part["text"]) for part in content)]
    places, roles, texts = zip(*parts, strict=True)
    codes = np.array(roles, dtype=np.uint8)
    tallies = [(i, k, of[name]) for i, of in enumerate(counts) for k, name in enumerate(TALLIES) if of[name]]
    tokens, mask = (np.concatenate([getattr(d, name) for d in documents]) for name in ("tokens", "mask"))
    check_ids(tokens, tokenizer.vocab_size)
    num_tokens = np.array([*map(len, documents)])
    spans = np.array([tuple(span) for document in documents for span in document.spans], SPAN_DTYPE)
    pieces = Pieces(list(texts), codes, np.bincount(places, minlength=len(rows)), notes, tallies)
    counted = {name: np.array([of[name] for of in counts]) for name in COUNTED}
    return rendered_batch(pieces, tokens, mask, num_tokens, spans, **counted)
