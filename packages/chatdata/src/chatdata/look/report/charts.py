"""The numbers of a report as charts. Every number is also in a table of the page.

The log scales of charts.json have values, because without them there is also a line at 2, 3, … 9; its labelLimit leaves
half of a phone's width for the bars.
"""

from functools import partial
from typing import Any

from chatdata.look.report import html
from chatdata.look.report.collect import ROLES
from chatdata.tokenizer.bpe import Tokenizer

MEASURES = {"documents": "documents", "tokens": "tokens", "supervised": "supervised tokens"}
KINDS = ("supervised", "not supervised")
_chart = partial(html.chart, html.HERE)


def chart_specs(numbers: dict[str, Any], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Vega-Lite JSON by the id of the element that holds the chart. numbers: see `report_numbers`."""
    charts = {"frequency": frequency(numbers["vocabulary"], tokenizer)}
    for i, (name, split) in enumerate(numbers["splits"].items()):
        charts[f"mixture-{i}"] = mixture(name, split)
        charts[f"roles-{i}"] = roles(name, split["tasks"])
        for j, task in enumerate(split["tasks"]):
            charts[f"lengths-{i}-{j}"] = lengths(name, task)
    return charts


def mixture(split: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """A task's share of the split's documents, tokens and supervised tokens: three bars."""
    tasks = numbers["tasks"]
    rows = [
        {"task": task["name"], "of": name, "count": task[key], "share": task[key] / max(numbers[key], 1)}
        for task in tasks
        for key, name in MEASURES.items()
    ]
    description = f"{split}: share of documents, tokens and supervised tokens per task"
    return _chart("mixture", rows, 38 * len(tasks), description, list(MEASURES.values()))


def roles(split: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """A task's tokens by role, as shares; unsupervised ones are pale."""
    rows = [
        {"task": task["name"], "role": role, "kind": kind, "count": count, "share": count / task["tokens"]}
        for task in tasks
        for role, found in task["roles"].items()
        for kind, count in zip(KINDS, (found["supervised"], found["tokens"] - found["supervised"]), strict=True)
        if count
    ]
    return _chart("roles", rows, 26 * len(tasks), f"{split}: tokens per task by role, supervised or not", ROLES)


def lengths(split: str, task: dict[str, Any]) -> dict[str, Any]:
    """Documents of a task by length in tokens; a last bar that holds all longer ones has another colour."""
    width = task["histogram"]["width"]
    rows = [
        {**part, "end": part["from"] + width, "longer": part["to"] >= part["from"] + width}
        for part in task["histogram"]["bins"]
    ]
    chart = _chart("lengths", rows, 110, f"{split}, {task['name']}: documents by length in tokens")
    most = max(row["documents"] for row in rows)
    for axis, first, last in (("x", rows[0]["from"], rows[-1]["end"]), ("y", 0, most)):
        if last - first <= 4:  # no ticks between integers
            chart["encoding"][axis]["axis"]["values"] = list(range(first, last + 1))
    return chart


def frequency(vocabulary: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """How often the token of each rank occurs, both on a log scale."""
    rows = [{**point, "token": html.spelled(tokenizer, point["id"])} for point in vocabulary["curve"]]
    return _chart("frequency", rows, 220, f"{vocabulary['split']}: occurrences of the vocabulary's tokens by rank")
