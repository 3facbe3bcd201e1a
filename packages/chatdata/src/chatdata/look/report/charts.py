"""The numbers of a report as Altair charts, in Vega-Lite's JSON.

Every number is also in a table of the page. Colours are the page's CSS variables, so a chart follows dark mode without
being drawn again. Names of tasks and tokens are data here, never part of an expression.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from chatdata.look.report.collect import ROLES
from chatdata.look.report.documents import spelled
from chatdata.tokenizer.bpe import Tokenizer

INK, FAINT, RULE, BAR = "var(--ink)", "var(--faint)", "var(--rule)", "var(--c0)"
MEASURES = {"documents": "documents", "tokens": "tokens", "supervised": "supervised tokens"}
KINDS = ("supervised", "not supervised")
SHARE_TOOLTIP = (alt.Tooltip("count:Q", format=","), alt.Tooltip("share:Q", format=".1%"))
LABEL_PX = 120  # of a task's name; leaves half of a phone's width for the bars


def chart_specs(numbers: dict[str, Any], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Vega-Lite JSON by the id of the element that holds the chart. numbers: see `report_numbers`."""
    charts: dict[str, alt.Chart] = {}
    for i, (name, split) in enumerate(numbers["splits"].items()):
        charts[f"mixture-{i}"] = mixture(name, split)
        charts[f"roles-{i}"] = roles(name, split["tasks"])
        for j, task in enumerate(split["tasks"]):
            charts[f"lengths-{i}-{j}"] = lengths(name, task)
    charts["frequency"] = frequency(numbers["vocabulary"], tokenizer)
    return {name: styled(chart).to_dict() for name, chart in charts.items()}


def styled(chart: alt.Chart) -> alt.Chart:
    """As wide as its element, in the page's colours and font, without a background."""
    colours = {"labelColor": INK, "titleColor": FAINT, "gridColor": RULE, "domainColor": RULE, "tickColor": RULE}
    return (
        chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
        .configure(background="transparent", font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", **colours)
    )


def mixture(split: str, numbers: dict[str, Any]) -> alt.Chart:
    """A task's share of the split's documents, tokens and supervised tokens: three bars."""
    rows = [
        {"task": task["name"], "of": name, "count": task[key], "share": task[key] / max(numbers[key], 1)}
        for task in numbers["tasks"]
        for key, name in MEASURES.items()
    ]
    chart = _chart(
        rows, 38 * len(numbers["tasks"]), f"{split}: share of documents, tokens and supervised tokens per task"
    )
    return chart.mark_bar().encode(
        x=_shares(),
        y=_tasks(),
        yOffset=alt.YOffset("of:N", sort=None),
        color=_colours("of", list(MEASURES.values())),
        tooltip=["task:N", "of:N", *SHARE_TOOLTIP],
    )


def roles(split: str, tasks: list[dict[str, Any]]) -> alt.Chart:
    """A task's tokens by role, as shares; unsupervised ones are pale."""
    rows = [
        {"task": task["name"], "role": role, "kind": kind, "count": count, "share": count / task["tokens"]}
        for task in tasks
        for role, found in task["roles"].items()
        for kind, count in zip(KINDS, (found["supervised"], found["tokens"] - found["supervised"]), strict=True)
        if count
    ]
    chart = _chart(rows, 26 * len(tasks), f"{split}: tokens per task by role, supervised or not")
    return chart.mark_bar().encode(
        x=_shares(scale=alt.Scale(domain=[0, 1])),
        y=_tasks(),
        color=_colours("role", ROLES),
        opacity=alt.Opacity("kind:O", scale=alt.Scale(domain=KINDS, range=[1, 0.35]), legend=None),
        tooltip=["task:N", "role:N", "kind:N", *SHARE_TOOLTIP],
    )


def lengths(split: str, task: dict[str, Any]) -> alt.Chart:
    """Documents of a task by length in tokens; a last bar that holds all longer ones has another colour."""
    width = task["histogram"]["width"]
    rows = [
        {**part, "end": part["from"] + width, "longer": part["to"] >= part["from"] + width}
        for part in task["histogram"]["bins"]
    ]
    chart = _chart(rows, 110, f"{split}, {task['name']}: documents by length in tokens")
    return chart.mark_bar(binSpacing=1).encode(
        x=alt.X("from:Q", title=None, bin="binned", axis=_integers(rows[0]["from"], rows[-1]["end"], grid=False)),
        x2="end:Q",
        y=alt.Y("documents:Q", title=None, axis=_integers(0, max(row["documents"] for row in rows))),
        color=alt.condition("datum.longer", alt.value("var(--c1)"), alt.value(BAR)),
        tooltip=[_count("from", "tokens from"), _count("to", "to"), _count("documents", "documents")],
    )


def frequency(vocabulary: dict[str, Any], tokenizer: Tokenizer) -> alt.Chart:
    """How often the token of each rank occurs, both on a log scale."""
    rows = [{**point, "token": spelled(tokenizer, point["id"])} for point in vocabulary["curve"]]
    log = alt.Scale(type="log", nice=False)
    axis = alt.Axis(format="~s", values=[10**power for power in range(19)])  # without these, also a line at 2, 3, … 9
    chart = _chart(rows, 300, f"{vocabulary['split']}: occurrences of the vocabulary's tokens by rank")
    return chart.mark_line(color=BAR, point=alt.OverlayMarkDef(color=BAR, size=22)).encode(
        x=alt.X("rank:Q", title="rank", scale=log, axis=axis),
        y=alt.Y("count:Q", title="occurrences", scale=log, axis=axis),
        tooltip=["token:N", "id:Q", _count("rank", "rank"), _count("count", "occurrences")],
    )


def _chart(rows: list[dict[str, Any]], height: int, description: str) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows), height=height, description=description)


def _integers(first: int, last: int, **options: Any) -> alt.Axis:
    """An axis of few ticks, all of them integers."""
    if last - first <= 4:
        return alt.Axis(values=list(range(first, last + 1)), format="d", **options)
    return alt.Axis(tickCount=4, format=",d", **options)


def _shares(**options: Any) -> alt.X:
    return alt.X("share:Q", title=None, axis=alt.Axis(format="%", tickCount=5), **options)


def _count(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=",")


def _tasks() -> alt.Y:
    return alt.Y("task:N", sort=None, title=None, axis=alt.Axis(labelLimit=LABEL_PX, ticks=False, domain=False))


def _colours(field: str, domain: Sequence[str]) -> alt.Color:
    """The page's colours --c0 … in this order. The page has its own key, because Vega's does not fold on a phone."""
    colours = [f"var(--c{i})" for i in range(len(domain))]
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=domain, range=colours), legend=None)
