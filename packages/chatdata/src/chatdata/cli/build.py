"""`chatdata build`: the options, and the steps from them to a build."""

import gc
import json
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, choice, command, json_option, task_files_option, tokenizer_of
from chatdata.disk import write_whole
from chatdata.errors import UsageError
from chatdata.progress import say, say_json, shown_progress

NO_TOKENIZER = (
    "no tokenizer given: pass --tokenizer with a tokenizer.json, nanochat's tokenizer.pkl, a .tiktoken "
    "file or a build; make one with `chatdata tokenizer train`; or use --demo, which trains its own"
)


@command()
@click.argument("files", nargs=-1, type=FILE, metavar="[FILE]...")
@choice("--stage", "mid", "sft", "base", help="Stage to build (default: the recipe's; of FILEs sft).")
@click.option(
    "--val",
    "val_share",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the FILEs' rows to keep for validation, chosen by a hash of their content.",
)
@click.option("--write-recipe", type=FILE, help="Write the equivalent recipe to this file.")
@click.option("--recipe", metavar="NAME|FILE", help="Name of a recipe, or a TOML file (default: the stage's).")
@click.option("--demo", is_flag=True, help="Build shipped and generated data with a small tokenizer; no downloads.")
@click.option("--data-dir", type=FILE, help="Folder of Hub clones: DIR/<owner>/<name>/….")
@click.option("--tokenizer", type=FILE, help="tokenizer.json, tokenizer.pkl, .tiktoken, a tokenizer folder or a build.")
@click.option("--identity", type=FILE, help="Conversations for the recipe's identity entries (JSONL).")
@click.option("--words", metavar="FILE|URL", help="Word list for the spelling tasks.")
@task_files_option
@click.option("--out", type=FILE, help="Folder to write (default: out/<recipe>).")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that render (default: one per core).")
@choice("--engine", "local", "ray", default="local", help="Where to render.")
@click.option(
    "--encoder",
    type=click.Choice(["auto", "tiktoken", "fastokens", "gigatoken"]),
    default="auto",
    help="Library that encodes text; the ids are always tiktoken's. auto takes the fastest.",
)
@click.option(
    "--chat-format",
    metavar="NAME",
    help="Chat format of another model: a name that `renderers` has (qwen3, llama-3, ...), or template for the chat "
    "template in the folder --tokenizer. (default: the recipe's)",
)
@click.option("--limit", type=click.IntRange(min=1), help="Read at most this many rows per entry.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Longest document (default: the recipe's).")
@choice("--overflow", "keep", "truncate", "drop", "error", help="What happens to longer ones.")
@choice("--invalid", "error", "drop", help="What happens to rows that cannot be used.")
@click.option(
    "--decontaminate",
    type=click.Choice(["report", "drop", "off"]),
    default="report",
    help="Training rows that hold scored items: list them in OUT/firewall.json, also drop them, or do not search.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="FILE[:QUESTION[,CHOICES...]]",
    help="Your own test items (JSONL, Parquet), to be searched for like those that chateval scores. Keys of their "
    "question (default: question, problem or prompt) and choices (default: choices, if there).",
)
@click.option("--dry-run", is_flag=True, help="Only print the plan, and estimate tokens, bytes and seconds.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a build.")
@json_option
def build(files: tuple[Path, ...], stage: str | None, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Render a recipe, or your own FILEs, to token and mask shards.

    Examples:
      chatdata build --stage mid --demo --out out/demo-mid
      chatdata build chats.jsonl more.parquet --tokenizer tokenizer.json --val 0.05 --out out/mine
      chatdata build --stage mid --data-dir hub --tokenizer tokenizer.pkl --identity me.jsonl --out out/mid
      chatdata build --stage sft --recipe my.toml --tokenizer out/mid --out out/sft
      chatdata build --stage mid --demo --against exam.jsonl:question,options --decontaminate drop
    """
    from chatdata.build import engines, estimate, own_files, plan, run
    from chatdata.demo.tokenizer import demo_tokenizer
    from chatdata.look import build as look
    from chatdata.recipe import NATIVE, load_recipe
    from chatdata.sources.find import Locations
    from chatdata.tasks.task import load_tasks

    tasks = load_tasks(given["task_files"])
    recipe, demo, tokenizer, limit = (given[key] for key in ("recipe", "demo", "tokenizer", "limit"))
    for key, flag in (("val_share", "--val"), ("write_recipe", "--write-recipe")):
        if given[key] is not None and not files:
            raise UsageError(f"{flag} is for FILEs: chatdata build chats.jsonl … {flag} {given[key]}")
    for wrong, message in (
        (files and (recipe or demo), f"give FILEs or {'--recipe' if recipe else '--demo'}, not both"),
        (not (files or recipe or stage), "give FILEs, --stage mid|sft|base, or --recipe NAME|FILE"),
        (demo and stage == "base" and not recipe, "--demo has the stages mid and sft, not base"),
    ):
        if wrong:
            raise UsageError(message)
    rules = {key: given[key] for key in ("max_tokens", "overflow", "invalid", "chat_format")}
    if files:
        paths = (files, given["write_recipe"])
        loaded, text = own_files.equivalent_recipe(*paths, stage or "sft", given["val_share"], tasks, **rules)
    else:
        loaded, text = load_recipe(recipe or (f"demo-{stage}" if demo else str(stage)), tasks, **rules), ""
    locations = Locations(loaded.folder, given["data_dir"], given["identity"], given["words"])
    entries = [entry for split in loaded.splits.values() for entry in split]
    num_paths = len({entry.path for entry in entries if entry.task == "identity"})
    has_words = any("words" in tasks[entry.task].options for entry in entries)
    identity, data_dir, chat_format = locations.identity, locations.data_dir, loaded.chat_format
    own, needs = f'the recipe "{loaded.name}"', "needs --tokenizer with the model's tokenizer folder"
    for wrong, message in (
        (stage and loaded.stage != stage, f"--stage {stage}, but {own} is for stage {loaded.stage}"),
        (identity and not num_paths, f"--identity is given, but {own} has no identity entry"),
        (identity and num_paths > 1, f"--identity is given, but the identity entries have {num_paths} different paths"),
        (locations.words and not has_words, f"--words is given, but {own} has no task with a word list"),
        (data_dir and demo and not recipe, "--data-dir is given, but --demo reads no data"),
        (data_dir and not data_dir.is_dir(), f"--data-dir {data_dir}: no such folder"),
        (chat_format != NATIVE and not tokenizer, f"--chat-format {chat_format} {needs}"),
        (not (demo or tokenizer), NO_TOKENIZER),
    ):
        if wrong:
            raise UsageError(message)
    out, workers = given["out"] or Path("out") / loaded.name, given["workers"] or engines.available_cpus()
    if not dry_run:
        run.check_out(out, given["force"])
    if workers > 1 and given["engine"] == "local" and not (dry_run or demo or limit):
        engines.start_early()
    used_tokenizer = tokenizer_of(tokenizer, chat_format=chat_format) if tokenizer else demo_tokenizer()
    planned = plan.make_build_plan(loaded, tasks, used_tokenizer, locations, limit)
    if given["write_recipe"]:
        write_whole(given["write_recipe"], text.encode())
    forms = {source: own_files.form_of(source) for source in planned.sources} if files else {}
    about = estimate.estimate(planned, workers, given["encoder"]) if dry_run else {}
    if not as_json:
        for line in text.splitlines():
            say(line)
        look.show_plan(planned, out, forms, about)
    elif dry_run:
        splits: dict[str, list[dict[str, Any]]] = {split: [] for split in planned.splits}
        for split, of_split in planned.splits.items():
            for e, tokens in zip(of_split, about.pop(split), strict=True):
                facts = {"entry": e.entry.label, "source": e.source.name, "rows": len(e.taken), "tokens": tokens}
                splits[split].append(facts)
        say_json({"out": str(out), "recipe": loaded.name, "stage": loaded.stage, "about": about, "splits": splits})
    if dry_run:
        return
    gc.freeze()  # 370,000 words and 65,536 tokens stay; without this each full collection visits them, 0.2 s in all
    options = {key: given[key] for key in ("force", "engine", "encoder", "decontaminate", "against")}
    with shown_progress(quiet=as_json) as progress:
        manifest = run.build(planned, out, workers=workers, progress=progress, **options)
    if as_json:
        say_json({"out": str(out), "build_id": manifest["build_id"], "splits": manifest["splits"]})
    else:
        look.show_result(manifest, json.loads((out / "report.json").read_text()), out)
