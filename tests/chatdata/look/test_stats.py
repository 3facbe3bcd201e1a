from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from chatdata import open_build


def test_numbers_are_those_of_the_documents(demo_mid: Path, chatdata: Callable) -> None:
    numbers = json.loads(chatdata("stats", demo_mid, "--json").stdout)
    build = open_build(demo_mid)
    for name, tasks in numbers["splits"].items():
        assert [row["tokens"] for row in tasks] == sorted((row["tokens"] for row in tasks), reverse=True)
        frame = build[name].index
        for row in tasks:
            documents = [build[name][doc] for doc in frame.filter(frame["task"].cast(str) == row["task"])["doc"]]
            lengths = sorted(map(len, documents))
            assert (row["documents"], row["tokens"]) == (len(documents), sum(lengths))
            assert row["supervised"] == sum(document.num_supervised for document in documents)
            assert (row["length"]["min"], row["length"]["max"]) == (lengths[0], lengths[-1])


def test_narrow_terminals_cut_no_number(demo_mid: Path, chatdata: Callable) -> None:
    shown = chatdata("stats", demo_mid, env={**os.environ, "COLUMNS": "60"}).stdout
    numbers = json.loads(chatdata("stats", demo_mid, "--json").stdout)["splits"]["train"]
    assert all(row["task"] in shown and f"{row['tokens']:,}" in shown for row in numbers) and "…" not in shown
