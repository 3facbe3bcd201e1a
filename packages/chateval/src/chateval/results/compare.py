"""Two checkpoints on the same items: who answers better, and is the difference more than chance.

The same questions were asked twice, so scores are compared item by item. Two separate intervals would count the
difficulty of the questions as noise twice, and miss most real differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chateval.errors import ResultsError
from chateval.results.figures import Results, compute_results, differences, finished_items, read_run
from chateval.results.intervals import mcnemar_exact, paired_bootstrap
from chateval.results.items import Item, read_items
from chateval.results.report import chat_core_line, escape_markdown, markdown_table, percent, plain_table, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT, VERSION = "chateval-comparison", 1
EXCERPT_CHARACTERS = 200  # of an output: its end, where the answer stands
COLUMNS = ("task", "n", "A %", "B %", "B-A", "95 % of B-A", "p", "gained", "lost")
LEGEND = (
    "gained: items B does better than A, lost: items A does better. 95 %: paired bootstrap. "
    "p: McNemar, exact, per task and not corrected for several tasks; – with several draws."
)


@dataclass(frozen=True)
class Turned:
    """An item whose score differs, shown by its first draw that differs the same way."""

    item: str
    draw: int
    gold: str
    extracted_a: str | None
    extracted_b: str | None
    output_a: str  # excerpt
    output_b: str


@dataclass(frozen=True)
class TaskComparison:
    """One task, over the items finished in both runs. Scores 0..1; None where no item is in both."""

    items: int
    draws: int
    accuracy_a: float | None
    accuracy_b: float | None
    difference: float | None  # b - a
    interval: tuple[float, float] | None  # of the difference: paired bootstrap, 95 %
    p: float | None  # McNemar, exact; None with several draws
    turned_right: int  # items whose score is higher in b
    turned_wrong: int
    only_in_a: int  # items finished in a and not in b: not compared
    only_in_b: int
    examples_right: tuple[Turned, ...]
    examples_wrong: tuple[Turned, ...]


@dataclass(frozen=True)
class Side:
    """One of the two runs, as a whole."""

    folder: str
    checkpoint: str
    step: int | None
    weights_sha256: str
    chat_core: float | None
    chat_core_missing: tuple[str, ...]
    other_tasks: tuple[str, ...]  # tasks the other run does not have: not compared


@dataclass(frozen=True)
class Comparison:
    a: Side
    b: Side
    tasks: dict[str, TaskComparison]

    def to_json(self) -> dict[str, Any]:
        """Plain data, floats not rounded."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def compare(a: Path, b: Path, examples: int = 5) -> Comparison:
    """Compare two results folders on the items that both have finished.

    examples: at most so many items per task that turned right, and as many that turned wrong, are kept with outputs.
    Raises ResultsError for folders that cannot be read, or cannot be compared: other settings, scoring or draws, an
    item of the same name with another prompt or gold answer, no task or no item in common.
    """
    run_a, run_b = read_run(a), read_run(b)
    if changed := differences(run_a["settings"], run_b["settings"]):
        raise ResultsError(f"{a} and {b} cannot be compared: settings differ: {'; '.join(changed)}")
    shared = [name for name in run_a["tasks"] if name in run_b["tasks"]]
    if not shared:
        tasks = " and ".join(", ".join(run["tasks"]) or "nothing" for run in (run_a, run_b))
        raise ResultsError(f"{a} and {b} have no task in common: they scored {tasks}")
    for name in shared:
        how_a, how_b = ({key: run["tasks"][name][key] for key in ("scoring", "draws")} for run in (run_a, run_b))
        if changed := differences(how_a, how_b, name):
            raise ResultsError(f"{a} and {b} cannot be compared: {'; '.join(changed)}")
    items_a, items_b = read_items(a), read_items(b)
    finished_a, finished_b = finished_items(run_a, items_a)[0], finished_items(run_b, items_b)[0]
    tasks = {
        name: _compare_task(name, finished_a[name], finished_b[name], run_a["tasks"][name]["draws"], examples)
        for name in shared
    }
    if not any(task.items for task in tasks.values()):
        raise ResultsError(f"{a} and {b} have no finished item in common, in {', '.join(shared)}")
    only_a = tuple(name for name in run_a["tasks"] if name not in shared)
    only_b = tuple(name for name in run_b["tasks"] if name not in shared)
    results_a, results_b = compute_results(run_a, items_a), compute_results(run_b, items_b)
    return Comparison(_side(a, results_a, only_a), _side(b, results_b, only_b), tasks)


def _side(folder: Path, results: Results, other_tasks: tuple[str, ...]) -> Side:
    core = (results.chat_core, results.chat_core_missing)
    return Side(str(folder), results.checkpoint, results.step, results.weights_sha256, *core, other_tasks)


def _compare_task(
    task: str, a: Mapping[str, list[Item]], b: Mapping[str, list[Item]], draws: int, examples: int
) -> TaskComparison:
    shared = [item for item in a if item in b]
    for item in shared:
        for first, second in zip(a[item], b[item], strict=True):
            for name in ("prompt_sha256", "gold"):
                if getattr(first, name) != getattr(second, name):
                    raise ResultsError(f"{task} item {item!r}: its {name} differs between the two runs")
    # In the order of their prompts' hashes: the same examples every time, from all subjects and not the first alone.
    shared.sort(key=lambda item: a[item][0].prompt_sha256)
    num_right_a, num_right_b = (
        np.array([sum(answer.correct for answer in side[item]) for item in shared], np.int64) for side in (a, b)
    )
    right = [item for item, more in zip(shared, num_right_b > num_right_a, strict=True) if more]
    wrong = [item for item, less in zip(shared, num_right_b < num_right_a, strict=True) if less]
    mean_a = mean_b = difference = interval = None
    if shared:
        mean_a, mean_b = float(num_right_a.mean()) / draws, float(num_right_b.mean()) / draws
        difference = float((num_right_b - num_right_a).mean()) / draws
        interval = paired_bootstrap(num_right_a / draws, num_right_b / draws)
    return TaskComparison(
        items=len(shared),
        draws=draws,
        accuracy_a=mean_a,
        accuracy_b=mean_b,
        difference=difference,
        interval=interval,
        p=mcnemar_exact(len(wrong), len(right)) if shared and draws == 1 else None,
        turned_right=len(right),
        turned_wrong=len(wrong),
        only_in_a=len(a) - len(shared),
        only_in_b=len(b) - len(shared),
        examples_right=tuple(_turned(a[item], b[item], to=True) for item in right[:examples]),
        examples_wrong=tuple(_turned(a[item], b[item], to=False) for item in wrong[:examples]),
    )


def _turned(a: Sequence[Item], b: Sequence[Item], to: bool) -> Turned:
    """The first draw that turned the way its item did: with more of b's draws right, some draw is right in b alone."""
    pairs = zip(a, b, strict=True)
    first, second = next((x, y) for x, y in pairs if x.correct is not to and y.correct is to)
    extracted, outputs = (first.extracted, second.extracted), (_excerpt(first.output), _excerpt(second.output))
    return Turned(first.item, first.draw, first.gold, *extracted, *outputs)


def _excerpt(output: str) -> str:
    return output if len(output) <= EXCERPT_CHARACTERS else "…" + output[1 - EXCERPT_CHARACTERS :]


def show_comparison(comparison: Comparison) -> RenderableType:
    """A table of at most 80 columns for the terminal, then notes: what was not compared, ChatCORE, the legend."""
    from rich.console import Group
    from rich.text import Text

    head = [f"{letter}: {_label(side)}" for letter, side in _sides(comparison)]
    rows = [_row(name, task) for name, task in comparison.tasks.items()]
    notes = "\n".join(["", *_notes(comparison), LEGEND])
    return Group(
        Text(printable("\n".join(head), keep="\n") + "\n"),
        plain_table(COLUMNS, rows),
        Text(printable(notes, keep="\n")),
    )


def markdown_comparison(comparison: Comparison) -> str:
    """The table and notes as Markdown, then the examples of each task; every text of a model escaped."""
    head = "\n".join(f"- {letter}: {escape_markdown(_label(side))}" for letter, side in _sides(comparison))
    notes = "\n".join(f"- {escape_markdown(line)}" for line in _notes(comparison))
    rows = ((escape_markdown(name), *_row(name, task)[1:]) for name, task in comparison.tasks.items())
    parts = ["# Comparison", head, markdown_table(COLUMNS, rows), notes, LEGEND]
    for name, task in comparison.tasks.items():
        turned = (("right", task.turned_right, task.examples_right), ("wrong", task.turned_wrong, task.examples_wrong))
        for word, count, examples in turned:
            if examples:
                parts.append(f"## {escape_markdown(name)}: turned {word} in B ({len(examples)} of {count})")
                parts.append(_example_table(examples))
    return "\n\n".join(parts) + "\n"


def _example_table(examples: Sequence[Turned]) -> str:
    columns = ("item", "gold", "A's answer", "B's answer", "A's output", "B's output")
    cells = (
        (e.item, e.gold, e.extracted_a or "none", e.extracted_b or "none", e.output_a, e.output_b) for e in examples
    )
    return markdown_table(columns, ([escape_markdown(cell) for cell in row] for row in cells), ruler="---")


def _sides(comparison: Comparison) -> tuple[tuple[str, Side], tuple[str, Side]]:
    return ("A", comparison.a), ("B", comparison.b)


def _label(side: Side) -> str:
    step = "" if side.step is None else f", step {side.step}"
    return f"{side.checkpoint}{step}, weights {side.weights_sha256[:12]} ({side.folder})"


def _row(name: str, task: TaskComparison) -> tuple[str, ...]:
    interval = "–" if task.interval is None else " to ".join(f"{100 * end:+.1f}" for end in task.interval)
    difference = "–" if task.difference is None else f"{100 * task.difference:+.1f}"
    p = "–" if task.p is None else "<0.001" if task.p < 0.001 else f"{task.p:.3f}"
    scores = (percent(task.accuracy_a), percent(task.accuracy_b), difference, interval, p)
    return name, str(task.items), *scores, str(task.turned_right), str(task.turned_wrong)


def _notes(comparison: Comparison) -> Iterator[str]:
    for name, task in comparison.tasks.items():
        for letter, count in (("A", task.only_in_a), ("B", task.only_in_b)):
            if count:
                yield f"{name}: {count} items only in {letter}, not compared"
    for letter, side in _sides(comparison):
        if side.other_tasks:
            yield f"tasks only in {letter}, not compared: {', '.join(side.other_tasks)}"
    for letter, side in _sides(comparison):
        yield f"{letter}: {chat_core_line(side.chat_core, side.chat_core_missing)}"
