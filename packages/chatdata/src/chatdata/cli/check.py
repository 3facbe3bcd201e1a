"""Commands that compare: `check` checks files, `verify` a build, `reproduce` makes it again, `diff` compares two."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, build_argument, choice, command, json_option, tell
from chatdata.errors import UsageError
from chatdata.progress import say, shown_progress


def _source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where sources are that a build does not name; `_sources` reads them."""
    for option in (
        click.option("--task-file", type=FILE, multiple=True, help="As for build."),
        click.option("--words", metavar="FILE|URL", help="The word list, if build was given one."),
        click.option("--identity", type=FILE, help="The identity file, if build was given one."),
        click.option("--data-dir", type=FILE, help="Folder of Hub clones, as for build."),
        click.option("--recipe", metavar="NAME|FILE", help="The build's recipe file, if it names other files."),
    ):
        function = option(function)
    return function


def _sources(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `verify_semantic` and `reproduce` that say where sources are."""
    from chatdata.sources.find import Locations
    from chatdata.tasks.task import load_tasks

    if given["data_dir"] and not given["data_dir"].is_dir():
        raise UsageError(f"--data-dir {given['data_dir']}: no such folder")
    locations = Locations(Path(), given["data_dir"], given["identity"], given["words"])
    return {"locations": locations, "tasks": load_tasks(given["task_file"]), "recipe": given["recipe"]}


def _tell(path: Path, said: str, problems: list[str], as_json: bool, **facts: Any) -> int:
    """Print what was found out about a build. The exit code."""
    for problem in [] if as_json else problems:
        say(problem, error=True)
    tell({"build": str(path), **facts, "problems": problems}, [f"{path}: {said}"], as_json)
    return 3 if problems else 0


@command()
@build_argument
@choice("--level", "quick", "full", "semantic", default="quick", help="How much to check (see above).")
@_source_options
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

    unused = [name for name, value in given.items() if value not in (None, ())]
    if unused and level != "semantic":
        raise UsageError(f"--{unused[0].replace('_', '-')} goes with --level semantic")
    with shown_progress(quiet=as_json or level == "quick") as progress:
        if level == "quick":
            problems = verify_quick(path)
        elif level == "full":
            problems = verify_full(path, progress)
        else:
            from chatdata.check.rerender import verify_semantic

            share = 0.01 if given["share"] is None else given["share"]
            problems = verify_semantic(path, **_sources(given), share=share, progress=progress)
    found = f"{len(problems):,} problem{'s'[: len(problems) != 1]}" if problems else "no damage found"
    return _tell(path, f"{found} ({level})", problems, as_json, level=level)


@command()
@build_argument
@click.option("--out", type=FILE, help="Folder to write the new build to.")
@click.option("--sample", metavar="SHARE", type=click.FloatRange(0, 1), help="Render only this share; write nothing.")
@_source_options
@click.option("--against", multiple=True, metavar="FILE", help="Test items, if rows that hold them were dropped.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that render (default: one per core).")
@json_option
def reproduce(path: Path, out: Path | None, sample: float | None, as_json: bool, **given: Any) -> int:
    """Make a build again from its manifest and compare the two. Exit code 3 if they differ.

    The build has the recipe, the commits of Hub datasets, which are downloaded, and the tokenizer. Pass files that only
    you have as for verify --level semantic. The new build is "equal to the byte" or "equal in every value"; otherwise
    the first source, document and token that differ are shown. --sample checks the sources and the order of all
    documents, and renders a share of them again, as verify --level semantic does.

    Examples:
      chatdata reproduce out/demo-mid --out out/again
      chatdata reproduce out/mid --out out/again --data-dir hub --identity me.jsonl --workers 8
      chatdata reproduce out/mid --sample 0.1 --data-dir hub --identity me.jsonl
    """
    from chatdata.build.engines import available_cpus
    from chatdata.check.reproduce import reproduce as run_reproduce
    from chatdata.check.rerender import verify_semantic
    from chatdata.shards.manifest import read_manifest

    if (out is None) == (sample is None) or (sample is not None and (given["against"] or given["workers"])):
        raise UsageError("give --out FOLDER (with --against, --workers), or --sample SHARE")
    read_manifest(path)  # raises if there is no build at all
    with shown_progress(quiet=as_json) as progress:
        if out is None:
            problems = verify_semantic(path, **_sources(given), share=sample or 0, progress=progress)
            result = "not equal" if problems else "equal in sources, order and what was rendered again"
        else:
            options = {"against": given["against"], "workers": given["workers"] or available_cpus()}
            result, problems = run_reproduce(path, out, **_sources(given), **options, progress=progress)
    return _tell(path, result, problems, as_json, out=out and str(out), result=result)


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

    gc.set_threshold(100_000)  # rows are parsed into a hundred objects each, without cycles: a fifth of the time
    with shown_progress(quiet=as_json) as progress:
        found = check_files(files, progress)
    tell(found, lines_of_check(found), as_json)
    return 3 if found["rows"] else 0


@command()
@click.argument("a")
@click.argument("b")
@json_option
def diff(a: str, b: str, as_json: bool) -> int:
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
    tell(found, lines_of(found), as_json)
    return 0 if found["identical"] else 1
