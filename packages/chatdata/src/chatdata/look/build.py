"""What `chatdata build` prints: its plan before the work, and its result after it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from chatdata.build.plan import BuildPlan
from chatdata.look.console import console, grid, megabytes, shard_dtype, share, table
from chatdata.look.ledger import COUNTS, added, bad_row_line, ledger_lines, summed
from chatdata.render.batch import OUTCOMES
from chatdata.sources.source import Source


def show_plan(plan: BuildPlan, out: Path, forms: Mapping[Source, str], about: Mapping[str, Any]) -> None:
    """forms: of the rows of sources whose form was looked at. about: what `estimate` found, if asked for."""
    recipe, tokenizer = plan.recipe, plan.tokenizer
    length = "whole documents" if recipe.max_tokens is None else f"{recipe.overflow} at {recipe.max_tokens:,} tokens"
    vocabulary = f"vocabulary: {tokenizer.vocab_size:,} tokens, shards {shard_dtype(tokenizer.dtype.name)}"
    rules = f"length: {length} · without supervision: {recipe.zero_supervised} · seed {recipe.seed}"
    console().print(f"{recipe.name} (stage {recipe.stage}) → {escape(str(out))}\n{vocabulary} · {rules}")
    counts: Counter[tuple[str, ...]] = Counter()
    for split, entries in plan.splits.items():
        num_rows, shares = sum(len(planned.taken) for planned in entries), sum(p.entry.share or 0 for p in entries)
        for i, planned in enumerate(entries):
            source, requested = planned.source, planned.entry.share
            mixed = (share(requested, shares), share(len(planned.taken), num_rows)) if requested else ("", "")
            revision = f"@{source.revision[:12]}" if source.revision else ""
            cells = (planned.entry.label, forms.get(source, ""), f"{len(planned.taken):,}", *mixed)
            tokens = f"{about[split][i]:,}" if about else ""
            counts[split, *cells, tokens, source.name + revision] += 1
    rows = [(*cells[:3], cells[3] + (f" ×{n}" if n > 1 else ""), *cells[4:]) for cells, n in counts.items()]
    titles = ("split", "entry", "form", "rows", "share", "actual", "about tokens", "source")
    columns = {title: cells for title, cells in zip(titles, zip(*rows, strict=True), strict=True) if any(cells)}
    lines = grid(*columns, right=titles[3:-1])
    for line in zip(*columns.values(), strict=True):
        lines.add_row(*map(escape, line))
    console().print(lines)
    if about:
        sizes = f"{megabytes(about['output_bytes'])} of output, {megabytes(about['cache_bytes'])} of cache"
        console().print(f"\nabout {about['tokens']:,} tokens, {sizes}, {about['seconds']:,.0f} s if nothing is cached")


def show_result(manifest: dict[str, Any], report: dict[str, Any], out: Path) -> None:
    for split, contents in manifest["splits"].items():
        columns = ("task", "documents", "tokens", "supervised", "share", "truncated", "tokens lost", "dropped")
        lines = [_ledger_row(_name(entry), entry) for entry in summed(contents["entries"])]
        table(f"\n{split}", columns, lines, _ledger_row("all", added(contents["entries"])))
        lines_below = ledger_lines(contents["entries"])
        listed = report["invalid"][split]["listed"]
        lines_below += map(bad_row_line, listed[:3])
        if len(listed) > 3:
            lines_below.append(f"  … report.json, in the build, lists {len(listed):,} of these rows")
        for line in lines_below:
            console().print(escape(line))
        _show_tool_calls(report["tool_calls"][split])
    if "firewall" in report:
        _show_firewall(report["firewall"])
    units, encoder = report["units"], report.get("encoder")
    num_units = units["rendered"] + units["cached"]
    how = f"{report['duration_s']['total']:.1f} s, {units['rendered']:,} of {num_units:,} work units rendered"
    if units["damaged"]:
        how += f" ({units['damaged']} damaged in the cache)"
    if encoder:
        how += f", encoded with {encoder['name']}"
        if encoder["texts_checked"]:
            how += f" ({encoder['texts_checked']:,} of {encoder['texts']:,} texts checked against tiktoken)"
    console().print(f"\n{how}\n{escape(str(out))}: build {manifest['build_id'][:12]} is complete")


def _name(entry: dict[str, Any]) -> str:
    times = f"×{entry['copies']}" if entry["copies"] > 1 else ""
    return " ".join(part for part in (entry["name"], entry["subset"], times) if part)


def _ledger_row(name: str, entry: dict[str, Any]) -> tuple[Any, ...]:
    documents, tokens, supervised, truncated, lost = (entry[key] for key in COUNTS[1:])
    dropped = sum(entry["dropped"].values())
    return name, documents, tokens, supervised, share(supervised, tokens), truncated, lost, dropped


def _show_tool_calls(replayed: dict[str, Any]) -> None:
    """The tool calls of a split whose recorded output is not the calculator's result, per name."""
    tasks: dict[str, Counter[str]] = {}
    for counts in replayed["entries"].values():
        tasks.setdefault(counts["name"], Counter()).update({key: counts.get(key, 0) for key in ("calls", *OUTCOMES)})
    kinds = [kind for kind in OUTCOMES if any(counts[kind] for counts in tasks.values())]
    if tasks and not kinds:
        total = sum(counts["calls"] for counts in tasks.values())
        console().print(f"\n{total:,} tool calls: all recorded outputs match the calculator")
    elif tasks:
        rows = [(task, counts["calls"], *(counts[kind] for kind in kinds)) for task, counts in tasks.items()]
        table("\ntool calls whose recorded output does not match the calculator", ("task", "calls", *kinds), rows)


def _show_firewall(report: dict[str, Any]) -> None:
    """Training rows that hold scored items (a row per task, a column per scored set), and what was not checked."""
    checked = report["checked"]
    columns = [name for name, counts in checked.items() if counts["flagged"]]
    if columns:
        rows = [(task, *(sets.get(name, 0) for name in columns)) for task, sets in report["rows"].items()]
        items = [f"{checked[name]['flagged']:,} of {checked[name]['items']:,}" for name in columns]
        done = "dropped" if report["decontaminate"] == "drop" else "kept; --decontaminate drop leaves them out"
        held = f"{report['flagged_rows']:,} training row{' holds' if report['flagged_rows'] == 1 else 's hold'}"
        title = f"\nfirewall: {held} scored items ({done})"
        table(title, ("rows of", *columns), rows, ("scored items", *items))
        lines = ["every row is listed in firewall.json, in the build"]
    elif checked:
        num_items = sum(counts["items"] for counts in checked.values())
        lines = [f"\nfirewall: no training row holds any of {num_items:,} scored items"]
    else:
        lines = ["\nfirewall: no scored set was found to search for; --against FILE adds your own test items"]
    clean = [f"{name} ({counts['items']:,})" for name, counts in checked.items() if not counts["flagged"]]
    lines += [f"no match: {', '.join(clean)}"] if clean else []
    for reason in dict.fromkeys(report["not_checked"].values()):
        names = ", ".join(name for name, why in report["not_checked"].items() if why == reason)
        lines.append(f"not checked ({reason}): {names}")
    console().print(escape("\n".join(lines)))
