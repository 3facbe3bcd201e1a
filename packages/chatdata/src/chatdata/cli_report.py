"""`chatdata report`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chatdata.command import examples

FILE = click.Path(path_type=Path)


@click.command(
    epilog=examples(
        "chatdata report out/demo-mid",
        "chatdata report out/mid --out mid.html",
        "chatdata report out/mid --json > numbers.json",
    )
)
@click.argument("path", metavar="BUILD", type=FILE)
@click.option("--out", type=FILE, help="The page (default: BUILD's name and -report.html, beside the build).")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def report(path: Path, out: Path | None, as_json: bool) -> None:
    """Write one HTML page that shows the data: mixture, lengths, supervision, vocabulary, documents.

    The page asks for nothing on the network when it is opened. It is made with Altair: pip install "chatdata[report]".
    """
    from chatdata import show
    from chatdata.report import write_report

    facts = write_report(path, out)
    if as_json:
        click.echo(json.dumps(facts))
        return
    documents = sum(split["documents"] for split in facts["splits"].values())
    shown = f"{facts['documents_shown']:,} of {documents:,} documents in it"
    click.echo(f"{facts['out']}: {show.megabytes(facts['bytes'])}, {shown}")
