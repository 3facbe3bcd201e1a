"""Results and comparisons for people: terminal tables, report.md, scores.png, `compare --markdown`."""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Group, RenderableType

from chatdata.disk import naming
from chatdata.errors import printable
from chateval.results.compare import Comparison, Paired, Side
from chateval.results.figures import RESULTS_NAME, Results, Score, TaskResult, compute_results
from chateval.results.items import read_items
from chateval.results.run_file import Run, json_bytes, read_run, write_json
from chateval.results.tables import escape_markdown, markdown_list, markdown_table, terminal_lines, terminal_table

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # column names, rows

REPORT_NAME, PICTURE_NAME = "report.md", "scores.png"
STEP_COLUMNS = ("items", "accuracy", "interval", "chance", "bits_per_byte")
NO_PICTURE = "No picture: matplotlib is not installed (`uv sync --extra plot` installs it)."
INTERVALS = (
    "Intervals are 95 % Wilson intervals over items: how far the share of right answers may be off because these items "
    "were asked and not others. Compare two checkpoints on the same items with `chateval compare`, which pairs them; "
    "overlapping intervals do not show that there is no difference."
)
LEGEND = (
    "gained: items that B does better than A; lost: items that A does better. 95 %: paired bootstrap. "
    "p: exact McNemar test per task, not corrected for several tasks; – with several draws."
)
FLAGGED = "Items found in training documents (flagged), and others (clean)"
PASSED = "At least one of k draws is right (pass@k)"
# Okabe and Ito's colours, distinct for colour-blind readers; chance also has its own line style
BAR_COLOUR, CHANCE_COLOUR = "#56B4E9", "#D55E00"
INCOMPLETE = {"facecolor": "#EEEEEE", "edgecolor": "#AAAAAA", "hatch": "///"}  # pale, to keep the whiskers visible


def write_report(out: Path) -> Results:
    """Compute the figures of a results folder and write scores.png, report.md and results.json next to the items.

    Writes nothing if the files exist with the same figures, because the folder may be read-only.
    Without matplotlib there is no picture, and report.md says so. Raises ResultsError.
    """
    run = read_run(out)
    results = compute_results(run, read_items(out))
    if not _is_reported(out, results):
        with naming(out):
            picture = draw_scores(results, out / PICTURE_NAME)
            (out / REPORT_NAME).write_text(markdown_report(run, results, picture is not None), encoding="utf-8")
            write_json(out / RESULTS_NAME, results.to_json())  # last: it vouches for the other two
    return results


def _is_reported(out: Path, results: Results) -> bool:
    """Whether write_report has nothing to do. The picture may be missing because matplotlib came later."""
    names = [RESULTS_NAME, REPORT_NAME, *([PICTURE_NAME] if find_spec("matplotlib") else [])]
    there = all((out / name).is_file() for name in names)
    return there and (out / RESULTS_NAME).read_bytes() == json_bytes(results.to_json())


def show_results(results: Results) -> RenderableType:
    """For the terminal: scores per task, then incomplete tasks and ChatCORE."""
    tables = [_score_table(results), *_part_tables(results).values()]
    return Group(*(terminal_table(*table) for table in tables), terminal_lines(_notes(results)))


def markdown_report(run: Run, results: Results, picture: bool = False) -> str:
    """report.md: scores, details per task, subjects, settings. `picture`: scores.png is next to it."""
    step = "" if results.step is None else f", step {results.step}"
    parts = [
        f"# Scores of {escape_markdown(results.checkpoint)}{step}",
        f"Weights {escape_markdown(results.weights_sha256[:12])}",
        *(f"**{escape_markdown(line)}**" for line in _notes(results)),
        f"![scores]({PICTURE_NAME})" if picture else NO_PICTURE,
        markdown_table(*_score_table(results)),
    ]
    for title, table in _part_tables(results).items():
        parts += [f"## {title}", markdown_table(*table)]
    for name, task in results.tasks.items():
        parts += [f"## {escape_markdown(name)}", markdown_list(_details(task))]
        if task.subjects:
            parts.append(markdown_table(*_subject_table(task)))
    settings = markdown_list(f"{key}: {value!r}" for key, value in run.settings.items())
    parts += ["## Settings", settings or "none", INTERVALS]
    return "\n\n".join(parts) + "\n"


def results_line(results: Results) -> str:
    """step 100: gsm8k 12.5 (8.1–18.8), mmlu 25.1 (24.4–25.8)"""
    scores = ("{} {} ({})".format(name, *_score_cells(task.score)) for name, task in results.tasks.items())
    return f"step {results.step}: {', '.join(scores)}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _score_table(results: Results) -> Table:
    columns = ("task", "items", "right %", "95 %", "chance", "flexible", "bits/byte")
    rows = []
    for name, task in results.tasks.items():
        items = str(task.score.items) if task.complete else f"{task.score.items}/{task.expected}"
        flexible = percent(task.flexible.accuracy if task.flexible else None)
        bits = "–" if task.bits_per_byte is None else f"{task.bits_per_byte:.3f}"
        rows.append((name, items, *_score_cells(task.score), percent(task.chance or None), flexible, bits))
    return columns, rows


def _part_tables(results: Results) -> dict[str, Table]:
    """Title → several scores of each task, where there are any."""
    checked = {name: {"clean": task.clean, "flagged": task.flagged} for name, task in _checked(results).items()}
    drawn = {name: {f"pass@{k}": score for k, score in task.pass_at.items()} for name, task in results.tasks.items()}
    tables = {}
    for title, heading, tasks in ((FLAGGED, "firewall", checked), (PASSED, "draws", drawn)):
        scores = [(name, kind, score) for name, parts in tasks.items() for kind, score in parts.items()]
        rows = [(name, kind, str(score.items), *_score_cells(score)) for name, kind, score in scores]
        tables |= {title: ((heading, "", "items", "right %", "95 %"), rows)} if rows else {}
    return tables


def _subject_table(task: TaskResult) -> Table:
    best_first = sorted(task.subjects.items(), key=lambda pair: (-(pair[1].accuracy or 0.0), pair[0]))
    rows = [(name, str(score.items), *_score_cells(score)) for name, score in best_first]
    return ("subject", "items", "right %", "95 %"), rows


def _score_cells(score: Score) -> tuple[str, str]:
    """Accuracy and interval in percent."""
    low, high = map(percent, score.interval)
    return percent(score.accuracy), f"{low}–{high}" if score.items else "–"


def _checked(results: Results) -> dict[str, TaskResult]:
    """The tasks that a firewall file checked."""
    return {name: task for name, task in results.tasks.items() if task.clean is not None}


def _notes(results: Results) -> Iterator[str]:
    """What a reader must know: incomplete tasks, tasks without a firewall check, ChatCORE."""
    for name, task in results.tasks.items():
        if not task.complete:
            partly = f", {task.unfinished} more with only some of their {task.draws} draws" if task.unfinished else ""
            yield f"{name} is incomplete: {task.score.items} of {task.expected} items{partly}"
    unchecked = [name for name in results.tasks if name not in _checked(results)]
    if _checked(results) and unchecked:
        yield f"firewall: not checked: {', '.join(unchecked)}"
    yield _chat_core(results)


def _chat_core(side: Results | Side) -> str:
    if side.chat_core is None:
        return f"No ChatCORE: without {', '.join(side.chat_core_missing)}"
    return f"ChatCORE {side.chat_core:.4f}"


def _details(task: TaskResult) -> Iterator[str]:
    draws = f" (means of {task.draws} draws)" if task.draws > 1 else ""
    yield f"right: {task.score.correct:,.10g} of {task.score.items:,}{draws}"
    endings = sorted(task.endings.items(), key=lambda pair: (-pair[1], pair[0]))
    yield "endings: " + (", ".join(f"{ending} {count}" for ending, count in endings) or "–")
    if task.flexible is not None:
        yield "right when graded flexibly: {} % ({})".format(*_score_cells(task.flexible))
    figures = {
        "tool calls": task.tool_calls,
        "failed tool calls": task.tool_failures,
        "ties between letters": task.ties,
        "mean margin of the best letter's logit": task.mean_margin,
        "mean probability of all letters": task.mean_letter_mass,
        "mean number of generated tokens": task.mean_generated_tokens,
    }
    for name, value in figures.items():
        if value is not None:
            yield f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value:,}"


def draw_scores(results: Results, path: Path) -> Path | None:
    """Draw a bar per task with its Wilson interval and chance; return `path`, None without matplotlib.

    Bars of incomplete tasks are hatched, with their number of items.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    tasks = {name: task for name, task in results.tasks.items() if task.score.accuracy is not None}
    figure = Figure(figsize=(8, 1.1 + 0.5 * max(1, len(tasks))), layout="constrained")
    axes = figure.subplots()
    labels = []
    for place, (name, task) in enumerate(tasks.items()):
        accuracy, low, high = (100 * share for share in (task.score.accuracy, *task.score.interval))
        axes.barh(place, accuracy, height=0.6, **({"color": BAR_COLOUR} if task.complete else INCOMPLETE))
        whiskers = [[accuracy - low], [high - accuracy]]
        axes.errorbar(accuracy, place, xerr=whiskers, color="black", capsize=4, linewidth=1.2)
        if task.chance:
            axes.vlines(100 * task.chance, place - 0.4, place + 0.4, CHANCE_COLOUR, "dashed", linewidth=2)
        axes.text(102, place, "{}  ({})".format(*_score_cells(task.score)), va="center", fontsize=9)
        labels.append(printable(name) + ("" if task.complete else f"\n{task.score.items} of {task.expected}"))
    axes.set_yticks(range(len(tasks)), labels, parse_math=False)
    axes.set(xlim=(0, 100), ylim=(len(tasks) - 0.4, -0.6), xlabel="right answers, % (95 % interval; dashed: chance)")
    axes.set_title(printable(results.checkpoint)[-90:], loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    return path


def write_steps(out: Path) -> None:
    """Write scores.json and scores.png, accuracy against step, of a folder with a results folder for each step.

    The picture has a line for each task, with its interval and chance; without matplotlib there is none.
    """
    found = [json.loads(path.read_bytes()) for path in sorted(out.glob(f"step-*/{RESULTS_NAME}"))]
    tasks = [(each["step"], name, task) for each in found for name, task in each["tasks"].items()]
    rows = [{"step": step, "task": name} | {key: task[key] for key in STEP_COLUMNS} for step, name, task in tasks]
    write_json(out / "scores.json", rows)
    if not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for name in dict.fromkeys(row["task"] for row in rows):
        mine = [(row["step"], row["accuracy"], row["chance"], *row["interval"]) for row in rows if row["task"] == name]
        steps, right, chance, low, high = zip(*mine, strict=True)
        (line,) = axes.plot(steps, right, "o-", markersize=4, label=printable(name).replace("$", r"\$"))
        axes.plot(steps, chance, "--", color=line.get_color(), linewidth=1)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel="share right (band: 95 % interval, dashed: chance)", ylim=(0, 1))
    axes.figure.legend(loc="outside right upper", fontsize="small")
    axes.figure.savefig(out / PICTURE_NAME, dpi=110)


def show_comparison(comparison: Comparison) -> RenderableType:
    """A table of at most 80 columns for the terminal, then what was not compared, ChatCORE and the legend."""
    notes = ["", *_comparison_notes(comparison), LEGEND]
    table = terminal_table(*_comparison_table(comparison))
    return Group(terminal_lines([*_labels(comparison), ""]), table, terminal_lines(notes))


def markdown_comparison(comparison: Comparison) -> str:
    """The same as Markdown, then examples of each task."""
    parts = ["# Comparison", markdown_list(_labels(comparison)), markdown_table(*_comparison_table(comparison))]
    parts += [markdown_list(_comparison_notes(comparison)), LEGEND]
    columns = ("item", "gold", "A's answer", "B's answer", "A's output", "B's output")
    for name, task in comparison.tasks.items():
        turned = (("right", task.turned_right, task.examples_right), ("wrong", task.turned_wrong, task.examples_wrong))
        for word, count, examples in turned:
            rows = [
                (e.item, e.gold, e.extracted_a or "none", e.extracted_b or "none", e.output_a, e.output_b)
                for e in examples
            ]
            title = f"## {escape_markdown(name)}: turned {word} in B ({len(rows)} of {count})"
            parts += [title, markdown_table(columns, rows, ruler="---")] if rows else []
    return "\n\n".join(parts) + "\n"


def _comparison_table(comparison: Comparison) -> Table:
    columns = ("task", "n", "A %", "B %", "B-A", "95 % of B-A", "p", "gained", "lost")
    rows = []
    for name, task in comparison.tasks.items():
        p = "–" if task.p is None else "<0.001" if task.p < 0.001 else f"{task.p:.3f}"
        turned = (p, str(task.turned_right), str(task.turned_wrong))
        rows.append((name, str(task.items), *_paired_cells(task), *turned))
        rows += [(f"{name} pass@{k}", "", *_paired_cells(pair), "", "", "") for k, pair in task.pass_at.items()]
    return columns, rows


def _paired_cells(pair: Paired) -> tuple[str, ...]:
    difference = "–" if pair.difference is None else f"{100 * pair.difference:+.1f}"
    interval = "–" if pair.interval is None else " to ".join(f"{100 * end:+.1f}" for end in pair.interval)
    return percent(pair.accuracy_a), percent(pair.accuracy_b), difference, interval


def _labels(comparison: Comparison) -> Iterator[str]:
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        step = "" if side.step is None else f", step {side.step}"
        yield f"{letter}: {side.checkpoint}{step}, weights {side.weights_sha256[:12]} ({side.folder})"


def _comparison_notes(comparison: Comparison) -> Iterator[str]:
    sides = (("A", comparison.a), ("B", comparison.b))
    for name, task in comparison.tasks.items():
        for letter, count in (("A", task.only_in_a), ("B", task.only_in_b)):
            if count:
                yield f"{name}: {count} items only in {letter}, not compared"
    others = ((letter, ", ".join(side.other_tasks)) for letter, side in sides)
    yield from (f"tasks only in {letter}, not compared: {tasks}" for letter, tasks in others if tasks)
    yield from (f"{letter}: {_chat_core(side)}" for letter, side in sides)
