"""Reading a build. docs/format.md describes its files, maps.py reads their arrays."""

from __future__ import annotations

import html
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, cast, overload

import numpy as np
import xxhash

from chatdata.arrow import list_to_arrow, to_arrow
from chatdata.document import IGNORED, Document, framed
from chatdata.errors import FormatError
from chatdata.recipe import NATIVE
from chatdata.shards.address import local_build
from chatdata.shards.index import read_index
from chatdata.shards.manifest import check_files, read_manifest
from chatdata.shards.maps import Shards
from chatdata.shards.masks import MaskPolicy, Ranges, check_policy, covered, ranges_of, select

if TYPE_CHECKING:
    import datasets
    import polars as pl
    import pyarrow as pa

    from chatdata.tokenizer.bpe import Tokenizer

    Chosen = slice | Sequence[int] | np.ndarray  # or anything else that numpy takes as an array: a polars column

VIEW_DOCUMENTS = 2**10  # a shard, also in one Arrow array of lists: fewer than 2^31 tokens


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

    def _repr_html_(self) -> str:
        note = "Build: " + ", ".join(f"{key} {self.manifest[key]}" for key in ("build_id", "stage", "chat_format"))
        return framed(note, "".join(split._repr_html_() for split in self.splits.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Build, (self.path, self.manifest)  # not the memory maps: each process opens its own


@dataclass(frozen=True, eq=False)
class Split(Shards):
    """The documents of one split, memory-mapped. `split[i]` is a Document, `split.index` a polars frame."""

    build: Build
    _ranges: dict[str, Ranges] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    @overload
    def __getitem__(self, i: SupportsIndex) -> Document: ...  # type: ignore[overload-overlap]

    @overload
    def __getitem__(self, i: Chosen) -> View: ...

    def __getitem__(self, i: SupportsIndex | Chosen) -> Document | View:
        """Document `i`, or the View of a slice, of document numbers or of a boolean per document. Nothing is copied.

        Raises IndexError for a number out of range and for booleans of another length.
        """
        try:
            i = operator.index(cast(SupportsIndex, i))
        except TypeError:
            whole, documents = self._chosen(cast(slice, i))
            if documents.ndim != 1:
                raise IndexError(f"{self.name}: {i!r} is neither a number, a slice nor a list") from None
            lengths = np.diff(whole.offsets)[documents]
            parts = np.split(lengths, range(VIEW_DOCUMENTS, len(lengths), VIEW_DOCUMENTS))
            shards = [{"documents": len(part), "tokens": int(part.sum())} for part in parts]
            return View(self.build, self.name, shards, whole, documents)
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self):,} in {self.name}")
        start, stop = self.offsets[i % len(self) :][:2].tolist()
        return Document(self.tokens(start, stop), self.mask(start, stop), tokenizer=self.build.tokenizer)

    def filter(self, *predicates: pl.Expr) -> View:
        """The View of the documents for which polars expressions over `named_index` are all true.

        split.filter(pl.col("name") == "gsm8k", pl.col("num_tokens") <= 512)
        """
        return self[self.named_index.with_row_index("at").filter(*predicates)["at"].to_numpy()]

    def _chosen(self, i: Chosen) -> tuple[Split, np.ndarray]:
        """The whole split, and the numbers in it of documents of this one."""
        return self, np.arange(len(self))[i]

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))

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
            self._ranges[kind] = ranges_of(policy, self.spans())
        return select(policy, stored, covered(self._ranges[kind], starts, counts))

    def to_dataset(self, policy: MaskPolicy = "apply") -> datasets.Dataset:
        """The split for `datasets` and TRL, one row per document: aligned lists of equal length, not shifted.

        input_ids (uint16 or uint32), labels (int32: the id where the mask under `policy` is 1, else -100) and
        assistant_masks (uint8). transformers' models shift the labels themselves. With labels TRL (1.16) neither
        tokenizes nor masks; without them (older releases) it derives the same from assistant_masks. input_ids and the
        stored mask are memory maps of the shards (copies for a View); labels take 4 bytes of memory per token. Raises
        PlanError for an unknown policy.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        id_type = pa.from_numpy_dtype(np.dtype(self.build.manifest["dtype"]))
        types = {"input_ids": id_type, "labels": pa.int32(), "assistant_masks": pa.uint8()}
        tables = [pa.schema([(name, pa.list_(kind)) for name, kind in types.items()]).empty_table()]
        for first, last in pairwise(self._first_documents):
            bounds = self.offsets[first : last + 1]
            tokens, mask = self.tokens(bounds[0], bounds[-1]), self.mask(bounds[0], bounds[-1], policy)
            labels = tokens.astype(np.int32)
            labels[mask == 0] = IGNORED
            columns = [list_to_arrow(to_arrow(values), np.diff(bounds)) for values in (tokens, labels, mask)]
            tables.append(pa.table(columns, names=list(types)))
        # without a fingerprint, the dataset would hash all of its bytes for one
        numbers = self._chosen(slice(None))[1].tobytes()
        about = f"{self.build.manifest['build_id']} {self.name} {policy} ".encode() + numbers
        return Dataset(InMemoryTable(pa.concat_tables(tables)), fingerprint=xxhash.xxh3_128_hexdigest(about))

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self):,} documents, {self.num_tokens:,} tokens)"

    def _repr_html_(self) -> str:
        entries, keys = self.build.manifest["splits"][self.name]["entries"], ("documents", "tokens", "supervised")
        sums = {name: [sum(e[key] for e in entries if e["name"] == name) for key in keys] for name in self.names}
        table = '<table style="text-align:right">'
        table += "<tr><th>name</th><th>documents</th><th>tokens</th><th>supervised</th></tr>"
        for name, (documents, tokens, supervised) in sums.items():
            table += f'<tr><td style="text-align:left">{html.escape(name)}</td><td>{documents:,}</td>'
            table += f"<td>{tokens:,}</td><td>{supervised / max(tokens, 1):.1%}</td></tr>"
        return framed(repr(self), table + "</table>")


@dataclass(frozen=True, eq=False, repr=False)
class View(Split):
    """Some documents of a split, read where they are; to everything else that reads a split, a split like others.

    `tokens`, `mask` and `offsets` count tokens as if the documents were written one after the other. `index` has their
    rows of the whole index: its column `doc` is the number in the whole split.
    """

    whole: Split
    documents: np.ndarray  # int64, numbers in `whole`, in any order

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.diff(self.whole.offsets)[self.documents])])

    def _chosen(self, i: Chosen) -> tuple[Split, np.ndarray]:
        return self.whole, self.documents[i]

    def _runs(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens [start, stop) are in the whole split: first token of each run, tokens of each."""
        first, last = np.searchsorted(self.offsets, start, side="right") - 1, np.searchsorted(self.offsets, stop)
        cuts = np.clip(self.offsets[first : last + 1], start, stop)
        moved = self.whole.offsets[self.documents[first:last]] - self.offsets[first:last]
        return cuts[:-1] + moved, np.diff(cuts)

    def _read(self, kind: str, start: int, stop: int) -> np.ndarray:
        starts, counts = self._runs(start, stop)
        pieces = [self.whole._read(kind, at, at + n) for at, n in zip(starts.tolist(), counts.tolist(), strict=True)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.whole._read(kind, 0, 0), *pieces])

    def mask(self, start: int, stop: int, policy: MaskPolicy = "apply") -> np.ndarray:
        return self.whole.apply_policy(policy, self._range("mask", start, stop), *self._runs(start, stop))

    def index_table(self) -> pa.Table:
        return self.whole.index_table().take(self.documents)

    _repr_html_ = None  # type: ignore[assignment]  # the manifest does not count its documents
