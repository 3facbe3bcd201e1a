"""Many conversations to many documents at once: one encode call for all texts, then ids and mask laid out as arrays.

A conversation is a run of pieces. A piece is one text with its role (user, text, python or output, as in a span) and
whether an assistant message opens before it or closes behind it; that and its number of ids decide every delimiter and
mask value around it. render.py is the specification: both give the same documents (tests/chatdata/test_columns.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chatdata.document import SPAN_ROLES, check_range
from chatdata.render.pieces import CLOSES, OPENS, OUTPUT, PYTHON, TEXT, USER, Pieces
from chatdata.render.replay import replay_calls

if TYPE_CHECKING:
    import pyarrow as pa

_DELIMITERS = {  # role → tokens around it; a text has none
    USER: ("<|user_start|>", "<|user_end|>"),
    PYTHON: ("<|python_start|>", "<|python_end|>"),
    OUTPUT: ("<|output_start|>", "<|output_end|>"),
}
_SUPERVISED = np.array([0, 1, 1, 0], dtype=np.uint8)  # by role, delimiters included
SPAN_DTYPE = np.dtype([("role", "u1"), ("start", "<u4"), ("length", "<u4")])  # packed: 9 bytes

# texts → (ids of all of them, [num_ids]; number of ids of each, int64 [num_texts])
EncodeBatch = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class RenderedBatch:
    """Rendered documents back to back; `tokens` and `mask` are [num_tokens], the others have a row per document but
    `spans` (SPAN_DTYPE, `num_spans` per document, starts counted within the document)."""

    tokens: np.ndarray
    mask: np.ndarray
    num_tokens: np.ndarray
    num_supervised: np.ndarray
    num_turns: np.ndarray
    num_tool_calls: np.ndarray
    num_spans: np.ndarray
    spans: np.ndarray
    digests: np.ndarray  # "V16"
    num_mismatches: np.ndarray  # tool calls whose recorded output is not what the calculator gives (replay.py)
    mismatches: Sequence[str] | pa.StringArray  # as rendered, as read


def render_batch(
    pieces: Pieces, encode: EncodeBatch, special_ids: Mapping[str, int], dtype: np.dtype, vocab_size: int
) -> RenderedBatch:
    """Render conversations: tokens in `dtype`, everything else as Columns says. Nothing is cut.

    Raises TokenizerError from `encode`, FormatError if it gives an id at or over `vocab_size`.
    """
    ids, num_ids = encode(pieces.texts)
    check_range(ids, vocab_size)
    role, opens, closes = pieces.codes & 3, (pieces.codes & OPENS) > 0, (pieces.codes & CLOSES) > 0
    delimited = role != TEXT
    first_piece = np.cumsum(pieces.counts) - pieces.counts
    starts_document = np.zeros(len(role), dtype=bool)
    starts_document[first_piece] = True
    body = num_ids + 2 * delimited  # what a span covers: the text with its delimiters
    length = body + starts_document + opens + closes
    end = np.cumsum(length)
    begin = end - length
    body_begin = begin + starts_document + opens
    body_end = body_begin + body
    bos, assistant_start = begin[first_piece], (body_begin - 1)[opens]
    assistant_end = body_end[closes]
    opening, closing = np.zeros((2, len(SPAN_ROLES)), dtype=np.int64)
    for span_role, (opening_token, closing_token) in _DELIMITERS.items():
        opening[span_role], closing[span_role] = special_ids[opening_token], special_ids[closing_token]

    num_tokens = np.add.reduceat(length, first_piece)
    tokens = np.empty(int(end[-1]), dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    for places, special in (
        (bos, special_ids["<|bos|>"]),
        (assistant_start, special_ids["<|assistant_start|>"]),
        (body_begin[delimited], opening[role[delimited]]),
        (body_end[delimited] - 1, closing[role[delimited]]),
        (assistant_end, special_ids["<|assistant_end|>"]),
    ):
        tokens[places] = special
        is_text[places] = False
    tokens[is_text] = ids
    mask = np.repeat(_SUPERVISED[role], length)
    mask[bos] = 0
    mask[assistant_start] = 0
    mask[assistant_end] = 1

    def per_document(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, first_piece, dtype=np.int64)

    calls = np.flatnonzero(role == PYTHON)
    mismatches, mismatched = replay_calls(pieces.texts, role, calls)
    conversation = np.searchsorted(np.cumsum(pieces.counts), mismatched, side="right")
    num_mismatches = np.bincount(conversation, minlength=len(pieces))
    has_span = body > 0
    spans = np.empty(int(has_span.sum()), dtype=SPAN_DTYPE)
    spans["role"] = role[has_span]
    spans["start"] = (body_begin - np.repeat(bos, pieces.counts))[has_span]
    spans["length"] = body[has_span]
    return RenderedBatch(
        tokens=tokens,
        mask=mask,
        num_tokens=num_tokens,
        num_supervised=per_document(np.where(_SUPERVISED[role], body, 0) + closes),
        num_turns=per_document((role == USER) + opens.astype(np.int64)),
        num_tool_calls=per_document(role == PYTHON),
        num_spans=per_document(has_span),
        spans=spans,
        digests=digests_of(tokens, mask, num_tokens),
        num_mismatches=num_mismatches,
        mismatches=mismatches,
    )


def digests_of(tokens: np.ndarray, mask: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """BLAKE2b (16 bytes) per document: its ids as `<u4` bytes, then its mask bytes; "V16" [num_documents]."""
    ids, mask_bytes = tokens.astype("<u4").data.cast("B"), mask.data
    digests, begin, empty = [], 0, hashlib.blake2b(digest_size=16)
    for end in np.cumsum(num_tokens).tolist():
        digest = empty.copy()  # a quarter quicker than a new one
        digest.update(ids[4 * begin : 4 * end])
        digest.update(mask_bytes[begin:end])
        digests.append(digest.digest())
        begin = end
    return np.frombuffer(b"".join(digests), dtype="V16")
