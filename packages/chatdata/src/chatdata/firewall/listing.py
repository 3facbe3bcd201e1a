"""What the firewall found, as plain data for report.json and for the listing that chateval reads."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from chatdata.disk import Count, decode
from chatdata.errors import FormatError
from chatdata.firewall.search import Findings
from chatdata.shards.manifest import Source

CHOICES = ("report", "drop", "off")  # of --decontaminate


class FlaggedRow(Struct):
    source: str
    file: str | None
    row: Count  # of the file
    source_row: Count  # as in the index: a source may have several files
    method: str
    share: float


class FlaggedItem(Struct):
    set: str
    item: str
    rows: Annotated[list[FlaggedRow], Meta(min_length=1)]


class CheckedSet(Struct):
    source: Source
    items: Count
    flagged: Count  # items that were found
    rows: Count  # training rows that hold any


class Listing(Struct):
    """What is read of OUT/firewall.json, here and by chateval."""

    format: Literal["chatdata-firewall"]
    version: Literal[1]
    build_id: str
    checked: dict[str, CheckedSet]
    not_checked: dict[str, str]
    flagged_rows: Count
    items: list[FlaggedItem]


def read_listing(build: Path, build_id: str) -> Listing | None:
    """OUT/firewall.json of a build, if it has one. Raises FormatError if it is damaged or of another build."""
    path = build / "firewall.json"
    if not path.is_file():
        return None
    read = decode(path.read_bytes(), Listing, str(path), FormatError)
    if read.build_id != build_id:
        raise FormatError(f"{path}: of another build; remove it, or build again")
    return read


def summary(findings: Findings) -> dict[str, Any]:
    """For report.json: hits (training rows) by task and scored set, flagged items by set, what was not checked."""
    rows: dict[str, dict[str, set[int]]] = {}
    for hit in findings.hits:
        rows.setdefault(findings.places[hit.document]["task"], {}).setdefault(hit.item.set, set()).add(hit.document)
    return {
        "checked": {name: {"items": n["items"], "flagged": n["flagged"]} for name, n in _counts(findings).items()},
        "not_checked": dict(findings.scored.not_checked),
        "rows": {task: {name: len(documents) for name, documents in sets.items()} for task, sets in rows.items()},
        "flagged_rows": len(findings.documents),
        "cpu_s": round(findings.cpu_s, 3),
    }


def listing(findings: Findings, build_id: str) -> dict[str, Any]:
    """For OUT/firewall.json: every flagged item with its training rows, and which sets were checked."""
    items: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for hit in findings.hits:
        rows = items.setdefault((hit.item.set, hit.item.item), [])
        rows.append({**findings.places[hit.document], "method": hit.method, "share": hit.share})
    in_order = sorted(items.items(), key=lambda found: (found[0][0], len(found[0][1]), found[0][1]))  # row 9, row 10
    sources = findings.scored.checked
    return {
        "format": "chatdata-firewall",
        "version": 1,
        "build_id": build_id,
        "checked": {name: {**n, "source": sources[name].describe()} for name, n in _counts(findings).items()},
        "not_checked": dict(findings.scored.not_checked),
        "flagged_rows": len(findings.documents),
        "items": [{"set": name, "item": item, "rows": rows} for (name, item), rows in in_order],
    }


def _counts(findings: Findings) -> dict[str, dict[str, int]]:
    """Of each checked set: its items, those that were found, and the training rows that hold any."""
    num_items, counts = Counter(item.set for item in findings.scored.items), {}
    for name in findings.scored.checked:
        hits = [hit for hit in findings.hits if hit.item.set == name]
        flagged, rows = {hit.item.item for hit in hits}, {hit.document for hit in hits}
        counts[name] = {"items": num_items[name], "flagged": len(flagged), "rows": len(rows)}
    return counts
