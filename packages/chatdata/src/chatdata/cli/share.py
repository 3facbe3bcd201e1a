"""Commands that hand a build on: `chatdata push`, `pull`, `export`."""

import shutil
import tomllib
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, build_argument, choice, command, expect_option, json_option, mask_option, tell
from chatdata.errors import UsageError
from chatdata.progress import shown_progress


@command()
@build_argument
@click.argument("address")
@json_option
def push(path: Path, address: str, as_json: bool) -> None:
    """Upload a build to ADDRESS.

    ADDRESS is a dataset repository on the Hub, hf://datasets/OWNER/NAME[@BRANCH] (log in with `hf auth login`), or a
    folder of a store that fsspec has a package for (s3://…, gs://…). A repository that does not exist is made, a
    private one. The Hub gets one commit, with a card made from the manifest; elsewhere the manifest comes last. Run an
    interrupted push again to resume it.

    Examples:
      chatdata push out/mid hf://datasets/OWNER/NAME
      chatdata push out/mid s3://BUCKET/mid
    """
    from chatdata import open_build
    from chatdata.look.card import card
    from chatdata.shards.address import push as run_push

    build = open_build(path)
    with shown_progress(quiet=as_json) as progress:
        facts = run_push(path, build.manifest, address, card(build.manifest, address), progress)
    text = "{address}: build {build_id:.12}, {bytes:,} bytes".format(**facts)
    tell(facts, [text + ", removed ".join(["", *facts["removed"]])], as_json)


@command()
@click.argument("address")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
@expect_option
@json_option
def pull(address: str, out: Path, expect: str | None, as_json: bool) -> None:
    """Copy the build at ADDRESS to a folder, without its card.

    Commands that read a build take an ADDRESS themselves; then it is only fetched into the cache.

    Examples:
      chatdata pull hf://datasets/OWNER/NAME --out out/mid
      chatdata pull s3://BUCKET/mid --out out/mid --expect 0123456789ab
    """
    from chatdata.build.run import new_folder
    from chatdata.shards.address import local_build
    from chatdata.shards.manifest import build_files
    from chatdata.shards.read import open_build

    with new_folder(out) as growing:
        build = open_build(local_build(address, expect, quiet=as_json))
        for _, file, _ in build_files(build.path, build.manifest):
            if file.is_file():
                copy = growing / file.relative_to(build.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copy2(file, copy)
    build_id = build.manifest["build_id"]
    tell({"out": str(out), "build_id": build_id}, [f"{out}: build {build_id[:12]}"], as_json)


@command()
@build_argument
@choice("--to", "datasets", "olmo", "megatron", "llmc", required=True, help="Whose files to write.")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
@mask_option
@click.option("--extra-columns", is_flag=True, help="datasets: put task, name, row and doc into the rows.")
@click.option("--arrow", is_flag=True, help="datasets: write what load_from_disk reads, not Parquet.")
@json_option
def export(path: Path, to: str, out: Path, mask: Any, as_json: bool, **options: bool) -> None:
    """Write a build as another trainer's files: a folder per split, and the tokenizer.

    Prints what the files do not hold, and the settings that the trainer needs.

    Examples:
      chatdata export out/demo-sft --to datasets --out out/rows
      chatdata export out/demo-sft --to megatron --mask last-turn --out out/megatron
    """
    from chatdata import open_build
    from chatdata.build.run import new_folder
    from chatdata.packing.epoch import STAGE_MASKS
    from chatdata.shards.export import export_build

    if any(options.values()) and to != "datasets":
        raise UsageError("--extra-columns and --arrow go with --to datasets")
    if mask and to == "llmc":
        raise UsageError("--to llmc takes no --mask: its files have none")
    build = open_build(path)
    mask = mask or ("ignore" if to == "llmc" else STAGE_MASKS[build.manifest["stage"]])
    with new_folder(out) as growing, shown_progress(quiet=as_json) as progress:
        splits = export_build(build, to, growing, mask, progress, **(options if to == "datasets" else {}))
    ids, vocab_size = (build.manifest["tokenizer"][key] for key in ("special_ids", "vocab_size"))
    bos, eos = (ids.get(name, "(the model's)") for name in ("<|bos|>", "<|assistant_end|>"))
    texts = tomllib.loads(Path(__file__).with_name("export_notes.toml").read_text(encoding="utf-8"))
    notes = texts[to].format(vocab_size=vocab_size, bos=bos, eos=eos).splitlines()
    counts = "{documents:,} documents, {tokens:,} tokens, {supervised:,} supervised"
    lines = [f"{out / name}: {counts.format(**split)} ({mask})" for name, split in splits.items()]
    facts = {"out": str(out), "to": to, "mask": mask, "splits": splits, "notes": notes}
    tell(facts, [*lines, *notes], as_json)
