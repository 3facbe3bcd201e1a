"""Rows rendered in a model's chat format, as the batch renderer lays documents out."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from chatdata.conversation import Conversation, parse_conversation
from chatdata.document import Document
from chatdata.errors import ChatdataError, SourceError
from chatdata.render.batch import SPAN_DTYPE, TALLY_DTYPE, RenderedBatch, check_ids, digests_of, replay_calls
from chatdata.render.format import PART_ROLES, PYTHON, USER
from chatdata.render.model_format import ModelFormat, render_in_format
from chatdata.render.pieces import INVALID, TALLIES
from chatdata.sources.source import Rows, Source
from chatdata.tasks.task import call_task


def render_row(model_format: ModelFormat, source: Source, record: Any) -> tuple[Document, dict[str, int], Conversation]:
    """The document of a raw row, its counts by the names of the index and of TALLIES, and the row in the common form.

    Raises ConversationError, and what the task raises.
    """
    conversation = parse_conversation(call_task(source.task, source.task.to_conversation, record), source.reading)
    document, left_out = render_in_format(model_format, conversation)
    messages = conversation["messages"]
    counts = Counter(left_out) + Counter(conversation.get("counts", {}))
    counts["num_turns"] = sum(message["role"] != "system" for message in messages)
    counts["untrained_turns"] = sum(message.get("trained") is False for message in messages)
    counts["num_tool_calls"] = sum(span.role == PYTHON for span in document.spans)
    return document, counts, conversation


def render_rows(model_format: ModelFormat, source: Source, rows: np.ndarray, raw: Rows) -> RenderedBatch:
    """Raw rows (numbered `rows`), rendered one by one. A row that cannot be used is a token with a note that says why.

    Raises the error of the first such row, with its place, if the recipe does not want them dropped.
    """
    try:
        records = raw if isinstance(raw, list) else raw.to_pylist()
    except UnicodeDecodeError:
        raise SourceError(f"{source.where(int(rows[0]))} … {rows[-1]}: text that is not UTF-8") from None
    tokenizer = model_format.tokenizer
    unusable = Document(np.zeros(1, tokenizer.dtype), np.zeros(1, np.uint8))
    documents, counts = list[Document](), list[dict[str, int]]()
    notes, parts = list[tuple[int, str]](), list[tuple[int, int, str]]()  # parts: document, role, text
    for i, (row, record) in enumerate(zip(rows.tolist(), records, strict=True)):
        document, counted = unusable, dict[str, int]()
        try:
            document, counted, conversation = render_row(model_format, source, record)
            for content in (message["content"] for message in conversation["messages"]):
                if not isinstance(content, str):
                    parts += [(i, USER, ""), *((i, PART_ROLES[part["type"]], part["text"]) for part in content)]
        except ChatdataError as error:
            if source.reading.invalid == "error":
                raise error.at(source.where(row)) from None
            notes.append((i, json.dumps([INVALID, str(error)])))
        documents.append(document)
        counts.append(counted)
    places, roles, texts = zip(*parts, strict=True) if parts else ((), (), ())
    replayed, other_tools = replay_calls(list(texts), np.array(roles, np.uint8), np.array(places, np.int64))
    notes = sorted([*replayed, *notes])
    for i, number in other_tools.items():
        counts[i]["other_tools"] = number
    tallies = [(i, k, of[name]) for i, of in enumerate(counts) for k, name in enumerate(TALLIES) if of.get(name)]
    tokens, mask = (np.concatenate([getattr(d, name) for d in documents]) for name in ("tokens", "mask"))
    check_ids(tokens, tokenizer.vocab_size)
    num_tokens = np.array([len(document) for document in documents])
    named = ("num_turns", "untrained_turns", "num_tool_calls")
    return RenderedBatch(
        tokens=tokens,
        mask=mask,
        num_tokens=num_tokens,
        num_supervised=np.array([document.num_supervised for document in documents]),
        **{name: np.array([of.get(name, 0) for of in counts]) for name in named},
        num_spans=np.array([len(document.spans) for document in documents]),
        spans=np.array([tuple(span) for document in documents for span in document.spans], SPAN_DTYPE),
        digests=digests_of(tokens, mask, num_tokens),
        num_notes=np.bincount(np.array([i for i, _ in notes], np.int64), minlength=len(rows)),
        notes=[note for _, note in notes],
        num_tallies=np.bincount(np.array([i for i, *_ in tallies], np.int64), minlength=len(rows)),
        tallies=np.array([tuple(rest) for _, *rest in tallies], TALLY_DTYPE),
    )
