"""The same model and the same documents give the same loss through chattrain and through the readers of every export.

    uv run python benchmarks/peers/certificate.py out/demo-sft WORK

A small model with random weights is exported to transformers, and BUILD in every format that holds a mask. Mean loss of
the targets over the whole split, in nats: by chattrain from the build; by TRL's trainer from the data set; by
transformers from what OLMo-core (in an environment of its own, see read_olmo.py) and megatron-core read. Fails unless
targets are equal, and losses to 1e-6.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from chatdata.packing.epoch import plan_epoch
from chatdata.progress import no_progress
from chatdata.shards.export import export_build
from chatdata.shards.read import Build, Split, open_build
from chattrain.attention import pack_sequences
from chattrain.batches import IGNORED, read_rows
from chattrain.loss import chunked_loss
from chattrain.model import ModelConfig, load_model, parameter_shapes
from chattrain.nanochat.export import export_transformers

Documents = Iterable[tuple[np.ndarray, np.ndarray]]  # tokens and mask of each
Weights = dict[str, torch.Tensor]
BATCH = 16  # documents at once
TOLERANCE = 1e-6


@dataclass
class Row:
    """What one reader found: the number of documents and targets, and the mean loss of the targets."""

    reader: str
    documents: int
    targets: int
    loss: float


def small_model(split: Split, folder: Path) -> tuple[ModelConfig, Weights]:
    """A model that takes the split's longest document, exported to `folder`. Nothing about it is trained."""
    about = split.build.manifest["tokenizer"]
    longest = int(np.diff(split.offsets).max())
    config = ModelConfig(longest, about["vocab_size"], n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in parameter_shapes(config).items()}
    ends = (about["special_ids"][name] for name in ("<|bos|>", "<|assistant_end|>"))
    export_transformers(weights, config, folder, *ends, tokenizer_dir=split.build.path / "tokenizer")
    return config, weights


@torch.no_grad()
def by_chattrain(split: Split, config: ModelConfig, weights: Weights, layout: str) -> Row:
    """From the build's own shards, as a run reads and computes them."""
    model = load_model(config, weights)
    plan = plan_epoch(split, layout=layout, mask="apply", seq_len=config.sequence_len, step_sequences=1)
    num_sequences, loss, targets = plan.num_steps + plan.left_out.sequences, 0.0, 0
    for first in range(0, num_sequences, BATCH):
        rows = read_rows(plan, first, min(first + BATCH, num_sequences))
        documents = None if rows.lengths is None else pack_sequences(rows.lengths, config.sequence_len)
        hidden = model(rows.inputs, documents)
        loss += chunked_loss(hidden, model.lm_head.weight, rows.targets, config.vocab_size).item()
        targets += int((rows.targets != IGNORED).sum())
    return Row(f"chattrain, layout {layout}", len(split), targets, loss / targets)


@torch.no_grad()
def by_trl(rows: Path, split: str, model_folder: Path, work: Path) -> Row:
    """From the Parquet of `--to datasets`, through TRL's own preparation, collator and loss."""
    import datasets
    import trl
    from transformers import AutoTokenizer

    data = datasets.load_dataset("parquet", data_dir=str(rows / split), cache_dir=str(work / "datasets"))["train"]
    settings = trl.SFTConfig(
        output_dir=str(work / "trl"),
        max_length=None,
        per_device_eval_batch_size=BATCH,
        report_to=[],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = trl.SFTTrainer(
        str(model_folder), args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.model.eval()
    loss, targets = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        loss += trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()  # 1: the sum
        targets += int((batch["labels"] != IGNORED).sum())
    return Row(f"datasets {version('datasets')}, trl {version('trl')}", len(data), targets, loss / targets)


@torch.no_grad()
def by_transformers(reader: str, documents: Documents, model_folder: Path) -> Row:
    """From documents that a reader returned: padded, masked, shifted and given to the exported model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found = [tuple(torch.from_numpy(part.astype(np.int64)) for part in document) for document in documents]
    loss, targets = 0.0, 0
    for first in range(0, len(found), BATCH):
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            for part in zip(*found[first : first + BATCH], strict=True)
        )
        labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
        logits = model(ids).logits[:, :-1]  # padding is at the end, where causal attention never looks
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        targets += int((labels != IGNORED).sum())
    return Row(reader, len(found), targets, loss / targets)


def olmo_layout(folder: Path, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents of `--to olmo`, by the published layout."""
    for path in sorted(folder.glob("token_ids_part_*.npy")):
        tokens = np.fromfile(path, dtype)
        mask = np.fromfile(path.with_name(path.name.replace("token_ids", "labels_mask")), np.bool_)
        with gzip.open(path.with_suffix(".csv.gz"), "rt") as file:
            for start, end in (map(int, line.split(",")) for line in file):
                yield tokens[start:end], mask[start:end]


def by_olmo_core(build: Path, olmo: Path, split: str, model_folder: Path, work: Path) -> Row:
    """From the same files, as OLMo-core's padded data set returns the documents."""
    script = Path(__file__).with_name("read_olmo.py")
    subprocess.run(["uv", "run", "--script", script, build, olmo, work, "--split", split], check=True)
    found = np.load(work / "documents.npz")
    documents = [(found["tokens"][a:b], found["mask"][a:b]) for a, b in pairwise(found["bounds"])]
    return by_transformers(f"ai2-olmo-core {found['version']}", documents, model_folder)


def by_megatron_core(folder: Path, model_folder: Path) -> Row:
    """From `--to megatron`: the data set and its twin, the mask."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    twins = (IndexedDataset(str(folder / f"{folder.name}_{kind}_document")) for kind in ("text", "mask"))
    return by_transformers(f"megatron-core {version('megatron-core')}", zip(*twins, strict=True), model_folder)


def export_all(build: Build, out: Path) -> dict[str, int]:
    """BUILD in every format that holds a mask, and the number of targets that each export reports, over all splits."""
    targets = {}
    for to in ("datasets", "olmo", "megatron"):
        (out / to).mkdir(parents=True)
        counts = export_build(build, to, out / to, "apply", no_progress)
        targets[to] = sum(split["supervised"] for split in counts.values())
    return targets


def disagreements(rows: list[Row]) -> list[str]:
    """What differs from the first row, in words."""
    first = rows[0]
    return [
        f"{row.reader}: {row.documents:,} documents, {row.targets:,} targets, loss {row.loss:.9f}"
        for row in rows[1:]
        if (row.documents, row.targets) != (first.documents, first.targets)
        or not abs(row.loss - first.loss) <= TOLERANCE * first.loss
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("work", type=Path, help="A new folder for exports and for what readers write.")
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()
    build, work = open_build(arguments.build), arguments.work
    split = build[arguments.split]
    print(f"supervised in all splits, by export: {export_all(build, work)}")
    config, weights = small_model(split, work / "model")
    rows = [by_chattrain(split, config, weights, layout) for layout in ("pad", "pack")]
    rows.append(by_trl(work / "datasets", split.name, work / "model", work / "trl"))
    rows.append(by_olmo_core(arguments.build, work / "olmo", split.name, work / "model", work / "olmo-core"))
    rows.append(by_megatron_core(work / "megatron" / split.name, work / "model"))
    print(f"\n{'reader':32} {'documents':>9} {'targets':>9} {'mean loss':>12}")
    for row in rows:
        print(f"{row.reader:32} {row.documents:9,} {row.targets:9,} {row.loss:12.8f}")
    if found := disagreements(rows):
        raise SystemExit("\n".join(["these differ from the first line:", *found]))


if __name__ == "__main__":
    main()
