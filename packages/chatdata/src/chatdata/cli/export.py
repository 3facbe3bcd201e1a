"""`chatdata export`."""

import tomllib
from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, MaskPolicyChoice, build_argument, choice, command, json_option, tell
from chatdata.errors import UsageError
from chatdata.progress import shown_progress


@command()
@build_argument
@choice("--to", "datasets", "olmo", "megatron", "llmc", required=True, help="Whose files to write.")
@click.option("--out", type=FILE, required=True, help="Folder to write.")
@click.option("--mask", "policy", type=MaskPolicyChoice(), help="Mask policy (default: the stage's).")
@click.option("--extra-columns", is_flag=True, help="datasets: put task, name, row and doc into the rows.")
@click.option("--arrow", is_flag=True, help="datasets: write what load_from_disk reads, not Parquet.")
@json_option
def export(path: Path, to: str, out: Path, policy: Any, as_json: bool, **options: bool) -> None:
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
    if policy and to == "llmc":
        raise UsageError("--to llmc takes no --mask: its files have none")
    build = open_build(path)
    policy = policy or ("ignore" if to == "llmc" else STAGE_MASKS[build.manifest["stage"]])
    with new_folder(out) as growing, shown_progress(quiet=as_json) as progress:
        splits = export_build(build, to, growing, policy, progress, **(options if to == "datasets" else {}))
    ids, vocab_size = (build.manifest["tokenizer"][key] for key in ("special_ids", "vocab_size"))
    bos, eos = (ids.get(name, "(the model's)") for name in ("<|bos|>", "<|assistant_end|>"))
    texts = tomllib.loads(Path(__file__).with_name("export_notes.toml").read_text(encoding="utf-8"))
    notes = texts[to].format(vocab_size=vocab_size, bos=bos, eos=eos).splitlines()
    counts = "{documents:,} documents, {tokens:,} tokens, {supervised:,} supervised"
    lines = [f"{out / name}: {counts.format(**split)} ({policy})" for name, split in splits.items()]
    facts = {"out": str(out), "to": to, "mask": policy, "splits": splits, "notes": notes}
    tell(facts, [*lines, *notes], as_json)
