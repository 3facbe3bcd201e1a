"""`chatdata reproduce`: build again from the manifest, and compare the two builds.

`--sample` compares a share of the documents and writes nothing: that is rerender.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatdata.build.plan import BuildPlan
from chatdata.build.run import build as run_build
from chatdata.check.diff import diff_builds, differences, lines_of
from chatdata.check.rerender import plan_of_build, source_problems
from chatdata.check.verify import verify_full
from chatdata.disk import check_free
from chatdata.errors import MissingSource
from chatdata.firewall.scored import read_scored
from chatdata.progress import no_progress
from chatdata.shards.read import open_build
from chatdata.sources.find import Locations
from chatdata.tasks.task import Task

# keys of a manifest that may differ although all values are equal: how pyarrow wrote the index and chatdata the
# tokenizer, what sources are called, the version of `renderers`
INCIDENTAL = re.compile(r".*\.index\.(sha256|bytes)|.*\.(name|revision|source)|tokenizer\.files\..*|chat_format")


def reproduce(
    path: Path, out: Path, locations: Locations, tasks: Mapping[str, Task], recipe: str | None = None, **options: Any
) -> tuple[str, list[str]]:
    """Build into `out` what the manifest of the build at `path` describes, and compare the two.

    recipe: see `plan_of_build`. options: `against`, `workers` and `progress` of `build`.
    Returns the result, and lines for people: none if the builds are equal to the byte (one build_id) or in every value
    (all tokens, masks and columns of the index); else all differences (`diff_builds`), or what is damaged.
    Raises BuildError if there is anything in `out`; MissingSource if a source cannot be found, or the scored items
    whose rows the build dropped; and what `plan_of_build` and `build` raise.
    """
    check_free(out)
    if problems := verify_full(path, options.get("progress") or no_progress):
        return "damaged", problems
    build = open_build(path)
    plan, wanted = plan_of_build(build, locations, tasks, recipe), build.manifest["recipe"]
    if "scored" in wanted:
        plan = _with_scored_sets(plan, wanted["scored"], options.get("against", ()))
    problems = source_problems(build, plan)
    run_build(plan, out, decontaminate=wanted.get("decontaminate", "off"), **options)
    again = open_build(out)
    keys = [key for key, _, _ in differences(build.manifest, again.manifest) if key != "build_id"]
    if not keys:
        return "equal to the byte", []
    equal_indexes = all(split.index.equals(again[name].index) for name, split in build.splits.items())
    if equal_indexes and all(INCIDENTAL.fullmatch(key) for key in keys):
        kinds = dict.fromkeys("another pyarrow wrote the index" if ".index." in key else key for key in keys)
        return f"equal in every value, but not to the byte: {', '.join(kinds)}", []
    return "not equal", [*problems, *lines_of(diff_builds(build, again))]


def _with_scored_sets(plan: BuildPlan, wanted: Mapping[str, list[str]], against: Sequence[str]) -> BuildPlan:
    """The plan with those scored sets alone whose items were dropped. wanted: set or file → SHA-256 of its files."""
    tasks = dict(plan.tasks)
    for task in plan.tasks.values():
        if task.scoring:
            sets = {name: scored for name, scored in task.scoring.sets.items() if name in wanted}
            tasks[task.name] = replace(task, scoring=replace(task.scoring, sets=sets))
    found = read_scored(plan.splits["train"], tasks, plan.locations, plan.tokenizer, against).decided_by["scored"]
    if missing := ", ".join(name for name, hashes in wanted.items() if found.get(name) != hashes):
        advice = "pass --data-dir with scored sets, --against with test items of your own"
        dropped = f"the build dropped rows that hold items of {missing}"
        raise MissingSource(f"{dropped}, which are not here or differ: {advice}")
    return plan._replace(tasks=tasks)
