# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["ai2-olmo-core==3.0.0", "torch==2.11.0"]
# ///
"""What OLMo-core's data sets make of `chatdata export --to olmo`, against the documents of the build.

    chatdata export BUILD --to olmo --out OLMO
    uv run --script benchmarks/peers/read_olmo.py BUILD OLMO WORK [--split train]

uv makes an environment for this script alone (OLMo-core wants a torch before 2.14). WORK is a folder for OLMo-core's
indices and for documents.npz: tokens, mask and bounds of all documents as OLMo-core's padded data set returns them.

With the boundaries of the .csv.gz every document of the build must be found, with its tokens and its mask. Without them
OLMo-core takes every eos before a bos for the end of a document (packed), or every eos (padded).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from olmo_core.data import NumpyPackedFSLDatasetConfig, NumpyPaddedFSLDatasetConfig, TokenizerConfig
from olmo_core.data.utils import get_labels
from olmo_core.version import VERSION

Documents = list[tuple[np.ndarray, np.ndarray]]  # tokens and mask of each


def build_documents(build: Path, split: str) -> Documents:
    """The documents as docs/format.md says they are stored."""
    documents: Documents = []
    for offsets_path in sorted((build / split).glob("offsets-*.npy")):
        tokens, mask = (
            np.load(offsets_path.with_name(offsets_path.name.replace("offsets", kind))) for kind in ("tokens", "mask")
        )
        offsets = np.load(offsets_path)
        documents += [(tokens[a:b].astype(int), mask[a:b] == 1) for a, b in pairwise(offsets)]
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("olmo", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    logging.disable()

    about = json.loads((arguments.build / "manifest.json").read_text())["tokenizer"]
    bos, eos = (about["special_ids"][name] for name in ("<|bos|>", "<|assistant_end|>"))
    ours = build_documents(arguments.build, arguments.split)
    folder = arguments.olmo / arguments.split
    settings = {
        "paths": [str(folder / "token_ids_part_*.npy")],
        "label_mask_paths": [str(folder / "labels_mask_part_*.npy")],
        "expand_glob": True,
        "tokenizer": TokenizerConfig(
            vocab_size=about["vocab_size"], eos_token_id=eos, bos_token_id=bos, pad_token_id=eos
        ),
        "sequence_length": 1 << (max(len(tokens) for tokens, _ in ours) - 1).bit_length(),  # packing: a power of 2
    }
    total = sum(int(mask.sum()) for _, mask in ours)
    print(f"ai2-olmo-core {VERSION}, torch {torch.__version__}; the build: {len(ours):,} documents, {total:,} targets")
    for scan in (False, True):
        os.environ["OLMO_DATA_PREP_USE_ARRAY_IF_LOCAL"] = str(scan).lower()
        work = str(arguments.work / ("scan" if scan else "exact"))
        how = "ends guessed" if scan else "exact boundaries"

        padded = NumpyPaddedFSLDatasetConfig(**settings, work_dir=work).build()
        padded.prepare()
        items = [padded[i] for i in range(len(padded))]
        print(f"padded, {how}: {len(items):,} documents, {targets_of(items):,} targets")
        if not scan:
            found = []
            for item, (tokens, _) in zip(items, ours, strict=True):
                n = len(tokens)
                assert (item["input_ids"][n:] == eos).all() and not item["label_mask"][n:].any()
                found.append((item["input_ids"][:n].numpy(), item["label_mask"][:n].numpy()))
            for number, (document, own) in enumerate(zip(found, ours, strict=True)):
                assert all(map(np.array_equal, document, own)), f"document {number} is another one"
            print("  every document in its place, tokens and mask equal")
            save(found, arguments.work / "documents.npz")

        packed = NumpyPackedFSLDatasetConfig(
            **settings, work_dir=work, use_array_if_local=scan, generate_doc_lengths=True
        ).build()
        packed.prepare()
        items = [packed[i] for i in range(len(packed))]
        documents = [document for item in items for document in cut(item)]
        equal = (Counter(key(*d, eos) for d in documents) & Counter(key(*d, eos) for d in ours)).total()
        assert scan or equal == len(documents) == len(ours)
        print(
            f"packed, {how}: {len(documents):,} documents, {targets_of(items):,} targets, "
            f"in {len(items):,} sequences of {packed.sequence_length:,}; {equal:,} documents equal"
        )


def targets_of(items: list[dict[str, torch.Tensor]]) -> int:
    """Labels left after OLMo-core has masked and shifted them."""
    batches = ({name: item[name][None] for name in ("input_ids", "label_mask")} for item in items)
    return sum(int((get_labels(batch) != -100).sum()) for batch in batches)


def cut(item: dict[str, torch.Tensor]) -> Documents:
    lengths = item["doc_lens"].tolist()
    parts = zip(item["input_ids"].split(lengths), item["label_mask"].split(lengths), strict=True)
    return [(tokens.numpy(), mask.numpy()) for tokens, mask in parts]


def key(tokens: np.ndarray, mask: np.ndarray, padding: int) -> tuple[bytes, bytes]:
    """A document without what may be padding: OLMo-core counts it to the last document of a sequence."""
    kept = ((tokens != padding) | mask).nonzero()[0][-1] + 1
    return tokens[:kept].astype(np.int64).tobytes(), mask[:kept].tobytes()


def save(documents: Documents, path: Path) -> None:
    tokens, mask = (np.concatenate(column) for column in zip(*documents, strict=True))
    bounds = np.cumsum([0, *(len(d) for d, _ in documents)])
    np.savez(path, tokens=tokens, mask=mask, bounds=bounds, version=VERSION)


if __name__ == "__main__":
    main()
