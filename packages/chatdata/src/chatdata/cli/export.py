"""`chatdata export`."""

from pathlib import Path
from typing import Any

import click

from chatdata.cli.command import FILE, MaskPolicyChoice, build_argument, check_free, command, json_option
from chatdata.errors import UsageError
from chatdata.progress import say, say_json, shown_progress

NOTES = {  # what the files do not hold, and what their reader must be told
    "datasets": """roles of spans are left out; task, name, row and doc are in documents/, one row for each row,
unless --extra-columns put them into the rows, which LLaMA-Factory then refuses
TRL cuts rows at max_length, by default 1,024 tokens: SFTConfig(max_length=None)""",
    "olmo": """task, name, row and roles of spans are left out
OLMo-core needs TokenizerConfig(vocab_size={vocab_size}, eos_token_id={eos}, bos_token_id={bos}, pad_token_id={eos}).
It guesses where documents end unless NumpyPackedFSLDatasetConfig has use_array_if_local=False or, for its other
data sets, OLMO_DATA_PREP_USE_ARRAY_IF_LOCAL=false is in the environment""",
    "megatron": """task, name, row and roles of spans are left out; <split>_mask_document is the mask as a data set of
its own: read with the same seed, sequence length and number of sequences, its labels are the mask of the targets
leave tokenizer.pad undefined: Megatron takes all tokens of that id out of the loss""",
    "llmc": """llm.c has no mask (every token is a target), no boundaries of documents, no task, name and row
its C programs take at most 65,536 tokens in the vocabulary (here: {vocab_size:,}), and files of at least
B * T * processes + 1 tokens""",
}


@command()
@build_argument
@click.option("--to", type=click.Choice(list(NOTES)), required=True, help="Whose files to write.")
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
    from chatdata.build.run import NOTHING_WRITTEN, partial_folder, publish
    from chatdata.disk import check_replaceable, writes_to
    from chatdata.packing.epoch import STAGE_MASKS
    from chatdata.shards.export import export_build

    if any(options.values()) and to != "datasets":
        raise UsageError("--extra-columns and --arrow go with --to datasets")
    if policy and to == "llmc":
        raise UsageError("--to llmc takes no --mask: its files have none")
    check_free(out)
    check_replaceable(out)
    build, out = open_build(path), out.resolve()
    policy = policy or ("ignore" if to == "llmc" else STAGE_MASKS[build.manifest["stage"]])
    with writes_to(out, NOTHING_WRITTEN), partial_folder(out) as growing, shown_progress(quiet=as_json) as progress:
        splits = export_build(build, to, growing, policy, progress, **(options if to == "datasets" else {}))
        check_free(out)
        publish(growing, out)
    ids, vocab_size = (build.manifest["tokenizer"][key] for key in ("special_ids", "vocab_size"))
    bos, eos = (ids.get(name, "(the model's)") for name in ("<|bos|>", "<|assistant_end|>"))
    notes = NOTES[to].format(vocab_size=vocab_size, bos=bos, eos=eos).splitlines()
    if as_json:
        say_json({"out": str(out), "to": to, "mask": policy, "splits": splits, "notes": notes})
        return
    counts = "{documents:,} documents, {tokens:,} tokens, {supervised:,} supervised"
    for line in (*(f"{out / name}: {counts.format(**split)} ({policy})" for name, split in splits.items()), *notes):
        say(line)
