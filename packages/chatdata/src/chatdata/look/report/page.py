"""`chatdata report`: one HTML file with the numbers and documents of a build."""

import json
from pathlib import Path
from typing import Any

from chatdata.errors import UsageError
from chatdata.firewall.listing import read_listing
from chatdata.look.ledger import WORDS, ledger_lines, summed
from chatdata.look.report.charts import MEASURES, chart_specs
from chatdata.look.report.collect import ROLES, report_numbers
from chatdata.look.report.documents import FLAGGED, MAX_BYTES, first_flagged, shown_documents
from chatdata.look.report.html import HERE, check_report, named, spelled, write_page
from chatdata.shards.address import cached_build
from chatdata.shards.read import open_build

EXCERPT = 200  # characters of a document that holds a scored item, next to the item's name


def default_out(build: Path) -> Path:
    """`<build>-report.html` next to the build: `chatdata verify` would report a file inside it as damage.

    For a build in the cache, `<build_id>-report.html` here, with the first 12 digits.
    """
    folder = named(build)
    if folder == cached_build(folder.name):
        folder = Path.cwd() / folder.name[:12]
    return folder.with_name(f"{folder.name}-report.html")


def write_report(path: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the report of the build at `path` to `out` (see `default_out`), complete or not at all.

    Returns its numbers (see `report_numbers`) with `out`, `bytes` and `documents_shown`. Raises UsageError if the extra
    `report` is not installed, or if `out` is a folder, inside the build, or in a folder that does not exist;
    FormatError if the build is damaged.
    """
    out = out or default_out(path)
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--out {out} is inside the build, where every file is accounted for; choose another folder")
    check_report(out)
    build = open_build(path)
    listing = read_listing(path, build.manifest["build_id"])
    flagged = first_flagged(build, listing.items) if listing else []
    shown = shown_documents(build, [doc for _, doc in flagged if doc is not None])
    numbers = report_numbers(build)
    splits = numbers["splits"]
    used = {role for split in splits.values() for task in split["tasks"] for role in task["roles"]}
    ledger = {name: summed(split["entries"]) for name, split in splits.items()}
    dropped = {reason for entries in ledger.values() for entry in entries for reason in entry["dropped"]}
    size = write_page(
        out,
        HERE,
        chart_specs(numbers, build.tokenizer),
        name=named(build.path).name,
        manifest=build.manifest,
        made=_made(build.path),
        numbers=numbers,
        ledger=ledger,
        in_words=ledger_lines,
        options=_options,
        reasons={reason: words.partition("{s} ")[2] for reason, words in WORDS.items() if reason in dropped},
        origins={source["name"]: _origin(source) for source in build.manifest["sources"]},
        measures=list(enumerate(MEASURES.values())),
        roles=[(i, role) for i, role in enumerate(ROLES) if role in used],
        max_bytes=MAX_BYTES,
        documents=shown,
        excerpts={
            d.index["doc"]: " ".join(s.text for line in d.lines for s in line if "chip" not in s.kind)[:EXCERPT]
            for d in shown
            if d.why == FLAGGED
        },
        unused=[(i, spelled(build.tokenizer, i)) for i in numbers["vocabulary"]["unused_ids"]],
        tokenizer_sha256=build.tokenizer.sha256,
        listing=listing,
        flagged=flagged,
    )
    return {"out": str(out), "bytes": size, "documents_shown": len(shown), **numbers}


def _made(path: Path) -> dict[str, Any]:
    """What report.json says about the build's making; {} without one: a copy may leave it out."""
    try:
        made = json.loads((path / "report.json").read_text(encoding="utf-8"))
        counts = {key: int(made["units"][key]) for key in ("rendered", "cached")}
        speed = {"duration_s": float(made["duration_s"]["total"]), "tokens_per_s": int(made["tokens_per_s"])}
        return counts | speed | {"workers": int(made["workers"]), "day": str(made["finished"]).partition("T")[0]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _origin(source: dict[str, Any]) -> str:
    """The file of a source, or its name and how many files it has; "" if it has none: its rows are generated."""
    names = [file["name"] for file in source["files"]]
    return f"{source['name']}, {len(names)} files" if len(names) > 1 else "".join(names)


def _options(entry: dict[str, Any]) -> str:
    """The keys of a recipe entry other than its task."""
    options = {key: value for key, value in entry.items() if key != "task" and value not in (None, "")}
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in options.items())
