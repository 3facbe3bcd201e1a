"""What the commands print for people: plans and tables. Numbers come from elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from chatdata.look.console import console, megabytes, share, table
from chatdata.render.replay import OUTCOMES

if TYPE_CHECKING:
    from chatdata.build.plan import BuildPlan


def plan(plan: BuildPlan, out: Path) -> None:
    recipe, tokenizer = plan.recipe, plan.tokenizer
    width = "uint16" if tokenizer.dtype.itemsize == 2 else "uint32, because the vocabulary exceeds 65,536 entries"
    length = "whole documents" if recipe.max_tokens is None else f"{recipe.overflow} at {recipe.max_tokens:,} tokens"
    console().print(
        f"{recipe.name} (stage {recipe.stage}) → {escape(str(out))}\n"
        f"tokenizer: {tokenizer.vocab_size:,} entries, shards {width} · length: {length} · "
        f"without supervision: {recipe.zero_supervised} · seed {recipe.seed}"
    )
    rows: dict[tuple[str, str, int, str], int] = {}
    for split, entries in plan.splits.items():
        for planned in entries:
            source = planned.source
            revision = f"@{source.revision[:12]}" if source.revision else ""
            row = (split, planned.entry.label, len(planned.task_positions), source.name + revision)
            rows[row] = rows.get(row, 0) + 1
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("split", "entry", "rows", "source"):
        grid.add_column(name, justify="right" if name == "rows" else "left", no_wrap=True)
    for (split, label, num_rows, source_name), times in rows.items():
        shown = f"{num_rows:,}" + (f" ×{times}" if times > 1 else "")
        grid.add_row(split, escape(label), shown, escape(source_name))
    console().print(grid)


def build_result(manifest: dict[str, Any], report: dict[str, Any], out: Path) -> None:
    for split, contents in manifest["splits"].items():
        rows = [_ledger_row(entries) for entries in _copies(contents["entries"], ("task", "subset", "split", "source"))]
        totals = [sum(row[i] for row in rows) for i in (1, 2, 3, 5, 6, 7)]
        total = ("all", *totals[:3], share(totals[2], totals[1]), *totals[3:])
        columns = ("task", "documents", "tokens", "supervised", "share", "truncated", "tokens lost", "dropped")
        table(f"\n{split}", columns, rows, total)
        tool_calls(report["tool_calls"][split])
    if "firewall" in report:
        firewall(report["firewall"], out)
    units, encoder = report["units"], report.get("encoder")
    num_units = units["rendered"] + units["cached"]
    how = f"{report['duration_s']['total']:.1f} s, {units['rendered']:,} of {num_units:,} units rendered"
    if units["damaged"]:
        how += f" ({units['damaged']} damaged in the cache)"
    if encoder:
        how += f", texts encoded by {encoder['name']}"
        if encoder["texts_checked"]:
            how += f", {encoder['texts_checked']:,} of {encoder['texts']:,} also by tiktoken: the same ids"
    console().print(f"\n{how}\n{escape(str(out))}: build {manifest['build_id'][:12]} is complete")


def tool_calls(replayed: dict[str, Any]) -> None:
    """Per task: calls in a split, and what the calculator gives for them against what is recorded."""
    tasks: dict[str, Counter[str]] = {}
    for counts in replayed["entries"].values():
        numbers = {key: value for key, value in counts.items() if key != "task"}
        tasks.setdefault(counts["task"], Counter()).update(numbers)
    kinds = [kind for kind in OUTCOMES if any(counts[kind] for counts in tasks.values())]
    if tasks and not kinds:
        total = sum(counts["calls"] for counts in tasks.values())
        console().print(f"\n{total:,} tool calls: the calculator gives what is recorded for all of them")
    elif tasks:
        rows = [(task, counts["calls"], *(counts[kind] for kind in kinds)) for task, counts in tasks.items()]
        table("\ntool calls that do not give what is recorded", ("task", "calls", *kinds), rows)


def firewall(report: dict[str, Any], out: Path) -> None:
    """Training rows that hold scored items: a row per task, a column per scored set, and what was not checked."""
    columns = [name for name, counts in report["checked"].items() if counts["flagged"]]
    if columns:
        rows = [(task, *(sets.get(name, 0) for name in columns)) for task, sets in report["rows"].items()]
        items = [f"{report['checked'][name]['flagged']:,} of {report['checked'][name]['items']:,}" for name in columns]
        done = "left out" if report["decontaminate"] == "drop" else "kept; leave them out with --decontaminate drop"
        title = f"\nfirewall: {report['flagged_rows']:,} training rows hold scored items ({done})"
        table(title, ("rows of", *columns), rows, ("scored items", *items))
        lines = [f"listed with their rows in {out.name}-firewall.json"]
    else:
        num_items = sum(counts["items"] for counts in report["checked"].values())
        lines = [f"\nfirewall: no training row holds any of {num_items:,} scored items"]
    for reason in dict.fromkeys(report["not_checked"].values()):
        names = ", ".join(name for name, why in report["not_checked"].items() if why == reason)
        lines.append(f"not checked: {names} ({reason})")
    console().print(escape("\n".join(lines)))


def _copies(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Entries that differ only in their number (epochs) together, in recipe order."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return list(groups.values())


def _ledger_row(entries: list[dict[str, Any]]) -> tuple[Any, ...]:
    times = f" ×{len(entries)}" if len(entries) > 1 else ""
    name = " ".join(part for part in (entries[0]["task"], entries[0]["subset"]) if part) + times
    keys = ("documents", "tokens", "supervised", "truncated", "tokens_lost")
    documents, tokens, supervised, truncated, lost = (sum(entry[key] for entry in entries) for key in keys)
    dropped = sum(sum(entry["dropped"].values()) for entry in entries)
    return name, documents, tokens, supervised, share(supervised, tokens), truncated, lost, dropped


def stats(numbers: dict[str, Any]) -> None:
    columns = (
        "task",
        "documents",
        "tokens",
        "supervised",
        "share",
        "turns",
        "tool calls",
        "shortest",
        "median",
        "99%",
        "longest",
    )
    for split, rows in numbers["splits"].items():
        listed = [
            (
                row["task"],
                row["documents"],
                row["tokens"],
                row["supervised"],
                share(row["supervised"], row["tokens"]),
                row["turns"],
                row["tool_calls"],
                *(row["length"][key] for key in ("min", "median", "p99", "max")),
            )
            for row in rows
        ]
        table(f"\n{split}", columns, listed)
    console().print(f"\nstage {numbers['stage']}, build {numbers['build_id'][:12]}")


def epoch_plan(numbers: dict[str, Any]) -> None:
    """What `chatdata plan` found: the plan at its T, what is left out, and the what-if table."""
    plans = {rows: found for rows, found in numbers["plans"].items() if "refused" not in found}
    console().print(
        f"stage {numbers['stage']} (rows {numbers['stage_rows']}), {numbers['split']}: {numbers['documents']:,} "
        f"documents, {numbers['tokens']:,} tokens · mask {numbers['mask']} · "
        f"{numbers['batch_size']:,} × {numbers['seq_len']:,} positions a step"
    )
    columns = ("rows", "steps", "sequences", "input tokens", "targets", "targets/step", "least", "most", "padding", "")
    listed = []
    for rows, found in plans.items():
        per_step = found["targets_per_step"]
        cells = (found["steps"], found["sequences"], found["input_tokens"], found["targets"])
        steps = (f"{per_step['mean']:,.1f}", per_step["min"], per_step["max"])
        listed.append((rows, *cells, *steps, found["padding"], share(found["padding"], found["positions"])))
    if listed:
        table("\nan epoch", columns, listed)
    for rows, found in numbers["plans"].items():
        if "refused" in found:
            console().print(f"{rows}: {escape(found['refused'])}")
            continue
        left = [f"{value:,} {name.replace('_', ' ')}" for name, value in found["left_out"].items() if value]
        console().print(f"{rows}, left out: {', '.join(left) or 'nothing'}")
    columns = (
        "T",
        "rows",
        "sequences",
        "documents cut",
        "",
        "supervised lost",
        "if dropped",
        "padding",
        "filled",
        "targets/position",
    )
    listed = [
        (
            f"{row['seq_len']:,}",
            row["rows"],
            row["sequences"],
            row["documents_cut"],
            share(row["documents_cut"], numbers["documents"]),
            row["supervised_lost"],
            row["supervised_lost_if_dropped"] if row["rows"] != "stream" else "–",
            row["padding"],
            f"{100 * row['filled']:.1f}%",
            f"{100 * row['efficiency']:.1f}%",
        )
        for row in numbers["what_if"]
    ]
    table(
        "\nwhat if (pack and pad with --long truncate; stream splits documents, and loses only its tail)",
        columns,
        listed,
    )


def cache(facts: dict[str, Any]) -> None:
    lines = [f"{facts['folder']}: {facts['units']:,} units, {megabytes(facts['bytes'])}"]
    if facts["oldest_use"] is not None:
        days = (time.time() - facts["oldest_use"]) / 86_400
        lines[0] += f", the longest unused for {days:.1f} days"
    if facts["removed_units"]:
        lines.append(f"removed: {facts['removed_units']:,} units, {megabytes(facts['removed_bytes'])}")
    console().print(escape("\n".join(lines)))


def tasks(listed: list[dict[str, Any]]) -> None:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "source", "subset", "splits (rows)", "licence", "what"):
        grid.add_column(name, no_wrap=name != "what")
    for task in listed:
        lines = task["splits"].items() or [("", {})]
        for i, (subset, splits) in enumerate(lines):
            shown = ", ".join(f"{split} {rows:,}" if rows else split for split, rows in splits.items())
            first = (task["task"], task["source"]) if i == 0 else ("", "")
            last = (task["licence"], task["summary"]) if i == 0 else ("", "")
            grid.add_row(*(escape(cell) for cell in (*first, subset, shown, *last)))
    console().print(grid)
