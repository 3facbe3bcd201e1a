"""Reading a build; docs/format.md describes the format.

OUT/manifest.json                        written last, by rename
OUT/{train,val}/tokens-00000.npy         `<u2` or `<u4` [num_tokens]
OUT/{train,val}/mask-00000.npy           `|u1` [num_tokens], 0 or 1, aligned with the token
OUT/{train,val}/offsets-00000.npy        `<i8` [num_documents + 1], 0 … num_tokens
OUT/{train,val}/index-00000.parquet      one row per document
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from chatdata.arrow import list_to_arrow, to_arrow, values_of
from chatdata.document import IGNORED, Document
from chatdata.errors import FormatError
from chatdata.recipe import NATIVE
from chatdata.shards.address import local_build
from chatdata.shards.index import open_index, read_index
from chatdata.shards.manifest import check_files, read_manifest
from chatdata.shards.masks import check_policy, covered, ranges_of, select

if TYPE_CHECKING:
    import datasets
    import polars as pl
    import pyarrow as pa

    from chatdata.shards.masks import DocumentSpans, MaskPolicy, Ranges
    from chatdata.tokenizer.bpe import Tokenizer

INDEX_ROWS_AT_ONCE = 2**16  # smoltalk has 14 spans a document, so 10 MB


def open_build(path: str | Path, expect: str | None = None) -> Build:
    """Open a build for reading, after every check of `chatdata verify --level quick`: milliseconds, no token is read.

    path: its folder, or an address (`hf://datasets/OWNER/NAME`, `s3://…`): then it is fetched once, into the cache.
    expect: its build_id, or at least the first 12 digits. Raises FormatError if the folder is not a finished build, one
    of its files is not what the manifest says, or it is another build; and for an address see `local_build`.
    """
    folder = local_build(path, expect)
    manifest = read_manifest(folder)
    problems, _ = check_files(folder, manifest)
    if problems:
        raise FormatError(problems[0])
    return Build(folder, manifest)


@dataclass(frozen=True)
class Build:
    """A build folder, open for reading: `build["train"]`, `build.manifest`, `build.tokenizer`."""

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def splits(self) -> dict[str, Split]:
        return {name: Split(self, name, split["shards"]) for name, split in self.manifest["splits"].items()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from chatdata.tokenizer.files import load_tokenizer
        from chatdata.tokenizer.folder import read_folder

        is_native = self.manifest["chat_format"] == NATIVE
        return load_tokenizer(self.path / "tokenizer") if is_native else read_folder(self.path / "tokenizer")

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise KeyError(f"{self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(split):,} documents" for name, split in self.splits.items())
        return f"Build({str(self.path)!r}, stage {self.manifest['stage']}, {sizes})"


@dataclass(frozen=True, eq=False)
class Split:
    """The documents of one split, memory-mapped. `split[i]` is a Document, `split.index` a polars frame."""

    build: Build
    name: str
    shards: list[dict[str, Any]]  # of the manifest
    _maps: dict[tuple[str, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _ranges: dict[str, Ranges] = field(default_factory=dict, init=False, repr=False)

    def path(self, kind: str, number: int) -> Path:
        return self.build.path / self.name / self.shards[number]["files"][kind]["file"]

    def map(self, kind: str, number: int) -> np.ndarray:
        """The memory-mapped array of a shard: kind "tokens", "mask" or "offsets"."""
        key = (kind, number)
        if key not in self._maps:
            try:
                array = np.load(self.path(kind, number), mmap_mode="r", allow_pickle=False)
            except ValueError as error:
                raise FormatError(f"{self.path(kind, number)}: not a readable .npy file: {error}") from None
            self._maps[key] = array.view(np.ndarray)
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

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    @overload
    def __getitem__(self, i: SupportsIndex) -> Document: ...

    @overload
    def __getitem__(self, i: slice) -> list[Document]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> Document | list[Document]:
        """Document `i` (views of the maps: nothing is copied), or a list of documents for a slice."""
        if isinstance(i, slice):
            return [self._document(j) for j in range(*i.indices(len(self)))]
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self):,} in {self.name}")
        return self._document(i % len(self))

    def __iter__(self) -> Iterator[Document]:
        return (self._document(i) for i in range(len(self)))

    def _document(self, i: int) -> Document:
        number = int(np.searchsorted(self._first_documents, i, side="right")) - 1
        start, stop = self.map("offsets", number)[i - self._first_documents[number] :][:2].tolist()
        tokens, mask = (self.map(kind, number)[start:stop] for kind in ("tokens", "mask"))
        return Document(tokens, mask, tokenizer=self.build.tokenizer)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the split: a view within one shard, a copy if the range crosses shards."""
        return self._range("tokens", start, stop)

    def mask(self, start: int, stop: int, policy: MaskPolicy = "apply") -> np.ndarray:
        """Mask [start, stop) of the split, like `tokens`; a new array for any policy (masks.py) but "apply"."""
        return self.apply_policy(policy, self._range("mask", start, stop), np.array([start]), np.array([stop - start]))

    def apply_policy(
        self, policy: MaskPolicy, stored: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """The mask under a policy, of several runs of tokens of the split, one after the other.

        stored: uint8 [counts.sum()], the mask on disk of tokens starts[i] … starts[i] + counts[i] for each i. Returns
        uint8 of the same shape: `stored` itself for "apply", else a new array. Raises PlanError for an unknown policy.
        """
        if policy == "apply":
            return stored
        if policy == "ignore":
            return np.ones_like(stored)
        check_policy(policy)
        kind = "no-tools" if policy == "tools-only" else policy  # both need the python parts
        if kind not in self._ranges:
            self._ranges[kind] = ranges_of(policy, self._spans())
        return select(policy, stored, covered(self._ranges[kind], starts, counts))

    def _spans(self) -> Iterator[DocumentSpans]:
        """The spans of all documents, a piece of the index at a time."""
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

    def _range(self, kind: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.num_tokens:,} in {self.name}")
        number = int(np.searchsorted(self._first_tokens[:-1], start, side="right")) - 1
        pieces = []
        while True:
            first, last = self._first_tokens[number : number + 2].tolist()
            pieces.append(self.map(kind, number)[start - first : min(stop, last) - first])
            if stop <= last:
                return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            start, number = last, number + 1

    def to_dataset(self, policy: MaskPolicy = "apply") -> datasets.Dataset:
        """The split for `datasets` and TRL, one row per document: aligned lists of equal length, not shifted.

        input_ids (uint16 or uint32), labels (int32: the id where the mask under `policy` is 1, else -100) and
        assistant_masks (uint8). transformers' models shift the labels themselves. With labels TRL (1.16) neither
        tokenizes nor masks; without them (older releases) it derives the same from assistant_masks. input_ids and the
        stored mask are memory maps of the shards; labels take 4 bytes of memory per token. Raises PlanError for an
        unknown policy.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        types = {
            "input_ids": pa.from_numpy_dtype(np.dtype(self.build.manifest["dtype"])),
            "labels": pa.int32(),
            "assistant_masks": pa.uint8(),
        }
        tables = [pa.schema([(name, pa.list_(kind)) for name, kind in types.items()]).empty_table()]
        first = 0
        for number, shard in enumerate(self.shards):
            tokens, stored, offsets = (self.map(kind, number) for kind in ("tokens", "mask", "offsets"))
            mask = self.apply_policy(policy, stored, np.array([first]), np.array([len(stored)]))
            labels = tokens.astype(np.int32)
            labels[mask == 0] = IGNORED
            columns = [list_to_arrow(to_arrow(values), np.diff(offsets)) for values in (tokens, labels, mask)]
            tables.append(pa.table(columns, names=list(types)))
            first += shard["tokens"]
        # without a fingerprint, the dataset would hash all of its bytes for one
        name = f"{self.build.manifest['build_id'][:32]}-{self.name}-{policy}"
        return Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=name)

    def index_table(self) -> pa.Table:
        """The index as a pyarrow table (see `index_schema`), without polars. Raises FormatError if it is damaged."""
        import pyarrow as pa

        return pa.concat_tables([read_index(self.path("index", number)) for number in range(len(self.shards))])

    @cached_property
    def index(self) -> pl.DataFrame:
        """The index as a polars frame: doc, row, task_position, task, entry, num_tokens, … (docs/format.md)."""
        import polars as pl

        return pl.DataFrame(pl.from_arrow(self.index_table()))

    @property
    def names(self) -> list[str]:
        """The name of each entry: what its recipe calls it, by default its task."""
        return [entry["name"] for entry in self.build.manifest["splits"][self.name]["entries"]]

    @cached_property
    def named_index(self) -> pl.DataFrame:
        """`index` with the column `name`: that of each document's entry."""
        import polars as pl

        names = pl.col("entry").replace_strict(dict(enumerate(self.names)), default=None, return_dtype=pl.String)
        return self.index.with_columns(name=names)
