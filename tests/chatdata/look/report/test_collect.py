"""The numbers of a report, against counts by hand and document by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata import open_build
from chatdata.document import SPAN_ROLES
from chatdata.look.report import collect
from chatdata.look.report.collect import histogram, report_numbers


def test_numbers_by_hand(small: Path) -> None:
    numbers = report_numbers(open_build(small))
    assert list(numbers["splits"]) == ["train", "val"]
    train = numbers["splits"]["train"]
    assert (train["documents"], train["tokens"], train["supervised"]) == (3, 8 + 15 + 16, 3 + 7 + 11)
    [entry] = train["entries"]
    assert (entry["rows"], entry["truncated"], entry["tokens_lost"]) == (4, 1, 10)
    assert entry["dropped"] == {"overflow": 0, "zero_supervised": 1, "invalid": 0}
    [task] = train["tasks"]
    assert task["roles"] == {
        "user": {"tokens": 3 * 3, "supervised": 0},
        "text": {"tokens": 2 + 1 + 11, "supervised": 2 + 1 + 11},
        "python": {"tokens": 5, "supervised": 5},
        "output": {"tokens": 3, "supervised": 0},
        "markers": {"tokens": 3 + 3 + 2, "supervised": 1 + 1},
    }
    assert task["length"] == {"min": 8, "median": 15, "p99": 16, "max": 16}
    assert [(part["from"], part["documents"]) for part in task["histogram"]["bins"] if part["documents"]] == [
        (8, 1),
        (15, 1),
        (16, 1),
    ]
    assert numbers["splits"]["val"]["tasks"][0]["roles"] == {
        "user": {"tokens": 3, "supervised": 0},
        "text": {"tokens": 1, "supervised": 1},
        "markers": {"tokens": 3, "supervised": 1},
    }
    vocabulary = numbers["vocabulary"]
    # a b c y 1 2 + and the nine special tokens; z occurs in val alone
    assert (vocabulary["entries"], vocabulary["used"], vocabulary["unused"]) == (265, 16, 249)
    assert (vocabulary["unused_bytes"], vocabulary["unused_ids"], vocabulary["elsewhere"]) == (249, [], {"val": 1})
    assert vocabulary["rare"] == 15  # all but y
    assert vocabulary["curve"][:2] == [
        {"rank": 1, "id": ord("y"), "count": 11},
        {"rank": 2, "id": ord("a"), "count": 3},
    ]
    assert [point["rank"] for point in vocabulary["curve"]] == list(range(1, 17))
    # y 11; a bos us ue as 3 each; b 1 ae 2 each; one of those that occur once
    assert vocabulary["coverage"] == {10: 11 + 5 * 3 + 3 * 2 + 1}


def test_numbers_do_not_depend_on_shards(build_small: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    for max_tokens, num_shards in ((1_000, 1), (20, 3)):
        monkeypatch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", max_tokens)
        opened = open_build(build_small(f"out{max_tokens}"))
        assert len(opened["train"].shards) == num_shards
        numbers.append(report_numbers(opened) | {"build_id": ""})
    assert numbers[0] == numbers[1]


def test_numbers_of_a_build_counted_document_by_document(demo_mid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "BLOCK_TOKENS", 1_000)  # documents on every side of the blocks' bounds
    opened = open_build(demo_mid)
    numbers = report_numbers(opened)
    for name, split in opened.splits.items():
        contents, found = opened.manifest["splits"][name], numbers["splits"][name]
        roles: Counter = Counter()
        ids: Counter = Counter()
        for row, document in zip(split.index.iter_rows(named=True), split, strict=True):
            in_span = np.zeros(len(document), dtype=bool)
            for span in row["spans"]:
                part = slice(span["start"], span["start"] + span["length"])
                in_span[part] = True
                role = SPAN_ROLES[span["role"]]
                roles[row["task"], role, "tokens"] += span["length"]
                roles[row["task"], role, "supervised"] += int(document.mask[part].sum())
            roles[row["task"], "markers", "tokens"] += int((~in_span).sum())
            roles[row["task"], "markers", "supervised"] += int(document.mask[~in_span].sum())
            ids.update(document.tokens.tolist())
        assert {
            (task["task"], role, key): count
            for task in found["tasks"]
            for role, counts in task["roles"].items()
            for key, count in counts.items()
            if count
        } == {key: count for key, count in roles.items() if count}
        for key in ("documents", "tokens", "supervised"):
            assert sum(task[key] for task in found["tasks"]) == contents[key] == found[key]
        for task in found["tasks"]:
            assert sum(part["documents"] for part in task["histogram"]["bins"]) == task["documents"]
        if name == "train":
            vocabulary = numbers["vocabulary"]
            assert vocabulary["used"] == len(ids)
            assert vocabulary["rare"] == sum(count < 10 for count in ids.values())
            assert all(ids[point["id"]] == point["count"] for point in vocabulary["curve"])
            ranked = sorted(ids.values(), reverse=True)
            assert all(ranked[point["rank"] - 1] == point["count"] for point in vocabulary["curve"])
            assert vocabulary["coverage"] == {top: sum(ranked[:top]) for top in vocabulary["coverage"]}
            assert not set(vocabulary["unused_ids"]) & set(ids)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
def test_histogram_counts_every_document_once(lengths: list[int]) -> None:
    found = histogram(np.array(lengths))
    bins, width = found["bins"], found["width"]
    assert len(bins) <= 40
    assert bins[0]["from"] <= min(lengths) and max(lengths) <= bins[-1]["to"]
    assert all(after["from"] == before["to"] + 1 == before["from"] + width for before, after in pairwise(bins))
    assert [part["documents"] for part in bins] == [
        sum(part["from"] <= length <= part["to"] for length in lengths) for part in bins
    ]


def test_histogram_of_one_very_long_document() -> None:
    found = histogram(np.array([*range(100, 300), 100_000]))
    assert (found["width"], found["bins"][0]["from"]) == (20, 100)
    assert found["bins"][-1] == {"from": 580, "to": 100_000, "documents": 1}
