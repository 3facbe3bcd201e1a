"""`chatdata stats`: numbers of a build per name of an entry, from its index alone."""

from typing import Any

import polars as pl

from chatdata.look.console import console, share, table
from chatdata.look.ledger import ledger_lines
from chatdata.shards.read import Build

QUANTILES = (("min", 0), ("median", 0.5), ("p99", 0.99), ("max", 1))  # of num_tokens
SUMS = ("num_tokens", "num_supervised", "truncated", "num_turns", "num_tool_calls")


def build_stats(build: Build) -> dict[str, Any]:
    """Per split and name: documents, tokens, supervised, truncated, turns, tool calls, and quantiles of length; and the
    ledger of each split."""
    splits, ledger = {}, {name: contents["entries"] for name, contents in build.manifest["splits"].items()}
    for name, split in build.splits.items():
        frame = split.named_index.group_by("name", pl.col("task").cast(pl.String), maintain_order=True).agg(
            documents=pl.len(),
            **{column.removeprefix("num_"): pl.col(column).sum().cast(pl.Int64) for column in SUMS},
            length=pl.struct(pl.quantile("num_tokens", q, "nearest").cast(pl.Int32).alias(key) for key, q in QUANTILES),
        )
        splits[name] = sorted(frame.to_dicts(), key=lambda row: -row["tokens"])
    manifest = build.manifest
    return {"build_id": manifest["build_id"], "stage": manifest["stage"], "splits": splits, "ledger": ledger}


def show_stats(numbers: dict[str, Any]) -> None:
    """Print what `build_stats` found."""
    lengths = ("shortest", "median", "99%", "longest")
    columns = ("name", "documents", "tokens", "supervised", "share", "turns", "tool calls", *lengths)
    for split, tasks in numbers["splits"].items():
        rows = []
        for task in tasks:
            counts, calls = [task[key] for key in columns[:4]], (task["turns"], task["tool_calls"])
            rows.append((*counts, share(task["supervised"], task["tokens"]), *calls, *task["length"].values()))
        table(f"\n{split}", columns, rows)
        for line in ledger_lines(numbers["ledger"][split]):
            console().print(line)
    console().print(f"\nstage {numbers['stage']}, build {numbers['build_id'][:12]}")
