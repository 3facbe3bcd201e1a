"""Pieces straight from an Arrow table of conversations, without a Python object per message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chatdata.arrow import to_numpy
from chatdata.render.pieces import CLOSES, OPENS, TEXT, USER, Pieces

if TYPE_CHECKING:
    import pyarrow as pa


_MESSAGE_ROLES = {"user": 0, "assistant": 1, "system": 2}


def pieces_of_table(table: pa.RecordBatch) -> Pieces | None:
    """Pieces of rows that hold well-formed conversations in a column `messages` of (role, content) strings.

    None if the table is of any other form or any row is not well-formed: `parse_conversation` then tells them apart.
    """
    import pyarrow as pa

    if {"system", "tools", "conversations"} & set(table.schema.names) or table.schema.names.count("messages") != 1:
        return None
    column = table.column("messages")
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return None
    fields = {field.name: field.type for field in kind.value_type}
    if fields.keys() != {"role", "content"} or kind.value_type.num_fields != 2:
        return None
    if not all(pa.types.is_string(type_) or pa.types.is_large_string(type_) for type_ in fields.values()):
        return None
    messages = column.flatten()
    role, content = messages.field("role"), messages.field("content")
    if any(array.null_count for array in (column, messages, role, content)):
        return None
    lengths = np.diff(to_numpy(column.offsets, np.dtype("i8" if pa.types.is_large_list(kind) else "i4"))).astype(
        np.int64
    )
    roles = role.dictionary_encode()  # three strings, and a number for each message
    code_of = np.array([_MESSAGE_ROLES.get(name, 9) for name in roles.dictionary.to_pylist()], dtype=np.uint8)
    codes = code_of[to_numpy(roles.indices, np.dtype("i4"))]
    first = np.cumsum(lengths) - lengths
    if not len(lengths) or lengths.min() == 0:
        return None
    system = codes[first] == 2
    # roles alternate from user on, counted behind a system message
    place = np.arange(len(codes)) - np.repeat(first + system, lengths)
    expected = (place % 2).astype(np.uint8)
    expected[first[system]] = 2
    if (lengths <= system).any() or not np.array_equal(codes, expected):
        return None
    texts = content.to_pylist()
    if system.any():
        for message in reversed(first[system].tolist()):
            texts[message : message + 2] = [f"{texts[message]}\n\n{texts[message + 1]}"]
        codes, lengths = codes[codes != 2], lengths - system
    piece_codes = np.array([USER, TEXT | OPENS | CLOSES], dtype=np.uint8)[codes]
    return Pieces(texts, piece_codes, lengths)
