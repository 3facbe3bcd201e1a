"""The command line. Heavy imports are inside the functions that need them, to keep `--help` fast."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, program, run_command, task_files_option
from chatdata.disk import naming
from chatdata.progress import say, say_json

POSITIVE, NOT_NEGATIVE = click.IntRange(min=1), click.IntRange(min=0)


cli = program(
    "chateval",
    "Score chat models trained on chatdata builds, item by item, with confidence intervals and paired comparison.",
)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


sampling_options = together(
    click.option("--top-k", type=POSITIVE, help="Draw from the K most likely tokens only."),
    click.option("--max-new-tokens", type=POSITIVE, default=512, help="Longest answer."),
    click.option("--seed", type=int, default=42, help="Random seed of draws."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on cuda."),
    click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), help="Default: cuda if available."),
)
scoring_options = together(
    click.option("--tasks", required=True, metavar="A,B", help="Names from `chateval tasks`."),
    click.option("--data-dir", type=FILE, help="Folder with clones of Hub datasets."),
    click.option("--words", metavar="FILE|URL", help="Word list for the spelling tasks."),
    task_files_option,
    click.option("--limit", type=POSITIVE, help="Only the first N rows of each task."),
    click.option("--batch-size", type=POSITIVE, default=32, help="Questions per batch."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0 picks the most likely token."),
    click.option("--draws", type=POSITIVE, default=1, help="Answers per generated question."),
    sampling_options,
    click.option("--allow-code", is_flag=True, help="Run programs that the model writes, in a sandbox."),
    click.option("--firewall", type=FILE, help="A build's firewall.json: score items it was trained on separately."),
)


@cli.command()
@click.option("--checkpoint", type=FILE, required=True, help="A run folder, a checkpoint, or a transformers export.")
@scoring_options
@click.option("--out", type=FILE, help="Results folder, one per set of tasks (default: scores/<hash of the weights>).")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def run(**options: Any) -> None:
    """Score a checkpoint. Run the same command again to continue an interrupted run.

    Examples:
      chateval run --checkpoint runs/sft --tasks mmlu,arc_easy,gsm8k --data-dir data --out scores/sft
      chateval run --checkpoint runs/sft --tasks spelling_bee --words words.txt --limit 100
      chateval run --checkpoint runs/sft --tasks humaneval --data-dir data --allow-code
      torchrun --nproc-per-node 8 -m chateval run --checkpoint runs/sft --tasks mmlu --data-dir data
    """
    from chatdata.look.console import console
    from chatdata.progress import shown_progress
    from chateval.ask.run import score
    from chateval.ask.subject import load_subject
    from chateval.results.report import show_results, write_report
    from chattrain.run.start import join_ranks

    settings = _scoring_settings(options)
    # ranks only meet at the start and the end, and one may have hours of work left when another is done
    with join_ranks(options["device"], timedelta(days=7)) as ranks:
        subject = load_subject(options["checkpoint"], ranks.device, options["dtype"])
        settings = settings._replace(out=settings.out or Path("scores") / subject.weights_sha256[:12])
        with shown_progress(quiet=not ranks.is_first) as progress:
            score(subject, settings, ranks, progress)
        if not ranks.is_first:
            return
    results = write_report(settings.out)
    if options["as_json"]:
        say_json(results.to_json())
        return
    console().print(show_results(results))
    say(f"{settings.out}: report.md")


def _scoring_settings(options: dict[str, Any]) -> Any:
    from chateval.ask.generate import Sampling
    from chateval.ask.run import ScoringSettings

    names = tuple(name.strip() for name in options["tasks"].split(",") if name.strip())
    if not names:
        raise click.UsageError("--tasks is empty; `chateval tasks` lists them")
    if options["draws"] > 1 and options["temperature"] == 0:
        raise click.UsageError("--draws needs a --temperature above 0, because at 0 all draws are the same")
    sampling = Sampling(options["temperature"], options["top_k"], options["max_new_tokens"], options["seed"])
    passed = ("out", "data_dir", "words", "task_files", "limit", "batch_size", "draws", "allow_code", "firewall")
    return ScoringSettings(names, sampling=sampling, **{key: options[key] for key in passed})


@cli.command()
@click.argument("run_folder", metavar="RUN", type=FILE)
@scoring_options
@click.option("--out", type=FILE, required=True, help="Folder for the scores: a results folder per checkpoint.")
@click.option("--once", is_flag=True, help="Score the checkpoints that exist, then end.")
@click.option("--json", "as_json", is_flag=True, help="Print the results of each checkpoint as a line of JSON.")
def watch(run_folder: Path, device: str | None, dtype: str | None, once: bool, as_json: bool, **options: Any) -> None:
    """Score each checkpoint of a run as it appears, and draw score against step. Run it again after an interruption.

    It ends when the run's last step is scored, and waits for a run that was stopped or has not started.

    Examples:
      chateval watch runs/sft --tasks gsm8k,mmlu --data-dir data --limit 200 --out scores/sft-steps
      chateval watch runs/sft --tasks spelling_bee --words words.txt --out scores/sft-steps --once
    """
    from chateval.ask.subject import load_subject
    from chateval.ask.watch import watch as watch_run
    from chateval.results.report import results_line
    from chattrain.run.start import find_device

    load = partial(load_subject, device=find_device(device), dtype=dtype)
    for results in watch_run(run_folder, _scoring_settings(options), load, once):
        say_json(results.to_json()) if as_json else say(results_line(results))


@cli.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--examples", "num_examples", type=NOT_NEGATIVE, default=2, help="Items to show, gained and lost each.")
@click.option("--markdown", type=FILE, help="Also write the comparison to this Markdown file.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(a: Path, b: Path, num_examples: int, markdown: Path | None, as_json: bool) -> None:
    """Compare two results folders on the questions they share: what does B answer better or worse than A?

    Examples:
      chateval compare scores/mid scores/sft
      chateval compare scores/mid scores/sft --json
    """
    from chatdata.look.console import console
    from chateval.results.compare import compare as compare_results
    from chateval.results.report import markdown_comparison, show_comparison

    comparison = compare_results(a, b, num_examples)
    if markdown is not None:
        with naming(markdown):
            markdown.write_text(markdown_comparison(comparison), encoding="utf-8")
    say_json(comparison.to_json()) if as_json else console().print(show_comparison(comparison))


@cli.command()
@click.option("--checkpoint", type=FILE, required=True, help="A run folder, a checkpoint, or a transformers export.")
@click.option("--say", "says", multiple=True, metavar="TEXT", help="Send this, print the answer and exit (repeatable).")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.6, help="0 picks the most likely token.")
@sampling_options
def chat(checkpoint: Path, says: tuple[str, ...], device: str | None, dtype: str | None, **options: Any) -> None:
    """Chat with a checkpoint and see its tool calls. Ctrl-C ends an answer, /quit or Ctrl-D the chat; see /help.

    Examples:
      chateval chat --checkpoint runs/sft
      chateval chat --checkpoint runs/sft --say 'Hi!'
    """
    from chateval.ask.generate import Sampling
    from chateval.ask.subject import load_subject
    from chateval.chat import converse
    from chattrain.run.start import find_device

    subject = load_subject(checkpoint, find_device(device), dtype)
    converse(subject, Sampling(**options), says)


@cli.command()
@click.option("--checkpoint", type=FILE, required=True, help="A run folder, a checkpoint, or a transformers export.")
@click.option("--host", default="127.0.0.1", help="Address to listen on. One that others can reach needs a --token.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, help="0 takes any that is free.")
@click.option("--token", envvar="CHATEVAL_TOKEN", show_envvar=True, help="Clients must send it as their API key.")
@click.option("--batch-size", type=POSITIVE, default=64, help="Answers at once.")
@click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), help="Default: cuda if available.")
def serve(**options: Any) -> None:
    """Serve a checkpoint to OpenAI clients, and a chat page to browsers.

    Examples:
      chateval serve --checkpoint runs/sft
      chateval serve --checkpoint runs/sft --port 8001 --device cuda
    """
    from importlib.util import find_spec

    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise click.ClickException("serve needs starlette and uvicorn: `uv sync --extra serve` installs them")
    from chateval.serve.app import serve as serve_with

    serve_with(**options)


@cli.command(name="tasks")
@task_files_option
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_tasks(task_files: tuple[Path, ...], as_json: bool) -> None:
    """List the tasks that a checkpoint can be scored on."""
    from chatdata.look.console import table
    from chatdata.tasks.task import load_tasks

    rows = []
    for task in load_tasks(task_files).values():
        for name, scored in task.scoring.sets.items() if task.scoring else ():
            kind = "letters" if task.scoring.letters else "code" if task.scoring.program else "generated"
            num_rows = scored.rows or task.splits.get(scored.subset, {}).get(scored.split, 0)
            row = {"name": name, "kind": kind, "chance": scored.chance}
            rows.append(row | {"rows": num_rows, "summary": task.summary})
    cells = [list(row.values()) for row in rows]
    say_json(rows) if as_json else table("scored tasks", list(rows[0]), cells)


INTERRUPTED = "interrupted; the same command continues where it stopped"
main = partial(run_command, cli, "chateval", INTERRUPTED, only="run watch")
