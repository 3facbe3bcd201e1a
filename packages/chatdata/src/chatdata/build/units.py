"""Work units: runs of rows of one source, rendered each by itself into a file of the cache.

A unit is named by what it is made from (source bytes, rows, task code, tokenizer), never by a path, a worker or an
encoder. So any process on any machine may render it, and what is there already is not rendered again.
Documents are whole in it: length and supervision policies are applied when a build reads it (store.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from chatdata.build.cache import partial_name
from chatdata.build.unit_file import _schema, _to_batch
from chatdata.conversation import check_surrogates
from chatdata.disk import file_sha256
from chatdata.errors import ChatdataError, SourceError
from chatdata.render.batch import RenderedBatch, render_batch
from chatdata.render.contract import Rules, check_documents, raise_defect
from chatdata.render.pieces import Pieces, pieces_of_conversations, pieces_of_texts
from chatdata.render.table import pieces_of_table
from chatdata.shards.manifest import canonical_json
from chatdata.sources.files import SEGMENT_BYTES, Rows, forget_readers, records_of
from chatdata.sources.source import Source
from chatdata.tasks.task import call_task
from chatdata.tokenizer import encoders
from chatdata.tokenizer.bpe import Tokenizer

UNIT_FORMAT = 1
MAX_CHARS = 4 << 20  # encoded at a time: bounds memory where documents are long


@dataclass(frozen=True)
class Unit:
    """Rows of one source to render: those from `first` on that are `wanted` (bool)."""

    source: int  # place in Renderer.sources
    first: int
    wanted: np.ndarray
    num_bytes: int  # of their text, about
    key: str

    @property
    def num_rows(self) -> int:
        return int(self.wanted.sum())


@dataclass(frozen=True)
class Rendered:
    """A unit on disk, and what its encoder was checked on."""

    path: Path
    num_texts: int = 0
    num_checked: int = 0


@dataclass(frozen=True)
class Renderer:
    """Everything a worker needs; can be pickled."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    encoder_name: str
    folder: Path  # where units are kept

    @cached_property
    def encoder(self) -> encoders.Encoder:
        return encoders.find_encoder(self.encoder_name, self.tokenizer)

    def forget(self) -> None:
        """Give back the memory of what was only needed to render: gigatoken alone keeps up to 200 MB of pieces met."""
        self.__dict__.pop("encoder", None)
        forget_readers()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "encoder"}


def cut_units(renderer: Renderer, number: int, wanted: np.ndarray) -> list[Unit]:
    """The wanted rows (bool [rows]) of source `number` as units of about SEGMENT_BYTES of text, in row order."""
    source = renderer.sources[number]
    units, first, row, num_bytes = [], 0, 0, 0.0
    for num_rows, segment_bytes in source.segments(len(wanted)):
        num_bytes += segment_bytes * float(wanted[row : row + num_rows].mean()) if num_rows else 0.0
        row += num_rows
        if num_bytes >= SEGMENT_BYTES / 2 or row >= len(wanted):
            if wanted[first:row].any():
                units.append(_unit(renderer, number, first, wanted[first:row], int(num_bytes)))
            first, num_bytes = row, 0.0
    return units


def _unit(renderer: Renderer, number: int, first: int, wanted: np.ndarray, num_bytes: int) -> Unit:
    source = renderer.sources[number]
    content = {
        "format": UNIT_FORMAT,
        "code": _code_sha256(),
        "task": source.task.name,
        "task_code": source.task.code_sha256,
        "tokenizer": renderer.tokenizer.sha256,
        "source": source.content(first, len(wanted)),
        "wanted": hashlib.sha256(np.packbits(wanted).data).hexdigest(),
    }
    return Unit(number, first, wanted, num_bytes, hashlib.sha256(canonical_json(content)).hexdigest()[:32])


@cache
def _code_sha256() -> str:
    """Over all of chatdata's own code: what renders is not told apart from what does not, so nothing stale is kept."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def render_unit(renderer: Renderer, unit: Unit, progress: Callable[[int], None] | None = None) -> Rendered:
    """Render one unit into the folder of units, by a temporary name and a rename.

    Errors a row causes name its file and row (or line).
    """
    import pyarrow as pa

    source, tokenizer = renderer.sources[unit.source], renderer.tokenizer
    partial = renderer.folder / partial_name(unit.key)
    rules = Rules(tokenizer.special_ids, tokenizer.vocab_size, "base" if source.task.kind == "text" else "chat")
    num_texts = num_checked = 0

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal num_texts, num_checked
        ids, counts = renderer.encoder.encode_batch(texts)
        num_texts += len(texts)
        if renderer.encoder.name != "tiktoken":
            num_checked += encoders.check_some(renderer.encoder, tokenizer, texts, ids, counts, source.name)
        return ids, counts

    def render(pieces: Pieces) -> RenderedBatch:
        return render_batch(pieces, encode, tokenizer.special_ids, tokenizer.dtype, tokenizer.vocab_size)

    try:
        with partial.open("wb") as file, pa.ipc.new_file(pa.PythonFile(file), _schema(tokenizer.dtype)) as writer:
            for rows, raw in source.read_batches(unit.first, unit.wanted):
                done = 0
                for pieces in pieces_of_rows(source, rows, raw).split(MAX_CHARS):
                    try:
                        columns = render(pieces)
                    except ChatdataError as error:
                        _raise_for_row(render, pieces, source, rows[done:], error)
                    offsets = np.concatenate([[0], np.cumsum(columns.num_tokens)])
                    # counts and spans are made of the same arrays as tokens and mask: no need to check them
                    whole = {"truncated": np.zeros(len(pieces), dtype=bool)}
                    findings = check_documents(columns.tokens, columns.mask, offsets, whole, rules)
                    raise_defect(findings, rows[done:], source.where)
                    writer.write_batch(_to_batch(columns))
                    done += len(pieces)
                if progress:
                    progress(len(rows))
        path = renderer.folder / f"{unit.key}-{file_sha256(partial)[:32]}.arrow"
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return Rendered(path, num_texts, num_checked)


def pieces_of_rows(source: Source, rows: np.ndarray, raw: Rows) -> Pieces:
    """Rows as pieces: columns of a table as they are where they hold well-formed conversations, else row by row."""
    task = source.task
    try:
        if task.rows_are_conversations and not isinstance(raw, list):
            pieces = pieces_of_table(raw)
            if pieces is not None:
                return pieces
        records = records_of(raw)
    except UnicodeDecodeError:
        raise SourceError(f"{source.where(int(rows[0]))} … {rows[-1]}: text that is not UTF-8") from None
    done = 0

    def converted() -> Iterator[Any]:
        nonlocal done
        for done, record in enumerate(records):  # noqa: B007 - tells which row an error came from
            yield call_task(task, task.to_conversation, record)

    try:
        if task.kind == "text":
            return pieces_of_texts([check_surrogates(text, 'key "text"') for text in converted()])
        return pieces_of_conversations(converted())
    except ChatdataError as error:
        raise error.at(source.where(int(rows[done]))) from None


def _raise_for_row(
    render: Callable[[Pieces], RenderedBatch], pieces: Pieces, source: Source, rows: np.ndarray, error: ChatdataError
) -> NoReturn:
    """Raise the error of the first document that cannot be rendered alone, with its place; else `error`."""
    for i in range(len(pieces)):
        try:
            render(pieces.part(i, i + 1))
        except ChatdataError as own:
            raise own.at(source.where(int(rows[i]))) from None
    raise error
