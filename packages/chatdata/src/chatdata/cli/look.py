"""Commands that show a build: `chatdata inspect`, `stats`, `report`, `plan`."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, build_argument, command, json_option, mask_option, tell, tokenizer_of
from chatdata.errors import UsageError
from chatdata.progress import say_json


@command()
@partial(build_argument, required=False)
@click.option("--split", default="train", help="train or val.")
@click.option("--doc", type=int, help="Show the document with this number.")
@click.option("--task", help="Show the first documents of this task, or of entries of this name.")
@click.option("--conversation", type=click.Path(allow_dash=True, path_type=Path), help="JSON file, - for stdin.")
@click.option("--tokenizer", type=FILE, help="Tokenizer for --conversation.")
@click.option("--stage", "stages", type=click.Choice(["mid", "sft"]), multiple=True, help="Add inputs and targets.")
@json_option
def inspect(path: Path | None, conversation: Path | None, tokenizer: Path | None, **options: Any) -> None:
    """Show documents of a build, or the tokens of a conversation.

    --doc or --task chooses the documents; by default the first ones of the split. For a conversation, prints token, id
    and mask, one line per token.

    Examples:
      chatdata inspect out/demo-mid --doc 7
      chatdata inspect out/demo-mid --task demo_math
      chatdata inspect --conversation chat.json --tokenizer out/demo-mid --stage mid --stage sft
    """
    from chatdata.look import inspect as look

    chosen = [key for key in ("doc", "task") if options[key] is not None]
    if conversation is not None:
        if path is not None or tokenizer is None or chosen:
            raise UsageError("--conversation takes --tokenizer, and no BUILD, --doc or --task")
        document = look.document_of_file(conversation, tokenizer_of(tokenizer))
        look.show_tokens(document, options["stages"], options["as_json"])
        return
    if tokenizer is not None:
        raise UsageError("--tokenizer goes with --conversation; a BUILD has its own")
    if len(chosen) > 1:
        raise UsageError("give --doc or --task, not both")
    if path is None:
        raise UsageError("give a BUILD, or --conversation FILE --tokenizer T")
    look.show_documents(path, **options)


@command()
@build_argument
@json_option
def stats(path: Path, as_json: bool) -> None:
    """Print documents, tokens, supervised share and lengths per task or name.

    Examples:
      chatdata stats out/demo-mid
      chatdata stats out/demo-mid --json
    """
    from chatdata import open_build
    from chatdata.look.stats import build_stats, show_stats

    numbers = build_stats(open_build(path))
    say_json(numbers) if as_json else show_stats(numbers)


@command()
@build_argument
@click.option("--out", type=FILE, help="File to write (default: BUILD-report.html).")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers of the report as JSON.")
def report(path: Path, out: Path | None, as_json: bool) -> None:
    """Write an HTML page that shows the data of a build.

    It shows mixture, lengths, supervision, vocabulary and documents, and loads nothing from the network. Needs Altair
    (`uv sync --extra report`).

    Examples:
      chatdata report out/demo-mid
      chatdata report out/mid --out mid.html
      chatdata report out/mid --json > numbers.json
    """
    from chatdata.look.console import megabytes
    from chatdata.look.report.page import write_report

    facts = write_report(path, out)
    documents = sum(split["documents"] for split in facts["splits"].values())
    shown = f"{facts['documents_shown']:,} of {documents:,} documents in it"
    tell(facts, [f"{facts['out']}: {megabytes(facts['bytes'])}, {shown}"], as_json)


@command()
@build_argument
@click.option("--seq-len", type=click.IntRange(min=1), required=True, help="Positions per sequence, T.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, help="Sequences per step, G.")
@click.option("--split", default="train", help="train or val.")
@mask_option
@click.option(
    "--long",
    type=click.Choice(["error", "drop", "truncate"]),
    default="error",
    help="What pack and pad do with documents of more than T + 1 tokens.",
)
@click.option("--seed", type=int, default=42, help="Seed of the order of sequences in pack and pad.")
@json_option
def plan(path: Path, seq_len: int, as_json: bool, **options: Any) -> None:
    """Print sequences, steps, padding and targets of an epoch.

    A second table compares all layouts at several sequence lengths.

    Examples:
      chatdata plan out/demo-sft --seq-len 512
      chatdata plan out/demo-sft --seq-len 512 --mask last-turn --json
    """
    from chatdata import open_build
    from chatdata.look.what_if import plan_numbers, show_plan

    numbers = plan_numbers(open_build(path), seq_len, **options)
    say_json(numbers) if as_json else show_plan(numbers)
