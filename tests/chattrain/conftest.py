"""Splits made in memory from literal documents, and the golden builds (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from chatdata.shards import Build, Split, open_build

ROOT = Path(__file__).parents[2]
PADDING = 9  # the id of <|assistant_end|> in splits made here


@dataclass(frozen=True)
class MemorySplit(Split):
    """A split whose files are arrays: everything but `map` is chatdata's own."""

    arrays: tuple[dict[str, np.ndarray], ...] = ()

    def map(self, kind: str, number: int) -> np.ndarray:
        return self.arrays[number][kind]


@pytest.fixture(scope="session")
def make_split() -> Callable[..., Split]:
    """make_split(tokens of each document, masks, shards = documents of each shard, dtype of the tokens)."""

    def make(
        documents: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        shards: Sequence[int] | None = None,
        dtype: str = "<u2",
    ) -> Split:
        masks = masks if masks is not None else [[0] + [1] * (len(d) - 1) for d in documents]
        assert [*map(len, masks)] == [*map(len, documents)]
        arrays, records, first = [], [], 0
        for count in shards if shards is not None else [len(documents)]:
            lengths = [len(d) for d in documents[first : first + count]]
            tokens = np.array([i for d in documents[first : first + count] for i in d], dtype)
            mask = np.array([m for d in masks[first : first + count] for m in d], "|u1")
            offsets = np.cumsum([0, *lengths], dtype="<i8")
            arrays.append({"tokens": tokens, "mask": mask, "offsets": offsets})
            records.append({"documents": count, "tokens": len(tokens)})
            first += count
        assert first == len(documents)
        manifest = {
            "build_id": "memory",
            "stage": "sft",
            "splits": {"train": {"shards": records}},
            "tokenizer": {"special_ids": {"<|assistant_end|>": PADDING}},
        }
        return MemorySplit(Build(Path("memory"), manifest), "train", tuple(arrays))

    return make


@pytest.fixture(scope="session")
def golden_mid(golden_mid: Path) -> Build:
    """The mid mixture of golden/streams.json: 46,479 documents."""
    return open_build(golden_mid)


@pytest.fixture(scope="session")
def golden_sft(golden_sft: Path) -> Build:
    """The sft mixture of golden/streams.json: 22,139 documents."""
    return open_build(golden_sft)
