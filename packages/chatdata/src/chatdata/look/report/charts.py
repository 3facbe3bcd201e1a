"""The numbers of a report as charts: the Vega-Lite of charts.json with rows filled in, which Altair checks.

Every number is also in a table of the page. Colours are the page's CSS variables, so a chart follows dark mode without
being drawn again. Names of tasks and tokens are data here, never part of an expression. The log scales of charts.json
have values, because without them there is also a line at 2, 3, … 9; its labelLimit leaves half of a phone's width for
the bars.
"""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import altair as alt
import vl_convert

from chatdata.look.report.collect import ROLES
from chatdata.look.report.documents import spelled
from chatdata.tokenizer.bpe import Tokenizer

MEASURES = {"documents": "documents", "tokens": "tokens", "supervised": "supervised tokens"}
VEGALITE_VERSION = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
KINDS = ("supervised", "not supervised")


def chart_specs(numbers: dict[str, Any], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Vega-Lite JSON by the id of the element that holds the chart. numbers: see `report_numbers`."""
    charts = {"frequency": frequency(numbers["vocabulary"], tokenizer)}
    for i, (name, split) in enumerate(numbers["splits"].items()):
        charts[f"mixture-{i}"] = mixture(name, split)
        charts[f"roles-{i}"] = roles(name, split["tasks"])
        for j, task in enumerate(split["tasks"]):
            charts[f"lengths-{i}-{j}"] = lengths(name, task)
    return {name: alt.Chart.from_dict(chart).to_dict() for name, chart in charts.items()}


def picture(chart: dict[str, Any]) -> str:
    """A chart as SVG, which the page shows until it has drawn the chart, and without JavaScript."""
    return vl_convert.vegalite_to_svg(chart | {"width": 440}, vl_version=VEGALITE_VERSION)


def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as vl-convert ships them (0.9 MB), in the version that Altair writes for."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGALITE_VERSION)


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
    rows = [{**point, "token": spelled(tokenizer, point["id"])} for point in vocabulary["curve"]]
    return _chart("frequency", rows, 220, f"{vocabulary['split']}: occurrences of the vocabulary's tokens by rank")


def _chart(kind: str, rows: list[Any], height: int, description: str, coloured: Sequence[str] = ()) -> dict[str, Any]:
    """coloured: values that have the page's colours --c0 … in this order. The page has its own key, because Vega's does
    not fold on a phone."""
    specs = json.loads(resources.files("chatdata.look.report").joinpath("charts.json").read_text(encoding="utf-8"))
    if coloured:
        colours = [f"var(--c{i})" for i in range(len(coloured))]
        specs[kind]["encoding"]["color"]["scale"] = {"domain": list(coloured), "range": colours}
    filled = {"data": {"values": rows}, "height": height, "description": description}
    return specs["every"] | specs[kind] | filled
