"""Which rows of a source are for validation (recipe key `val_share`), by a hash of their content.

So a row stays on its side when others are added, and equal rows are on one side, whatever their file and its format.
"""

import hashlib
import json
from typing import Any

import msgspec
import numpy as np

from chatdata.arrow import without_nulls
from chatdata.sources.source import Source

_encode = msgspec.json.Encoder(order="sorted").encode


def in_val_rows(source: Source, val_share: float) -> np.ndarray:
    """bool [rows]: those whose `content_hash` is below `val_share`. Reads every row."""
    in_val = np.zeros(source.num_rows, dtype=bool)
    for row, raw in source.read(np.ones(source.num_rows, dtype=bool)):
        in_val[row] = content_hash(raw) < val_share
    return in_val


def content_hash(row: Any) -> float:
    """From 0 to 1: the first 8 bytes of SHA-256 of a row's JSON, with keys sorted, no spaces and no keys that are null.

    Parquet has a null for every key that another row has.
    """
    try:
        text = _encode(row)
        if b"null" in text:
            text = _encode(without_nulls(row))
    except (TypeError, ValueError, OverflowError, RecursionError):  # lone surrogates, 5,000 digits: not rendered later
        text = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
