"""What the firewall found, as plain data for report.json and for the listing that chateval reads."""

from __future__ import annotations

from typing import Any

from chatdata.firewall.search import Findings

CHOICES = ("report", "drop", "off")  # of --decontaminate
FIREWALL_FORMAT, VERSION = "chatdata-firewall", 1


def summary(findings: Findings) -> dict[str, Any]:
    """For report.json: hits (training rows) by task and scored set, flagged items by set, what was not checked."""
    rows: dict[str, dict[str, set[int]]] = {}
    for hit in findings.hits:
        rows.setdefault(findings.places[hit.document]["task"], {}).setdefault(hit.item.set, set()).add(hit.document)
    flagged = {name: len({h.item.item for h in findings.hits if h.item.set == name}) for name in findings.checked}
    return {
        "checked": {name: {"items": n, "flagged": flagged[name]} for name, n in findings.num_items.items()},
        "not_checked": dict(findings.not_checked),
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
    return {
        "format": FIREWALL_FORMAT,
        "version": VERSION,
        "build_id": build_id,
        "checked": {
            name: {"items": findings.num_items[name], "source": source.describe()}
            for name, source in findings.checked.items()
        },
        "not_checked": dict(findings.not_checked),
        "items": [{"set": name, "item": item, "rows": rows} for (name, item), rows in sorted(items.items())],
    }
