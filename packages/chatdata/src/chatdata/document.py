"""A rendered conversation and ways to look at it."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

IGNORED = -100  # a label without loss, in torch and transformers
# what a span's role number means, in the index and in Document.spans
SPAN_ROLES = ("user", "text", "python", "output", "reasoning")
# columns of the index, int32
INDEX_COUNTS = ("num_tokens", "num_supervised", "num_turns", "num_tool_calls", "untrained_turns", "original_tokens")
# tokens that end a line of `conversation_markup`; tests/chatdata/render/test_format.py holds them to the chat format
LINE_ENDS = ("<|bos|>", "<|user_end|>", "<|assistant_end|>")


class Span(NamedTuple):
    """A run of tokens of one role: user, python and output with their delimiters, text and reasoning without any.

    trained: whether its tokens have mask 1.
    """

    role: int
    start: int
    length: int
    trained: bool


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens [n] (uint16 or uint32), mask [n] (uint8: 1 = supervised), aligned, not shifted.

    Both are views if the document comes from a build: slicing and reading copy nothing. `spans` is filled by the
    renderer; for a document of a build, spans are in the split's index.
    """

    tokens: np.ndarray
    mask: np.ndarray
    spans: tuple[Span, ...] = ()
    tokenizer: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Document({len(self)} tokens, {self.num_supervised} supervised)"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.mask))

    def text(self) -> str:
        """The whole document as text, special tokens spelled out."""
        return self._tokenizer().decode(self.tokens.tolist())

    def conversation_markup(self) -> str:
        """Text that shows the mask without colour: supervised runs between ⟦ and ⟧, a line per message."""
        lines = "".join(f"⟦{text}⟧" if supervised else text for supervised, text in self.runs())
        return re.sub(f"({'|'.join(map(re.escape, LINE_ENDS))})⟧?", r"\g<0>\n", lines).rstrip("\n")

    def runs(self) -> Iterator[tuple[bool, str]]:
        """(supervised, text) for each longest run of equal mask."""
        tokenizer = self._tokenizer()
        cuts = np.flatnonzero(np.diff(self.mask)) + 1
        for part, mask in zip(np.split(self.tokens, cuts), np.split(self.mask, cuts), strict=True):
            if len(part):
                yield bool(mask[0]), tokenizer.decode(part.tolist())

    def _repr_html_(self) -> str:
        pieces = []
        for supervised, text in self.runs():
            style = "background:#c8ecc8;color:#0b3d0b" if supervised else "opacity:.65"
            pieces.append(f'<span style="{style}">{html.escape(text)}</span>')
        note = f"{len(self)} tokens, {self.num_supervised} supervised (green)"
        return framed(note, f'<pre style="white-space:pre-wrap;margin:4px 0 0">{"".join(pieces)}</pre>')

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TypeError("this Document was made without a tokenizer, so its text cannot be shown")
        return self.tokenizer


def blocks_of(sizes: np.ndarray, max_size: int) -> list[tuple[int, int]]:
    """[first, last) of each block of neighbours: a block closes before the document that would pass `max_size`.

    A document over `max_size` is a block of one. Sizes are tokens for shards and for what is held in memory at once,
    characters for texts encoded in one call.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    bounds, first, used = [], 0, 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(ends, used + max_size, side="right")))
        bounds.append((first, last))
        first, used = last, int(ends[last - 1])
    return bounds


def framed(note: str, content: str) -> str:
    """HTML for a notebook, light or dark: a note (text) above content (HTML)."""
    frame = "border:1px solid #ccc;padding:6px;margin:4px 0"
    return f'<div style="{frame}"><small>{html.escape(note)}</small>{content}</div>'
