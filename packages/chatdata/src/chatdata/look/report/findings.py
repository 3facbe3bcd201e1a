"""What a report says about scored items in the training documents: the firewall's listing, looked up in the build."""

from __future__ import annotations

from typing import Any

import polars as pl

from chatdata.firewall.listing import read_listing
from chatdata.shards.read import Build

FIRST = 12  # items shown with their document
FIRST_OF_SET = 4


def firewall_findings(build: Build) -> dict[str, Any]:
    """The firewall's findings as plain values; {} if the build has no firewall.json.

    sets: name → `items` searched for, `flagged` items, `rows` that hold one; not_checked: set → why; rows: training
    rows that hold items; documents: those in the build (a row may be in several, or left out); first: up to FIRST
    items, FIRST_OF_SET of each set, with their first row and its document in train (None: left out).
    Raises FormatError if firewall.json is damaged or of another build.
    """
    listing = read_listing(build.path, build.manifest["build_id"])
    if listing is None:
        return {}
    sources = [entry["source"] for entry in build.manifest["splits"]["train"]["entries"]]
    places = [(row.source, row.source_row) for item in listing.items for row in item.rows]
    flagged = pl.DataFrame(places, schema={"source": pl.String, "row": pl.Int64}, orient="row").unique()
    index = build["train"].index.select("doc", "row", "entry")
    names = pl.DataFrame({"source": sources}).with_row_index("entry").cast({"entry": pl.Int16})
    found = index.join(names, on="entry").join(flagged, on=["source", "row"], how="semi").sort("doc", descending=True)
    document = {(source, row): doc for doc, row, source in found.select("doc", "row", "source").rows()}
    sets, first = {}, []
    for name, checked in listing.checked.items():
        items = [item for item in listing.items if item.set == name]
        rows = {(row.source, row.source_row) for item in items for row in item.rows}
        sets[name] = {"items": checked.items, "flagged": len(items), "rows": len(rows)}
        for item in items[:FIRST_OF_SET]:
            row = min(item.rows, key=lambda row: (row.source, row.source_row) not in document)
            place = f"{row.file or row.source} row {row.row}"
            match = row.method if row.share == 1 else f"{row.method} {row.share:.0%}"
            doc = document.get((row.source, row.source_row))
            first.append({"item": item.item, "rows": len(item.rows), "place": place, "match": match, "doc": doc})
    return {
        "sets": sets,
        "not_checked": listing.not_checked,
        "rows": len(flagged),
        "documents": len(found),
        "first": first[:FIRST],
    }
