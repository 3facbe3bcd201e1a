"""The files of a split, memory-mapped when they are first read, and read as if they were one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.arrow import values_of
from chatdata.errors import FormatError
from chatdata.shards.index import open_index
from chatdata.shards.masks import DocumentSpans

INDEX_ROWS_AT_ONCE = 2**16  # smoltalk has 14 spans a document, so 10 MB


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of the manifest of `build`, in the order that they are numbered by."""

    build: Any  # its `path` is the folder
    name: str  # of the split
    shards: list[dict[str, Any]]  # of the manifest
    _maps: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # not the memory maps: each process opens its own
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)

    def path(self, kind: str, number: int) -> Path:
        return Path(self.build.path, self.name, self.shards[number]["files"][kind]["file"])

    def map(self, kind: str, number: int) -> np.ndarray:
        """The memory-mapped array of a shard: kind "tokens", "mask" or "offsets"."""
        key = (kind, number)
        if key not in self._maps:
            try:
                self._maps[key] = np.load(self.path(kind, number), mmap_mode="r").view(np.ndarray)
            except ValueError as error:
                raise FormatError(f"{self.path(kind, number)}: not a readable .npy file: {error}") from None
        return self._maps[key]

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.cumsum([0, *(shard["documents"] for shard in self.shards)])

    @cached_property
    def _first_tokens(self) -> np.ndarray:
        return np.cumsum([0, *(shard["tokens"] for shard in self.shards)])

    @property
    def num_tokens(self) -> int:
        return int(self._first_tokens[-1])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where documents start in the split (int64 [documents + 1]), over all shards."""
        parts = [self.map("offsets", n)[:-1] + self._first_tokens[n] for n in range(len(self.shards))]
        return np.concatenate([*parts, [self.num_tokens]]).astype(np.int64)

    def _range(self, kind: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.num_tokens:,} in {self.name}")
        return self._read(kind, start, stop)

    def _read(self, kind: str, start: int, stop: int) -> np.ndarray:
        """Tokens or mask [start, stop), counted over all shards: a view within one shard, else a copy."""
        first = int(np.searchsorted(self._first_tokens[:-1], start, side="right")) - 1
        last = max(first + 1, int(np.searchsorted(self._first_tokens, stop)))
        bounds = self._first_tokens[first:last].tolist()
        pieces = [self.map(kind, n)[max(0, start - at) : stop - at] for n, at in enumerate(bounds, first)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def spans(self) -> Iterator[DocumentSpans]:
        """The spans of all documents, some documents at a time. Raises FormatError if they overlap or leave theirs."""
        first = 0
        for number in range(len(self.shards)):
            with open_index(self.path("index", number)) as file:
                for batch in file.iter_batches(INDEX_ROWS_AT_ONCE, columns=["spans"]):
                    lists = batch.column("spans")
                    document = np.repeat(np.arange(len(lists)), values_of(lists.value_lengths()))
                    spans = np.stack([values_of(field).astype(np.int64) for field in lists.flatten().flatten()[:3]])
                    bounds = self.offsets[first : first + len(lists) + 1]
                    start, stop = bounds[document] + spans[1], bounds[document] + spans[1] + spans[2]
                    if (stop > bounds[document + 1]).any() or (start[1:] < stop[:-1]).any():
                        raise FormatError(f"{self.path('index', number)}: spans overlap or leave their document")
                    yield bounds, document, spans
                    first += len(lists)
