"""The card of a build for its repository on the Hub: `card.md`, filled in from the manifest."""

from html import escape
from importlib import resources
from typing import Any

from chatdata.errors import printable
from chatdata.tasks.task import load_tasks


def card(manifest: dict[str, Any], address: str) -> str:
    """README.md of the build that `manifest` describes, for readers at `address`."""
    tasks, licences, mixture = load_tasks(), dict[str, str](), list[str]()
    for split, facts in manifest["splits"].items():
        for entry in facts["entries"]:
            counts = (f"{entry[key]:,}" for key in ("documents", "tokens", "supervised"))
            mixture.append(_row(split, entry["name"], entry["source"], *counts))
            if entry["task"] in tasks:
                licences[entry["source"]] = tasks[entry["task"]].licence.replace("yours", "the uploader's")
    found = ((source["name"], source["revision"] or "–") for source in manifest["sources"])
    origins = [_row(name, revision, licences.get(name, "not known")) for name, revision in found]
    template = (resources.files("chatdata.look") / "card.md").read_text(encoding="utf-8")
    return template.format(**manifest, address=address, mixture="\n".join(mixture), origins="\n".join(origins))


def _row(*cells: str) -> str:
    """A row of a Markdown table. Names from the data may be anything."""
    return "".join(f"| {escape(printable(cell, keep='')).replace('|', '&#124;')} " for cell in cells) + "|"
