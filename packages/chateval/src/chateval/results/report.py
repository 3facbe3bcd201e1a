"""Figures for people: a table for the terminal, report.md and scores.png. Rounding happens here and only here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatdata.disk import naming
from chateval.results.figures import (
    RESULTS_NAME,
    Results,
    Score,
    TaskResult,
    compute_results,
    json_bytes,
    read_run,
    write_json,
)
from chateval.results.items import read_items

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

REPORT_NAME, PICTURE_NAME = "report.md", "scores.png"
NO_PICTURE = "No picture: matplotlib is not installed (`pip install 'chateval[plot]'`)."
FIREWALL_TITLE = "## Items that training documents hold (flagged), and others (clean)"
# Okabe and Ito's colours, told apart by colour-blind readers; chance has a line of its own form as well
BAR_COLOUR, CHANCE_COLOUR = "#56B4E9", "#D55E00"
INCOMPLETE = {"facecolor": "#EEEEEE", "edgecolor": "#AAAAAA", "hatch": "///"}  # pale: whiskers must stand out


def write_report(out: Path) -> Results:
    """Compute the figures of a results folder again; write scores.png, report.md and results.json beside the items.

    Nothing is written where all of that is there, of the same figures: the folder may be one that cannot be written to.
    Without matplotlib there is no picture, and report.md says so. Raises ResultsError.
    """
    run, items = read_run(out), read_items(out)
    results = compute_results(run, items)
    if _is_reported(out, results):
        return results
    with naming(out):
        picture = draw_scores(results, out / PICTURE_NAME)
        (out / REPORT_NAME).write_text(markdown_report(run, results, picture is not None), encoding="utf-8")
        write_json(out / RESULTS_NAME, results.to_json())  # last: where it is, the others are of the same figures
    return results


def _is_reported(out: Path, results: Results) -> bool:
    """Whether write_report has nothing to do. A picture may still be to be drawn, where matplotlib came later."""
    names = [RESULTS_NAME, REPORT_NAME, *([PICTURE_NAME] if find_spec("matplotlib") else [])]
    if not all((out / name).is_file() for name in names):
        return False
    return (out / RESULTS_NAME).read_bytes() == json_bytes(results.to_json())


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def score_interval(score: Score) -> str:
    return f"{percent(score.interval[0])}–{percent(score.interval[1])}" if score.items else "–"


def chat_core_line(chat_core: float | None, missing: Sequence[str]) -> str:
    return f"ChatCORE {chat_core:.4f}" if chat_core is not None else f"No ChatCORE: without {', '.join(missing)}"


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table that stays within 80 columns: first column left and folded if it must be, the others never cut."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for number, column in enumerate(columns):
        first = number == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def show_results(results: Results) -> RenderableType:
    """Scores per task for the terminal, then what a reader must know: incomplete tasks and ChatCORE."""
    from rich.console import Group
    from rich.text import Text

    columns = ("task", "items", "right %", "95 %", "chance", "flexible", "bits/byte")
    rows = [
        (
            name,
            _items(task),
            percent(task.score.accuracy),
            score_interval(task.score),
            percent(task.chance) if task.chance else "–",
            percent(task.flexible.accuracy) if task.flexible else "–",
            "–" if task.bits_per_byte is None else f"{task.bits_per_byte:.3f}",
        )
        for name, task in results.tasks.items()
    ]
    apart = [
        (
            name,
            *(cell for score in sides for cell in (str(score.items), percent(score.accuracy), score_interval(score))),
        )
        for name, sides in _firewall_rows(results).items()
    ]
    lines = [
        *_incomplete_lines(results),
        *_unchecked_line(results),
        chat_core_line(results.chat_core, results.chat_core_missing),
    ]
    tables = [plain_table(columns, rows)]
    if apart:
        tables.append(plain_table(("firewall", "clean", "right %", "95 %", "flagged", "right %", "95 %"), apart))
    return Group(*tables, Text(printable("\n".join(lines), keep="\n")))


def _firewall_rows(results: Results) -> dict[str, tuple[Score, Score]]:
    """(clean, flagged) of the tasks that a firewall file checked."""
    return {n: (task.clean, task.flagged) for n, task in results.tasks.items() if task.clean and task.flagged}


def _unchecked_line(results: Results) -> list[str]:
    """Which tasks the firewall file says nothing about, if there is one."""
    checked = _firewall_rows(results)
    missing = [name for name in results.tasks if name not in checked]
    return [f"firewall: not checked: {', '.join(missing)}"] if checked and missing else []


def _items(task: TaskResult) -> str:
    return str(task.score.items) if task.complete else f"{task.score.items}/{task.expected}"


def _incomplete_lines(results: Results) -> list[str]:
    lines = []
    for name, task in results.tasks.items():
        if not task.complete:
            begun = f", {task.unfinished} more with only some of their {task.draws} draws" if task.unfinished else ""
            lines.append(f"{name} is incomplete: {task.score.items} of {task.expected} items{begun}")
    return lines


def printable(text: str, keep: str = "") -> str:
    """Replace what a terminal or a page would act on (escape codes, newlines, bidi marks, lone surrogates) by ␣."""
    return "".join(c if c.isprintable() or c in keep else "␣" for c in text)


def escape_markdown(text: str) -> str:
    """Make any text one line of inert Markdown: no table cell ends, no markup, HTML, link or mention begins.

    Every character with a meaning in CommonMark 0.31 or GitHub's additions gets a backslash, but an underscore inside
    a word has none there (arc_easy stays as it is); a newline is shown as ⏎.
    """
    one_line = printable(re.sub(r"\r\n|\r|\n", "⏎", text))
    escaped = re.sub(r"([\\`*\[\]<>|~&$#@!{}]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", one_line)
    return escaped.replace("://", r"\://").replace("www.", r"www\.")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], ruler: str = "---:") -> str:
    """A Markdown table, first column left, the others by `ruler`. Cells are taken as they are: escape them first."""
    ruler_row = ["---", *[ruler] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ruler_row, *rows))


def markdown_report(run: Mapping[str, Any], results: Results, picture: bool = False) -> str:
    """report.md: scores, what lies behind them, subjects, settings. `picture`: scores.png stands beside it."""
    step = "" if results.step is None else f", step {results.step}"
    parts = [
        f"# Scores of {escape_markdown(results.checkpoint)}{step}",
        f"Weights {escape_markdown(results.weights_sha256[:12])}. "
        + escape_markdown(chat_core_line(results.chat_core, results.chat_core_missing)),
    ]
    parts += [f"**{escape_markdown(line)}**" for line in _incomplete_lines(results)]
    parts += [f"![scores]({PICTURE_NAME})" if picture else NO_PICTURE, _score_table(results)]
    if apart := _firewall_rows(results):
        parts += [FIREWALL_TITLE, *map(escape_markdown, _unchecked_line(results)), _firewall_table(apart)]
    parts += [_detail_list(name, task) for name, task in results.tasks.items()]
    for name, task in results.tasks.items():
        if task.subjects:
            parts += [f"## Subjects of {escape_markdown(name)}", _subject_table(task.subjects)]
    settings = [f"- {escape_markdown(key)}: {escape_markdown(repr(value))}" for key, value in run["settings"].items()]
    parts += ["## Settings", "\n".join(settings) or "none"]
    parts.append(
        "Intervals are Wilson's at 95 %, over items: how far the share of right answers may be off because these items "
        "and no others were asked. To compare two checkpoints on the same items use `chateval compare`, which pairs "
        "them: two intervals that overlap prove nothing."
    )
    return "\n\n".join(parts) + "\n"


def _score_table(results: Results) -> str:
    columns = ("task", "items", "right", "accuracy %", "95 % interval", "chance %", "bits per byte")
    rows = (
        (
            escape_markdown(name),
            _items(task) + (f" × {task.draws} draws" if task.draws > 1 else ""),
            f"{task.score.correct:,.10g}",
            percent(task.score.accuracy),
            score_interval(task.score),
            percent(task.chance),
            "–" if task.bits_per_byte is None else f"{task.bits_per_byte:.4f}",
        )
        for name, task in results.tasks.items()
    )
    return markdown_table(columns, rows)


def _firewall_table(apart: Mapping[str, tuple[Score, Score]]) -> str:
    columns = ("task", "items", "count", "accuracy %", "95 % interval")
    rows = (
        (escape_markdown(name), kind, str(score.items), percent(score.accuracy), score_interval(score))
        for name, sides in apart.items()
        for kind, score in zip(("clean", "flagged"), sides, strict=True)
    )
    return markdown_table(columns, rows)


def _detail_list(name: str, task: TaskResult) -> str:
    endings = sorted(task.endings.items(), key=lambda pair: (-pair[1], pair[0]))
    lines = ["endings: " + (", ".join(f"{escape_markdown(ending)} {count}" for ending, count in endings) or "–")]
    if task.flexible is not None:
        right = f"{percent(task.flexible.accuracy)} % ({score_interval(task.flexible)})"
        lines.append(f"right when read flexibly: {right}")
        lines.append(f"tool calls: {task.tool_calls}, failed: {task.tool_failures}")
    if task.ties is not None:
        lines.append(f"ties between letters: {task.ties}")
    if task.mean_margin is not None and task.mean_letter_mass is not None:
        lines.append(f"best letter over the second, mean of logits: {task.mean_margin:.3f}")
        lines.append(f"probability on letters, mean: {task.mean_letter_mass:.3f}")
    if task.mean_generated_tokens is not None:
        lines.append(f"generated tokens, mean: {task.mean_generated_tokens:.1f}")
    return f"## {escape_markdown(name)}\n\n" + "\n".join(f"- {line}" for line in lines)


def _subject_table(subjects: Mapping[str, Score]) -> str:
    best_first = sorted(subjects.items(), key=lambda pair: (-(pair[1].accuracy or 0.0), pair[0]))
    rows = (
        (escape_markdown(name), str(score.items), percent(score.accuracy), score_interval(score))
        for name, score in best_first
    )
    return markdown_table(("subject", "items", "accuracy %", "95 % interval"), rows)


def draw_scores(results: Results, path: Path) -> Path | None:
    """Draw a bar per task with its Wilson interval and chance; return `path`, None without matplotlib.

    Bars of incomplete tasks are hatched and say how many items they stand on.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    tasks = {name: task for name, task in results.tasks.items() if task.score.accuracy is not None}
    figure = Figure(figsize=(8, 1.1 + 0.5 * max(1, len(tasks))), layout="constrained")
    axes = figure.subplots()
    for place, task in enumerate(tasks.values()):
        accuracy, (low, high) = task.score.accuracy, task.score.interval
        assert accuracy is not None
        fill = {"color": BAR_COLOUR} if task.complete else INCOMPLETE
        axes.barh(place, 100 * accuracy, height=0.6, **fill)
        whiskers = [[100 * (accuracy - low)], [100 * (high - accuracy)]]
        axes.errorbar(100 * accuracy, place, xerr=whiskers, color="black", capsize=4, linewidth=1.2)
        if task.chance:
            axes.plot(
                [100 * task.chance] * 2, [place - 0.4, place + 0.4], color=CHANCE_COLOUR, linestyle="--", linewidth=2
            )
        axes.text(102, place, f"{percent(accuracy)}  ({score_interval(task.score)})", va="center", fontsize=9)
    labels = [
        printable(name) + ("" if task.complete else f"\n{task.score.items} of {task.expected}")
        for name, task in tasks.items()
    ]
    axes.set_yticks(range(len(tasks)), labels, parse_math=False)
    axes.set(xlim=(0, 100), ylim=(len(tasks) - 0.4, -0.6), xlabel="right answers, % (95 % interval; dashed: chance)")
    axes.set_title(printable(results.checkpoint)[-90:], loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    return path
