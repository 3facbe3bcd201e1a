"""What `chatdata build` prints, from a manifest and a report written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatdata.look.build import show_result


def entry(number: int, task: str, documents: int, tokens: int, supervised: int, dropped: int = 0) -> dict[str, Any]:
    counts = {
        "rows": documents + dropped,
        "documents": documents,
        "tokens": tokens,
        "supervised": supervised,
        "truncated": 1,
        "tokens_lost": 10,
    }
    return {
        "entry": number,
        "task": task,
        "name": task,
        "subset": "",
        "split": "train",
        "source": f"{task}.jsonl",
        **counts,
        "dropped": {"overflow": dropped, "zero_supervised": 0},
    }


MANIFEST = {
    "build_id": "0123456789abcdef",
    "splits": {
        "train": {"entries": [entry(0, "a", 1, 1_000, 250), entry(1, "a", 1, 1_000, 250), entry(2, "b", 3, 9, 0, 2)]}
    },
}
REPORT: dict[str, Any] = {
    "duration_s": {"total": 2.51},
    "units": {"rendered": 1, "cached": 2, "damaged": 0},
    "encoder": {"name": "gigatoken", "texts": 1_000, "texts_checked": 50},
    "tool_calls": {"train": {"entries": {}}},
    "invalid": {"train": {"rows": 0, "reasons": {}, "listed": []}},
}


def lines(capsys: pytest.CaptureFixture[str], **report: Any) -> list[str]:
    show_result(MANIFEST, REPORT | report, Path("out"))
    return [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_ledger_adds_epochs_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys) == [
        "train",
        "task  documents  tokens  supervised  share  truncated  tokens lost  dropped",
        "a ×2          2   2,000         500  25.0%          2           20        0",
        "b             3       9           0   0.0%          1           10        2",
        "all           5   2,009         500  24.9%          3           30        2",
        "2 documents dropped: over max_tokens",
        "2.5 s, 1 of 3 work units rendered, encoded with gigatoken (50 of 1,000 texts checked against tiktoken)",
        "out: build 0123456789ab is complete",
    ]


def test_tool_calls(capsys: pytest.CaptureFixture[str]) -> None:
    calls = {"0": {"name": "a", "calls": 1_200}, "1": {"name": "a", "calls": 1_200}, "2": {"name": "b", "calls": 7}}
    shown = lines(capsys, tool_calls={"train": {"entries": calls}})
    assert "2,407 tool calls: all recorded outputs match the calculator" in shown
    calls["2"] |= {"different": 3, "no_output": 1}
    shown = lines(capsys, tool_calls={"train": {"entries": calls}})
    start = shown.index("tool calls whose recorded output does not match the calculator")
    assert [line.split() for line in shown[start + 1 : start + 4]] == [
        ["task", "calls", "different", "no_output"],
        ["a", "2,400", "0", "0"],
        ["b", "7", "3", "1"],
    ]


def test_firewall(capsys: pytest.CaptureFixture[str]) -> None:
    firewall: dict[str, Any] = {
        "decontaminate": "report",
        "flagged_rows": 4,
        "rows": {"a": {"gsm8k": 4}},
        "checked": {"gsm8k": {"items": 1_319, "flagged": 2}, "mmlu": {"items": 10, "flagged": 0}},
        "not_checked": {"arc_easy": "no file", "humaneval": "no file"},
    }
    shown = lines(capsys, firewall=firewall)
    start = shown.index("firewall: 4 training rows hold scored items (kept; --decontaminate drop leaves them out)")
    assert shown[start + 1 : start + 7] == [
        "rows of            gsm8k",
        "a" + " " * 22 + "4",
        "scored items  2 of 1,319",
        "every row is listed in firewall.json, in the build",
        "no match: mmlu (10)",
        "not checked (no file): arc_easy, humaneval",
    ]
    firewall["checked"]["gsm8k"]["flagged"] = 0
    assert "firewall: no training row holds any of 1,329 scored items" in lines(capsys, firewall=firewall)
    firewall["checked"] = {}
    shown = lines(capsys, firewall=firewall)
    start = shown.index("firewall: no scored set was found to search for; --against FILE adds your own test items")
    assert shown[start + 1] == "not checked (no file): arc_easy, humaneval"


def test_bad_rows(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [{"file": "a.jsonl", "line": n, "reason": "not\nJSON"} for n in range(1, 5)]
    listed[1] = {"file": "b.parquet", "row": 0, "reason": "[red]"}
    shown = lines(capsys, invalid={"train": {"rows": 4, "reasons": {"not JSON": 4}, "listed": listed}})
    start = shown.index("  a.jsonl:1: not\\nJSON")
    assert shown[start + 1 : start + 4] == [
        "  b.parquet row 0: [red]",
        "  a.jsonl:3: not\\nJSON",
        "  … report.json, in the build, lists 4 of these rows",
    ]
