"""The `chatdata` command, with tasks and cache. Heavy imports are inside functions so that `--help` is fast."""

import fcntl
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import click

from chatdata.cli.build import build
from chatdata.cli.check import check, diff, reproduce, verify
from chatdata.cli.command import json_option, program, run_command, task_files_option, tell
from chatdata.cli.look import inspect, plan, report, stats
from chatdata.cli.prepare import identity_command, tokenizer
from chatdata.cli.share import export, pull, push
from chatdata.progress import say_json

cli = program("chatdata", "Render chat conversations once, offline, to token shards with a parallel loss mask.")
reading = (inspect, stats, verify, reproduce, report, plan, diff, export)
for part in (build, check, *reading, push, pull, tokenizer, identity_command):
    cli.add_command(part)


@cli.command(name="tasks")
@task_files_option
@json_option
def list_tasks(task_files: tuple[Path, ...], as_json: bool) -> None:
    """List the tasks with source, splits, rows and licence.

    Examples:
      chatdata tasks
      chatdata tasks --task-file my_task.py
    """
    from rich.markup import escape

    from chatdata.look.console import console, grid
    from chatdata.tasks.task import load_tasks

    listed: list[dict[str, Any]] = []
    for each in load_tasks(task_files).values():
        source = each.hub or ("generated" if each.generate else "path or repo" if each.name != "identity" else "path")
        splits = {subset: dict(of_subset) for subset, of_subset in each.splits.items()}
        about = {"licence": each.licence, "summary": each.summary}
        listed.append({"task": each.name, "source": source, "splits": splits, **about})
    if as_json:
        say_json(listed)
        return
    lines = grid("task", "source", "subset", "splits (rows)", "licence", "what", folded="what")
    for task in listed:
        first, last = (task["task"], task["source"]), (task["licence"], task["summary"])
        for subset, splits in task["splits"].items() or [("", {})]:
            shown = ", ".join(f"{split} {rows:,}" if rows else split for split, rows in splits.items())
            lines.add_row(*map(escape, (*first, subset, shown, *last)))
            first, last = ("", ""), ("", "")
    console().print(lines)


@cli.command()
@click.option("--prune", "unused_days", metavar="DAYS", type=click.FloatRange(min=0), help="Remove unused units.")
@json_option
def cache(unused_days: float | None, as_json: bool) -> None:
    """Print the size of the cache of work units, or prune it.

    --prune removes the units that no build has used for DAYS (0: all), and builds that were only fetched in part. A
    build renders missing units again. The cache is $CHATDATA_CACHE, by default `chatdata` in the XDG cache folder. It
    also holds downloaded word lists, which are small, and fetched builds: these are never removed.

    Examples:
      chatdata cache
      chatdata cache --prune 30
      CHATDATA_CACHE=/data/cache chatdata cache --prune 0
    """
    from chatdata.build.units import cached_units, prune
    from chatdata.disk import cache_folder
    from chatdata.look.console import megabytes

    folder = cache_folder("units")
    removed = prune(folder, unused_days) if unused_days is not None else []
    left = cached_units(folder)
    num_bytes, removed_bytes = (sum(unit.num_bytes for unit in units) for units in (left, removed))
    facts: dict[str, Any] = {"folder": str(folder), "units": len(left), "bytes": num_bytes}
    facts |= {"removed_units": len(removed), "removed_bytes": removed_bytes}
    fetched = cache_folder("builds")
    if unused_days is not None:
        with suppress(OSError), (fetched / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a fetch holds it
            for partial_fetch in fetched.glob(".tmp-*"):
                rmtree(partial_fetch)
    builds = sorted(path.parent for path in fetched.glob("[!.]*/manifest.json"))
    builds_bytes = sum(path.stat().st_size for path in fetched.rglob("*") if path.is_file())  # partial ones, too
    facts |= {"builds": [build.name for build in builds], "builds_bytes": builds_bytes}
    oldest = f", the longest unused for {(time.time() - left[0].last_used) / 86_400:.1f} days" if left else ""
    lines = [f"{folder}: {len(left):,} work units, {megabytes(num_bytes)}{oldest}"]
    lines += [f"removed: {len(removed):,} work units, {megabytes(removed_bytes)}"] if removed else []
    lines += [f"{fetched}: {len(builds):,} fetched builds, {megabytes(builds_bytes)}"] if builds_bytes else []
    tell(facts | {"oldest_use": left[0].last_used if left else None}, lines, as_json)


INTERRUPTED = "interrupted; no build was written, but rendered work units are kept: run the same command to resume"
main = partial(run_command, cli, "chatdata", INTERRUPTED, only="build")
