"""Commands that compare: `chatdata check` checks files, `verify` a build; `diff` compares two builds."""

import gc
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, build_argument, command, json_option
from chatdata.errors import UsageError
from chatdata.progress import say, say_json


@command()
@build_argument
@click.option(
    "--level", type=click.Choice(["quick", "full", "semantic"]), default="quick", help="How much to check (see above)."
)
@click.option("--recipe", metavar="NAME|FILE", help="semantic: the build's recipe file, if it names other files.")
@click.option("--data-dir", type=FILE, help="semantic: folder of Hub clones, as for build.")
@click.option("--identity", type=FILE, help="semantic: the identity file, if build was given one.")
@click.option("--words", metavar="FILE|URL", help="semantic: the word list, if build was given one.")
@click.option("--task-file", type=FILE, multiple=True, help="semantic: as for build.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    help="semantic: share of the documents to render again, at least 100 per split and 1 per entry.  [default: 0.01]",
)
@json_option
def verify(path: Path, level: str, as_json: bool, **given: Any) -> int:
    """Check a build on disk. Exit code 3 if anything is wrong.

    \b
    quick     manifest, sizes and headers, SHA-256 of offsets, index and tokenizer, counts: whoever opens
              a build checks the same
    full      also SHA-256 of tokens and mask, unknown files, contract of every document
    semantic  also the sources, the order of the mixture, and a share of the documents rendered again

    semantic needs the files that are neither shipped nor on the Hub: pass --data-dir, --identity, --words and
    --task-file as you did for build, and --recipe if the recipe file names other files. Everything else is in the
    build.

    Examples:
      chatdata verify out/demo-mid
      chatdata verify out/demo-mid --level semantic --share 0.1
      chatdata verify out/mid --level semantic --data-dir hub --identity me.jsonl
    """
    from chatdata.check.verify import verify_full, verify_quick
    from chatdata.progress import shown_progress

    unused = [name for name, value in given.items() if value not in (None, ())]
    if unused and level != "semantic":
        raise UsageError(f"--{unused[0].replace('_', '-')} goes with --level semantic")
    if given["data_dir"] and not given["data_dir"].is_dir():
        raise UsageError(f"--data-dir {given['data_dir']}: no such folder")
    with shown_progress(quiet=as_json or level == "quick") as progress:
        if level == "quick":
            problems = verify_quick(path)
        elif level == "full":
            problems = verify_full(path, progress)
        else:
            from chatdata.check.rerender import verify_semantic
            from chatdata.recipe import load_recipe
            from chatdata.sources.find import Locations
            from chatdata.tasks.task import load_tasks

            tasks = load_tasks(given["task_file"])
            loaded = load_recipe(given["recipe"], tasks) if given["recipe"] else None
            locations = Locations(Path(), given["data_dir"], given["identity"], given["words"])
            share = 0.01 if given["share"] is None else given["share"]
            problems = verify_semantic(path, locations, tasks, recipe=loaded, share=share, progress=progress)
    if as_json:
        say_json({"build": str(path), "level": level, "problems": problems})
    else:
        for problem in problems:
            say(problem, error=True)
        found = f"{len(problems):,} problem{'s'[: len(problems) != 1]}" if problems else "no damage found"
        say(f"{path}: {found} ({level})")
    return 3 if problems else 0


@command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=FILE)
@json_option
def check(files: tuple[Path, ...], as_json: bool) -> int:
    """Find the rows of conversation files that no build can use. Exit code 3 if there are any.

    Reads every row of JSONL, JSON and Parquet files as a build would. Bad rows are listed by reason, with their line
    (or row); --json lists all of them.

    Examples:
      chatdata check chats.jsonl more.parquet
      chatdata check chats.jsonl --json
    """
    from chatdata.check.files import check_files, lines_of_check
    from chatdata.progress import shown_progress

    gc.set_threshold(100_000)  # rows are parsed into a hundred objects each, without cycles: a fifth of the time
    with shown_progress(quiet=as_json) as progress:
        found = check_files(files, progress)
    if as_json:
        say_json(found)
    for line in [] if as_json else lines_of_check(found):
        say(line)
    return 3 if found["rows"] else 0


@command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@json_option
def diff(a: Path, b: Path, as_json: bool) -> int:
    """Print how two builds differ.

    Compares recipe, sources, tokenizer, mixture and documents. Exit code 0 if the builds are identical, 1 if they
    differ. Documents are compared by the digests in the index. For rows whose tokens or mask changed, the first ones
    are shown around the first difference.

    Examples:
      chatdata diff out/mid out/mid-new
      chatdata diff out/mid out/mid-new --json
    """
    from chatdata import open_build
    from chatdata.check.diff import diff_builds, lines_of

    found = diff_builds(open_build(a), open_build(b))
    if as_json:
        say_json(found)
    else:
        for line in lines_of(found):
            say(line)
    return 0 if found["identical"] else 1
