"""Literals of results folders: items, tasks and runs as they are on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatdata.disk import convert
from chateval.errors import ResultsError
from chateval.results.figures import Results, compute_results
from chateval.results.items import Item, append_item, open_items
from chateval.results.run_file import Run

KINDS = {
    "categorical": {"tie": False, "margin": 1.5, "letter_mass": 0.75, "ending": "letter"},
    "generative": {"flexible_extracted": "5", "flexible_correct": True, "tool_calls": 2, "tool_failures": 1},
    "code": {"ending": "passed"},
}


@pytest.fixture(scope="session")
def item() -> Callable[..., dict[str, Any]]:
    """item(task, name, kind, **changes): a line of items.jsonl."""

    def make(
        task: str = "gsm8k", name: str = "main test 0", kind: str = "generative", **changes: Any
    ) -> dict[str, Any]:
        record = {
            "task": task,
            "item": name,
            "subject": None,
            "draw": 0,
            "prompt_sha256": f"sha of {name}",
            "output": "#### 5",
            "extracted": "5",
            "gold": "5",
            "correct": True,
            "ending": "assistant_end",
            "num_prompt_tokens": 40,
            "num_tokens": 6,
            "gold_nats": None,
            "gold_bytes": None,
        }
        if "correct" in changes:  # the answer is what was graded
            record["extracted"] = "5" if changes["correct"] else "6"
        if "flexible_correct" in changes:
            changes.setdefault("flexible_extracted", "5" if changes["flexible_correct"] else "6")
        if kind == "code":
            changes.setdefault("ending", "passed" if changes.get("correct", True) else "failed")
        return {**record, **KINDS[kind], **changes}

    return make


@pytest.fixture(scope="session")
def task_of() -> Callable[..., dict[str, Any]]:
    """task_of(items, scoring, chance, draws): a task of run.json."""

    def make(items: int, scoring: str = "generative", chance: float = 0.0, draws: int = 1) -> dict[str, Any]:
        return {"scoring": scoring, "chance": chance, "items": items, "draws": draws, "source": {"revision": "abc"}}

    return make


@pytest.fixture(scope="session")
def run_of() -> Callable[..., Run]:
    """run_of(tasks, **changes): a run.json."""

    def make(tasks: dict[str, Any], **changes: Any) -> Run:
        run = {
            "format": "chateval-run",
            "version": 1,
            "weights_sha256": "a" * 64,
            "checkpoint": "runs/d4",
            "step": 120,
            "settings": {"temperature": 0.0, "seed": 42, "stop": ["x", 1]},
            "tasks": tasks,
        }
        return convert({**run, **changes}, Run, "run.json", ResultsError)

    return make


@pytest.fixture(scope="session")
def write_items() -> Callable[..., None]:
    """write_items(path, *items): appends lines to an items file."""

    def write(path: Path, *items: dict[str, Any]) -> None:
        with open_items(path) as file:
            for record in items:
                append_item(file, record)

    return write


@pytest.fixture(scope="session")
def compute(run_of: Callable[..., Run]) -> Callable[..., Results]:
    """compute(tasks, *items): the figures of a run."""

    def figures(tasks: dict[str, Any], *items: dict[str, Any]) -> Results:
        return compute_results(run_of(tasks), [convert(record, Item, "item", ResultsError) for record in items])

    return figures
