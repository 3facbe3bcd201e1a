"""Rendered documents on disk before they are put in order: one token file, one mask file, columns of counts."""

from __future__ import annotations

import hashlib
import shutil
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatdata.document import Document, Span
from chatdata.errors import BuildError, ChatdataError, ConversationError
from chatdata.recipe import Recipe
from chatdata.render import render_conversation, render_text
from chatdata.sources import Source
from chatdata.tasks import Task, call_task
from chatdata.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

DROP_REASONS = ("", "overflow", "zero_supervised")  # a document's drop_reason is a place in this tuple; 0 = kept
PROGRESS_ROWS = 500


class RenderedStore:
    """Documents in the order they were rendered. After `finish`, all columns are numpy arrays, [num_documents].

    A document costs about 90 bytes of memory (counts, digest, spans); tokens and mask stay on disk.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        folder.mkdir()
        self._tokens_file = (folder / "tokens.bin").open("wb", buffering=1 << 20)
        self._mask_file = (folder / "mask.bin").open("wb", buffering=1 << 20)
        names = {
            "num_tokens": "i",
            "num_supervised": "i",
            "original_tokens": "i",
            "num_turns": "i",
            "num_tool_calls": "i",
        }
        names |= {"truncated": "B", "drop_reason": "B", "num_spans": "i"}
        names |= {"span_role": "B", "span_start": "I", "span_length": "I"}
        self._columns = {name: array(code) for name, code in names.items()}
        self._digests = bytearray()
        self.num_documents = 0

    def add(self, document: Document, original: Document, drop_reason: int) -> None:
        """Append `document`; `original` is the same before any cut."""
        self._tokens_file.write(document.tokens.data.cast("B"))
        self._mask_file.write(document.mask.data)
        roles = [span.role for span in original.spans]
        special = self.tokenizer.special_ids
        columns = self._columns
        columns["num_tokens"].append(len(document))
        columns["num_supervised"].append(document.num_supervised)
        columns["original_tokens"].append(len(original))
        starts = special["<|user_start|>"], special["<|assistant_start|>"]
        columns["num_turns"].append(sum(int(np.count_nonzero(original.tokens == start)) for start in starts))
        columns["num_tool_calls"].append(roles.count(2))
        columns["truncated"].append(len(document) < len(original))
        columns["drop_reason"].append(drop_reason)
        columns["num_spans"].append(len(document.spans))
        for span in document.spans:
            columns["span_role"].append(span.role)
            columns["span_start"].append(span.start)
            columns["span_length"].append(span.length)
        self._digests += document_digest(document.tokens, document.mask)
        self.num_documents += 1

    def finish(self) -> None:
        """Close the files, map them, and turn the columns into arrays."""
        for file in (self._tokens_file, self._mask_file):
            file.close()
        for name, column in self._columns.items():
            setattr(self, name, np.frombuffer(column, dtype=np.dtype(column.typecode)))
        self.tokens = np.memmap(self.folder / "tokens.bin", dtype=self.tokenizer.dtype, mode="r")
        self.mask = np.memmap(self.folder / "mask.bin", dtype=np.uint8, mode="r")
        self.starts = np.concatenate([[0], np.cumsum(self.num_tokens, dtype=np.int64)])[:-1]
        self._span_starts = np.concatenate([[0], np.cumsum(self.num_spans, dtype=np.int64)])[:-1]

    def delete(self) -> None:
        del self.tokens, self.mask
        shutil.rmtree(self.folder)

    def index_table(
        self, chosen: np.ndarray, first: int, columns: dict[str, np.ndarray], task_names: list[str]
    ) -> pa.Table:
        """The index of one shard: `chosen` documents, numbered from `first` within their split."""
        import pyarrow as pa

        names = list(dict.fromkeys(task_names))
        task_of_entry = np.array([names.index(name) for name in task_names], dtype=np.int32)
        counts = self.num_spans[chosen].astype(np.int64)
        ends = np.cumsum(counts)
        places = np.arange(counts.sum()) + np.repeat(self._span_starts[chosen] - (ends - counts), counts)
        spans = pa.StructArray.from_arrays(
            [_arrow(values[places]) for values in (self.span_role, self.span_start, self.span_length)],
            ["role", "start", "length"],
        )
        offsets = _arrow(np.concatenate([[0], ends]).astype(np.int32))
        digests = np.frombuffer(self._digests, dtype="V16")[chosen].tobytes()
        return pa.table(
            {
                "doc": _arrow(np.arange(first, first + len(chosen))),
                "row": _arrow(columns["row"]),
                "position": _arrow(columns["position"]),
                "task": pa.DictionaryArray.from_arrays(_arrow(task_of_entry[columns["entry"]]), pa.array(names)),
                "entry": _arrow(columns["entry"].astype(np.int16)),
                **{
                    name: _arrow(getattr(self, name)[chosen].astype(np.int32))
                    for name in ("num_tokens", "num_supervised", "num_turns", "num_tool_calls", "original_tokens")
                },
                "truncated": _arrow(self.truncated[chosen]).cast(pa.bool_()),
                "digest": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(chosen), [None, pa.py_buffer(digests)]
                ),
                "spans": pa.ListArray.from_arrays(offsets, spans),
            }
        )


def _arrow(values: np.ndarray) -> pa.Array:
    """An Arrow array over the same memory. `pa.array` would do, but imports pandas first: 1.8 s of every build."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def document_digest(tokens: np.ndarray, mask: np.ndarray) -> bytes:
    """BLAKE2b (16 bytes) of the ids as `<u4` bytes followed by the mask bytes: the same for either token width."""
    return hashlib.blake2b(tokens.astype("<u4").tobytes() + mask.tobytes(), digest_size=16).digest()


def render_source(
    source: Source, wanted: np.ndarray, recipe: Recipe, store: RenderedStore, progress: Any = None
) -> None:
    """Render the wanted rows of a source into the store, in source order. Errors name file and row (or line)."""
    total = int(wanted.sum())
    for done, (row, raw) in enumerate(source.read(wanted), start=1):
        try:
            original = _render_row(source.task, raw, store.tokenizer)
            document, drop_reason = apply_policies(original, recipe)
        except ChatdataError as error:
            raise error.at(source.where(row)) from None
        store.add(document, original, drop_reason)
        if progress and (done % PROGRESS_ROWS == 0 or done == total):
            progress(source.name, done, total)


def _render_row(task: Task, raw: Any, tokenizer: Tokenizer) -> Document:
    converted = call_task(task, task.to_conversation, raw)
    if task.kind == "text":
        return render_text(tokenizer, converted)
    return render_conversation(tokenizer, converted)


def apply_policies(document: Document, recipe: Recipe) -> tuple[Document, int]:
    """The document after the recipe's length rule, and its place in DROP_REASONS (0 = kept)."""
    limit = recipe.max_tokens
    if limit is not None and len(document) > limit and recipe.overflow != "keep":
        if recipe.overflow == "error":
            raise BuildError(f'{len(document):,} tokens, over max_tokens = {limit:,} (overflow = "error")')
        if recipe.overflow == "drop":
            return document, DROP_REASONS.index("overflow")
        document = truncate(document, limit)
    if document.num_supervised == 0 and recipe.zero_supervised != "keep":
        if recipe.zero_supervised == "error":
            raise ConversationError('no supervised token is left (zero_supervised = "error")')
        return document, DROP_REASONS.index("zero_supervised")
    return document, 0


def truncate(document: Document, num_tokens: int) -> Document:
    """The first `num_tokens` tokens; spans are clipped, no end token is added."""
    spans = tuple(
        Span(span.role, span.start, min(span.length, num_tokens - span.start))
        for span in document.spans
        if span.start < num_tokens
    )
    return Document(document.tokens[:num_tokens], document.mask[:num_tokens], spans, document.tokenizer)
