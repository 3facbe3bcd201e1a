"""Render many conversations at once, from the ids of all their texts to tokens and mask laid out as arrays.

The role of a piece, whether an assistant message opens before it or closes after it, and its number of ids decide every
delimiter and mask value around it. tests/chatdata/render/test_batch.py holds the result to specification.py.

Every `python` part is also put through the calculator. A recorded output teaches the model what the tool will say;
where the calculator says something else, the model learns one thing and meets another (docs/building.md).
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from chatdata.arrow import list_to_arrow, strings_to_arrow, to_arrow, to_numpy
from chatdata.calculator import calculate, compare_outputs
from chatdata.errors import CalculatorError, FormatError
from chatdata.render.format import NANOCHAT, OUTPUT, PYTHON, USER
from chatdata.render.pieces import CLOSES, END_UNTRAINED, OPENS, ROLE, TALLIES, UNTRAINED, Pieces

COUNTS = (
    *("num_tokens", "num_supervised", "num_turns", "num_tool_calls", "untrained_turns"),
    *("num_spans", "num_notes", "num_tallies"),
)
# what has several values per document, and which of COUNTS says how many
LISTS = {name: f"num_{name}" for name in ("tokens", "spans", "notes", "tallies")} | {"mask": "num_tokens"}
SPAN_DTYPE = np.dtype([("role", "u1"), ("start", "<u4"), ("length", "<u4"), ("trained", "u1")])  # packed: 10 bytes
TALLY_DTYPE = np.dtype([("kind", "u1"), ("number", "<u4")])  # kind: place in TALLIES
# What a calculation can come to. point_zero: `10.0` recorded, `10` computed; format: the same number, written
# differently; no_output: no output is recorded after it. What the calculator does not take is a call of another tool.
OUTCOMES = ("equal", "point_zero", "format", "rounding", "different", "no_output")


class RenderedBatch(NamedTuple):
    """Rendered documents back to back.

    `tokens` and `mask` are [num_tokens]. `spans` (SPAN_DTYPE) has `num_spans` rows per document, starts counted within
    the document; `notes` has `num_notes`, `tallies` (TALLY_DTYPE) `num_tallies`. All others have a row per document.
    """

    tokens: np.ndarray
    mask: np.ndarray
    num_tokens: np.ndarray
    num_supervised: np.ndarray
    num_turns: np.ndarray
    num_tool_calls: np.ndarray
    untrained_turns: np.ndarray  # assistant messages whose end has mask 0
    num_spans: np.ndarray
    spans: np.ndarray
    digests: np.ndarray  # "V16"
    num_notes: np.ndarray
    notes: Sequence[str] | pa.StringArray  # JSON lists, a Mismatch or why a row is invalid: a list, an array as read
    num_tallies: np.ndarray
    tallies: np.ndarray


def render_batch(
    pieces: Pieces, ids: np.ndarray, num_ids: np.ndarray, special_ids: dict[str, int], dtype: np.dtype, vocab_size: int
) -> RenderedBatch:
    """Render conversations, tokens in `dtype`. Nothing is cut.

    ids, num_ids: the ids of all texts, one after the other, and how many each has. Raises FormatError for an id at or
    over `vocab_size`.
    """
    check_ids(ids, vocab_size)
    forms = NANOCHAT.spans
    role, opens, closes = pieces.codes & ROLE, (pieces.codes & OPENS) > 0, (pieces.codes & CLOSES) > 0
    delimited = np.array([form.opening != "" for form in forms])[role]
    supervised = np.array([form.supervised for form in forms], dtype=np.uint8)[role]
    supervised[(pieces.codes & UNTRAINED) > 0] = 0
    end_untrained = (pieces.codes & END_UNTRAINED) > 0
    opening, closing = np.array([[special_ids.get(t, 0) for t in (form.opening, form.closing)] for form in forms]).T
    first_piece = np.cumsum(pieces.counts) - pieces.counts
    starts_document = np.zeros(len(role), dtype=bool)
    starts_document[first_piece] = True
    body = num_ids + 2 * delimited  # what a span covers: the text with its delimiters
    length = body + starts_document + opens + closes
    end = np.cumsum(length)
    begin = end - length
    body_begin = begin + starts_document + opens
    body_end = body_begin + body
    bos, assistant_start, assistant_end = begin[first_piece], (body_begin - 1)[opens], body_end[closes]

    num_tokens = np.add.reduceat(length, first_piece)
    tokens = np.empty(int(end[-1]), dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    for places, special in (
        (bos, special_ids[NANOCHAT.bos]),
        (assistant_start, special_ids[NANOCHAT.assistant_start]),
        (body_begin[delimited], opening[role[delimited]]),
        (body_end[delimited] - 1, closing[role[delimited]]),
        (assistant_end, special_ids[NANOCHAT.assistant_end]),
    ):
        tokens[places] = special
        is_text[places] = False
    tokens[is_text] = ids
    mask = np.repeat(supervised, length)
    mask[bos] = NANOCHAT.delimiters[NANOCHAT.bos]
    mask[assistant_start] = NANOCHAT.delimiters[NANOCHAT.assistant_start]
    mask[assistant_end] = NANOCHAT.delimiters[NANOCHAT.assistant_end]
    mask[body_end[end_untrained]] = 0

    has_span = body > 0
    of_pieces = {"num_turns": (role == USER) | opens, "num_tool_calls": role == PYTHON, "num_spans": has_span}
    of_pieces["untrained_turns"] = end_untrained
    counts = {name: np.add.reduceat(of_each, first_piece, dtype=np.int64) for name, of_each in of_pieces.items()}
    spans = np.empty(int(has_span.sum()), dtype=SPAN_DTYPE)
    spans["role"] = role[has_span]
    spans["start"] = (body_begin - np.repeat(bos, pieces.counts))[has_span]
    spans["length"] = body[has_span]
    spans["trained"] = supervised[has_span]
    return rendered_batch(pieces, tokens, mask, num_tokens, spans, **counts)


def rendered_batch(
    pieces: Pieces, tokens: np.ndarray, mask: np.ndarray, num_tokens: np.ndarray, spans: np.ndarray, **more: np.ndarray
) -> RenderedBatch:
    """A RenderedBatch with what follows from tokens and mask, and from the rows and the calls among the pieces.

    more: num_turns, num_tool_calls, untrained_turns, num_spans.
    """
    return RenderedBatch(
        tokens=tokens,
        mask=mask,
        num_tokens=num_tokens,
        num_supervised=np.add.reduceat(mask, np.cumsum(num_tokens) - num_tokens, dtype=np.int64),
        spans=spans,
        digests=digests_of(tokens, mask, num_tokens),
        **facts_of(pieces),
        **more,
    )


def facts_of(pieces: Pieces) -> dict[str, Any]:
    """Notes and tallies of a RenderedBatch: those of the rows, and of the calls among the pieces."""
    conversation = np.repeat(np.arange(len(pieces)), pieces.counts)
    replayed, other_tools = replay_calls(pieces.texts, pieces.codes & ROLE, conversation)
    notes = sorted([*replayed, *pieces.notes], key=itemgetter(0))
    tallies = sorted([*((i, TALLIES.index("other_tools"), n) for i, n in other_tools.items()), *pieces.tallies])
    of_notes, of_tallies = (np.fromiter((found[0] for found in facts), np.int64) for facts in (notes, tallies))
    return {
        "num_notes": np.bincount(of_notes, minlength=len(pieces)),
        "notes": [note for _, note in notes],
        "num_tallies": np.bincount(of_tallies, minlength=len(pieces)),
        "tallies": np.array([tally[1:] for tally in tallies], dtype=TALLY_DTYPE),
    }


def check_ids(ids: np.ndarray, limit: int) -> None:
    """Raise FormatError if an id is negative or ≥ `limit`."""
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < limit):
        bad = int(ids.max()) if int(ids.max()) >= limit else int(ids.min())
        raise FormatError(f"token id {bad} is outside 0 … {limit - 1}: it does not fit the vocabulary of the shards")


def digests_of(tokens: np.ndarray, mask: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """XXH3 (128 bits) per document: its ids as they are in the shard, then its mask bytes; "V16" [num_documents]."""
    from xxhash import xxh3_128

    ids, mask_bytes, size = tokens.data.cast("B"), mask.data, tokens.itemsize
    digests, begin = [], 0
    for end in np.cumsum(num_tokens).tolist():
        digest = xxh3_128(ids[size * begin : size * end])
        digest.update(mask_bytes[begin:end])
        digests.append(digest.digest())
        begin = end
    return np.frombuffer(b"".join(digests), dtype="V16")


class Mismatch(NamedTuple):
    """A calculation that is not `equal`."""

    kind: str
    call: str
    recorded: str
    computed: str


def replay_calls(
    texts: list[str], roles: np.ndarray, conversation: np.ndarray
) -> tuple[list[tuple[int, str]], Counter[int]]:
    """Replay the pieces that are tool calls (roles: uint8, conversation: int64 [pieces], ascending).

    Returns (conversation, Mismatch as JSON) of those that are not equal, and how many calls of other tools each
    conversation has.
    """
    found, other_tools = [], Counter[int]()
    for i in np.flatnonzero(roles == PYTHON).tolist():
        # an output in another message or conversation comes after a user's piece, never directly after a call
        recorded = texts[i + 1] if i + 1 < len(roles) and roles[i + 1] == OUTPUT else None
        computed = _calculate(texts[i])
        if computed is None:
            other_tools[int(conversation[i])] += 1
        elif computed != recorded:
            mismatch = replay_call(texts[i], recorded, computed)
            found.append((int(conversation[i]), json.dumps(mismatch, ensure_ascii=False)))
    return found, other_tools


def replay_call(call: str, recorded: str | None, computed: str) -> Mismatch:
    """One call, its recorded output (None: there is none) and the calculator's."""
    if recorded is None:
        return Mismatch("no_output", call, "", "")
    kind = compare_outputs(recorded, computed)
    return Mismatch("point_zero" if recorded == f"{computed}.0" else kind, call, recorded, computed)


@lru_cache(maxsize=1 << 14)  # 23,716 calls of GSM8K train are 14,000 different ones
def _calculate(call: str) -> str | None:
    """None for what the calculator does not take."""
    try:
        return calculate(call)
    except CalculatorError:
        return None


def _dtypes(dtype: np.dtype) -> dict[str, np.dtype]:
    """Of a batch's arrays on disk, by field, if tokens are of `dtype`."""
    arrays = {"tokens": dtype, "mask": np.dtype(np.uint8), **dict.fromkeys(COUNTS, np.dtype(np.int32))}
    return arrays | {"spans": SPAN_DTYPE, "digests": np.dtype("V16"), "tallies": TALLY_DTYPE}


def arrow_schema(dtype: np.dtype) -> pa.Schema:
    """Of batches on disk: a row per document. Lists of fixed-width values: read back as views of the mapped file."""
    empty = {name: np.zeros(0, kind) for name, kind in _dtypes(dtype).items()}
    return to_record_batch(RenderedBatch(notes=[], **empty)).schema


def to_record_batch(batch: RenderedBatch) -> pa.RecordBatch:
    arrays = []
    for name, values in batch._asdict().items():
        values = values.astype(np.int32) if name in COUNTS else values
        array = strings_to_arrow(values) if name == "notes" else to_arrow(values)
        arrays.append(list_to_arrow(array, getattr(batch, LISTS[name])) if name in LISTS else array)
    return pa.RecordBatch.from_arrays(arrays, names=batch._fields)


def from_record_batch(batch: pa.RecordBatch, dtype: np.dtype) -> RenderedBatch:
    """Views of the batch's memory; tokens are of `dtype`."""
    columns = zip(RenderedBatch._fields, batch.columns, strict=True)
    found = {name: column.values if name in LISTS else column for name, column in columns}
    return RenderedBatch(**found | {name: to_numpy(found[name], kind) for name, kind in _dtypes(dtype).items()})
