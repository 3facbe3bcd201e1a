"""Compare two checkpoints on the same items: which answers better, and is the difference more than chance?

Scores are compared item by item, because both answered the same questions. Two separate intervals would count the
difficulty of the questions as noise twice, and miss most real differences.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, to_builtins

from chateval.errors import ResultsError
from chateval.results.figures import Answers, Results, compute_results, finished_items
from chateval.results.intervals import mcnemar_exact, paired_bootstrap, pass_scores
from chateval.results.items import Item, read_items
from chateval.results.run_file import changes, read_run

FORMAT, VERSION = "chateval-comparison", 1
EXCERPT_CHARACTERS = 200  # the end of an output, where the answer is


class Turned(Struct, frozen=True):
    """An item whose score differs, shown by its first draw that differs in the same direction."""

    item: str
    draw: int
    gold: str
    extracted_a: str | None
    extracted_b: str | None
    output_a: str  # excerpt
    output_b: str


class Paired(Struct, frozen=True):
    """Two means over the same items, 0..1. None if no item is in both runs."""

    accuracy_a: float | None
    accuracy_b: float | None
    difference: float | None  # b - a
    interval: tuple[float, float] | None  # of the difference: paired bootstrap, 95 %


class TaskComparison(Paired, frozen=True):
    """One task, over the items finished in both runs."""

    items: int
    draws: int
    pass_at: dict[int, Paired]  # k → pass@k in place of accuracy, see `pass_scores`
    p: float | None  # McNemar, exact; None with several draws
    turned_right: int  # items whose score is higher in b
    turned_wrong: int
    only_in_a: int  # items finished only in a: not compared
    only_in_b: int
    examples_right: tuple[Turned, ...]
    examples_wrong: tuple[Turned, ...]


class Side(Struct, frozen=True):
    """One of the two runs, as a whole."""

    folder: str
    checkpoint: str
    step: int | None
    weights_sha256: str
    chat_core: float | None
    chat_core_missing: tuple[str, ...]
    other_tasks: tuple[str, ...]  # tasks that the other run does not have: not compared


class Comparison(Struct, frozen=True):
    a: Side
    b: Side
    tasks: dict[str, TaskComparison]

    def to_json(self) -> dict[str, Any]:
        """Plain data, floats not rounded."""
        return {"format": FORMAT, "version": VERSION, **to_builtins(self)}


def compare(a: Path, b: Path, examples: int = 5) -> Comparison:
    """Compare two results folders on the items that both have finished.

    examples: how many items per task that turned right, and how many that turned wrong, to keep with outputs.
    Raises ResultsError for folders that cannot be read, or cannot be compared: other settings, scoring or draws, an
    item of the same name with another prompt or gold answer, no task or no item in common.
    """
    run_a, run_b = read_run(a), read_run(b)
    if changed := changes(run_a.settings, run_b.settings):
        raise ResultsError(f"{a} and {b} cannot be compared: settings differ: {'; '.join(changed)}")
    shared = [name for name in run_a.tasks if name in run_b.tasks]
    if not shared:
        scored = " and ".join(", ".join(run.tasks) or "nothing" for run in (run_a, run_b))
        raise ResultsError(f"{a} and {b} have no task in common: they scored {scored}")
    for name in shared:
        how_a, how_b = ({"scoring": t.scoring, "draws": t.draws} for t in (run_a.tasks[name], run_b.tasks[name]))
        if changed := changes(how_a, how_b, name):
            raise ResultsError(f"{a} and {b} cannot be compared: {'; '.join(changed)}")
    items_a, items_b = read_items(a), read_items(b)
    finished_a, finished_b = finished_items(run_a, items_a)[0], finished_items(run_b, items_b)[0]
    tasks = {}
    for name in shared:
        tasks[name] = _compare_task(name, finished_a[name], finished_b[name], run_a.tasks[name].draws, examples)
    if not any(task.items for task in tasks.values()):
        raise ResultsError(f"{a} and {b} have no finished item in common, in {', '.join(shared)}")
    side_a = _side(a, compute_results(run_a, items_a), shared)
    return Comparison(side_a, _side(b, compute_results(run_b, items_b), shared), tasks)


def _side(folder: Path, results: Results, shared: Sequence[str]) -> Side:
    core = (results.chat_core, results.chat_core_missing)
    others = tuple(name for name in results.tasks if name not in shared)
    return Side(str(folder), results.checkpoint, results.step, results.weights_sha256, *core, others)


def _compare_task(task: str, a: Answers, b: Answers, draws: int, examples: int) -> TaskComparison:
    shared = [item for item in a if item in b]
    for item in shared:
        for first, second in zip(a[item], b[item], strict=True):
            for name in ("prompt_sha256", "gold"):
                if getattr(first, name) != getattr(second, name):
                    raise ResultsError(f"{task} item {item!r}: its {name} differs between the two runs")
    # Ordered by the hash of the prompt: the same examples every time, and not all from the first subject.
    shared.sort(key=lambda item: a[item][0].prompt_sha256)
    num_right_a, num_right_b = (
        np.array([sum(answer.correct for answer in side[item]) for item in shared], np.int64) for side in (a, b)
    )
    right = [item for item, more in zip(shared, num_right_b > num_right_a, strict=True) if more]
    wrong = [item for item, less in zip(shared, num_right_b < num_right_a, strict=True) if less]
    counts = {"items": len(shared), "turned_right": len(right), "turned_wrong": len(wrong)}
    counts |= {"only_in_a": len(a) - len(shared), "only_in_b": len(b) - len(shared)}
    passes = zip(*(pass_scores(num_right, draws).items() for num_right in (num_right_a, num_right_b)), strict=True)
    return TaskComparison(
        **to_builtins(_paired(num_right_a / draws, num_right_b / draws)),
        draws=draws,
        pass_at={k: _paired(np.array(a), np.array(b)) for (k, a), (_, b) in passes},
        p=mcnemar_exact(len(wrong), len(right)) if shared and draws == 1 else None,
        **counts,
        examples_right=tuple(_turned(a[item], b[item], to=True) for item in right[:examples]),
        examples_wrong=tuple(_turned(a[item], b[item], to=False) for item in wrong[:examples]),
    )


def _paired(a: np.ndarray, b: np.ndarray) -> Paired:
    """a, b: the scores [items] of the same items."""
    if not len(a):
        return Paired(None, None, None, None)
    return Paired(float(a.mean()), float(b.mean()), float((b - a).mean()), paired_bootstrap(a, b))


def _turned(a: Sequence[Item], b: Sequence[Item], to: bool) -> Turned:
    """The first draw that turned like its item: if more of b's draws are right, some draw is right only in b."""
    pairs = zip(a, b, strict=True)
    first, second = next((x, y) for x, y in pairs if x.correct is not to and y.correct is to)
    extracted, outputs = (first.extracted, second.extracted), (_excerpt(first.output), _excerpt(second.output))
    return Turned(first.item, first.draw, first.gold, *extracted, *outputs)


def _excerpt(output: str) -> str:
    return output if len(output) <= EXCERPT_CHARACTERS else "…" + output[1 - EXCERPT_CHARACTERS :]
