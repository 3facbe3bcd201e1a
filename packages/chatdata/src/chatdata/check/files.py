"""`chatdata check`: every row of files of conversations, read as a build would read it, in one pass."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.conversation import Reading
from chatdata.errors import general
from chatdata.look.ledger import ledger_lines, place_of
from chatdata.progress import Progress, no_progress
from chatdata.recipe import Entry
from chatdata.render.batch import facts_of
from chatdata.render.pieces import TALLIES, pieces_of_rows
from chatdata.sources.find import Locations, resolve
from chatdata.tasks.task import load_tasks

PLACES_SHOWN = 20  # for each reason


def check_files(files: Sequence[Path], progress: Progress = no_progress) -> dict[str, Any]:
    """What a build with `invalid = "drop"` would use of these files: `files`, `conversations`, `counts` as in a ledger,
    and of bad rows how many `rows`, how many for each of the `reasons`, and all of them `listed`.

    A tokenizer may give up on a text: only a build finds that. Raises MissingSource or SourceError for a file that
    cannot be read at all.
    """
    task, reading, locations = load_tasks()["conversations"], Reading(invalid="drop"), Locations(Path())
    sources = [resolve(Entry("check", "", "", path=str(file), reading=reading), task, locations) for file in files]
    counts: Counter[str] = Counter()
    num_rows, listed = 0, []
    for file, source in zip(files, sources, strict=True):
        notes: dict[int, str] = {}
        for rows, raw in source.read_batches(0, np.ones(source.num_rows, dtype=bool)):
            pieces = pieces_of_rows(source, rows, raw)
            notes |= {int(rows[i]): json.loads(note)[1] for i, note in pieces.notes}
            for kind, number in facts_of(pieces)["tallies"].tolist():
                counts[TALLIES[kind]] += number
            progress(source.name, int(rows[-1]) + 1, source.num_rows, "rows")
        num_rows += source.num_rows
        for place, reason in zip(source.places(np.array(list(notes), dtype=np.int64)), notes.values(), strict=True):
            shown = str(file.with_name(Path(place.file).name))
            listed.append(place._replace(file=shown).with_reason(reason))
    reasons = dict(Counter(general(row["reason"]) for row in listed).most_common())
    bad = {"rows": len(listed), "reasons": reasons, "listed": listed}
    return {"files": len(files), "conversations": num_rows - len(listed), "counts": +counts, **bad}


def lines_of_check(found: dict[str, Any]) -> list[str]:
    """Bad rows by reason, most frequent first, each with its first row and PLACES_SHOWN places; then the sums."""
    alike: dict[str, list[dict[str, Any]]] = {reason: [] for reason in found["reasons"]}
    for row in found["listed"]:
        alike[general(row["reason"])].append(row)
    lines = []
    for rows in alike.values():
        more = f" and {len(rows) - PLACES_SHOWN:,} more" if len(rows) > PLACES_SHOWN else ""
        lines += [f"{len(rows):,} row{'s'[: len(rows) != 1]}: {rows[0]['reason']}"]
        lines += [f"  {', '.join(map(place_of, rows[:PLACES_SHOWN]))}{more}"]
    sums = (("file", "files"), ("conversation", "conversations"), ("bad row", "rows"))
    lines.append(", ".join(f"{found[key]:,} {name}{'s'[: found[key] != 1]}" for name, key in sums))
    return lines + ledger_lines([found["counts"]])
