"""Export a build to the files of other trainers: a folder per split, and the tokenizer next to them.

datasets   train/data-00000.parquet                 input_ids, attention_mask, labels: a row per document
           documents/train-00000.parquet            task, name, row, doc: of the same documents
olmo       train/token_ids_part_00000.npy           ids, without a header despite the name: `<u2` or `<u4`
           train/labels_mask_part_00000.npy         bool of each token, without a header, not shifted
           train/token_ids_part_00000.csv.gz        a line "start,end" per document
megatron   train/train_text_document.bin, .idx      ids (`<u2` or `<i4`); lengths and byte offsets of documents
           train/train_mask_document.bin, .idx      the mask in the same way (`|u1`)
llmc       train/train_000000.bin                   256 `<i4` of header, then ids: `<u2` or `<u4`

Sources: allenai/OLMo-core@v3.0.0:src/olmo_core/data/utils.py (iter_document_indices),
NVIDIA/Megatron-LM@core_v0.16.1:megatron/core/datasets/indexed_dataset.py (_IndexReader),
karpathy/llm.c:dev/data/data_common.py (write_datafile).
"""

import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from gzip import GzipFile
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.arrow import list_to_arrow, strings_to_arrow, to_arrow
from chatdata.disk import sync, write_json
from chatdata.document import IGNORED, blocks_of
from chatdata.errors import BuildError
from chatdata.progress import Progress
from chatdata.shards.index import read_index
from chatdata.shards.masks import MaskPolicy
from chatdata.shards.read import Build, Split

Piece = tuple[np.ndarray, np.ndarray, np.ndarray]  # of some documents: tokens (dtype of the build), mask, lengths
Pieces = Callable[[int], Iterator[Piece]]  # a shard, by its number
Facts = dict[str, Counter[str]]  # split → documents, tokens, supervised
PIECE_TOKENS = 2**20  # in memory at once, unless one document is longer; also a row group of Parquet
MAX_LLMC_BYTES = 2**31 - 1  # of a file


def export_build(build: Build, to: str, folder: Path, policy: MaskPolicy, progress: Progress, **options: bool) -> Facts:
    """Write `build` into the empty `folder`.

    to: "datasets", "olmo", "megatron" or "llmc". policy: of labels and masks. Options of datasets: extra_columns puts
    task, name, row and doc into the rows, arrow writes what `datasets.load_from_disk` reads. Memory does not grow with
    the build, nor does what is mapped at once. Raises BuildError for a shard that is too large for llmc.
    """
    shutil.copytree(build.path / "tokenizer", folder / "tokenizer")
    facts = {}
    for name, split in build.splits.items():
        facts[name] = Counter(documents=len(split), tokens=0, supervised=0)
        (folder / name).mkdir()
        WRITERS[to](split, folder / name, partial(_pieces, split, policy, facts[name], progress), **options)
    for path in folder.rglob("*"):
        sync(path)
    return facts


def _pieces(split: Split, policy: MaskPolicy, counts: Counter[str], progress: Progress, number: int) -> Iterator[Piece]:
    """The pieces of a shard, added up in `counts`."""
    before, offsets = counts["tokens"], split.map("offsets", number)
    for first, last in blocks_of(np.diff(offsets), PIECE_TOKENS):
        start, stop = offsets[[first, last]].tolist()
        tokens, stored = (np.load(split.path(kind, number), "r")[start:stop] for kind in ("tokens", "mask"))
        mask = split.apply_policy(policy, stored, np.array([before + start]), np.array([stop - start]))
        yield tokens, mask, np.diff(offsets[first : last + 1])
        counts.update(tokens=len(tokens), supervised=int(np.count_nonzero(mask)))
        progress(f"export {split.name}", counts["tokens"], split.num_tokens, "tokens")


def _datasets(split: Split, folder: Path, pieces: Pieces, extra_columns: bool = False, arrow: bool = False) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8()), "labels": pa.list_(pa.int32())}
    extra = {"task": pa.string(), "name": pa.string(), "row": pa.int64(), "doc": pa.int64()}
    schema = pa.schema(types | (extra if extra_columns else {}))
    open_writer = pa.ipc.new_stream if arrow else partial(pq.ParquetWriter, compression="zstd")
    names = [f"data-{number:05d}.{'arrow' if arrow else 'parquet'}" for number in range(len(split.shards))]
    for number, name in enumerate(names):
        index = read_index(split.path("index", number), ["task", "entry", "row", "doc"])
        entries = strings_to_arrow(split.names).take(index["entry"])
        documents = pa.table([index["task"].cast(pa.string()), entries, index["row"], index["doc"]], names=list(extra))
        if not extra_columns:
            (folder.parent / "documents").mkdir(exist_ok=True)
            pq.write_table(documents, folder.parent / "documents" / f"{split.name}-{number:05d}.parquet")
        with (folder / name).open("wb") as file, open_writer(file, schema) as writer:
            for tokens, mask, lengths in pieces(number):
                ids = tokens.astype(np.int32)
                labels = np.where(mask == 1, ids, np.int32(IGNORED))
                columns = [list_to_arrow(to_arrow(a), lengths) for a in (ids, np.ones(len(ids), np.int8), labels)]
                columns += documents.slice(0, len(lengths)).columns if extra_columns else []
                writer.write_table(pa.table(columns, schema=schema))
                documents = documents.slice(len(lengths))
    if arrow:  # as Dataset.save_to_disk writes them; the features are found in the files
        state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names], "_split": split.name}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        write_json(folder / "state.json", state | {"_fingerprint": split.build.manifest["build_id"][:32]})
        write_json(folder / "dataset_info.json", {})
        write_json(folder.parent / "dataset_dict.json", {"splits": list(split.build.splits)})


def _olmo(split: Split, folder: Path, pieces: Pieces) -> None:
    for number in range(len(split.shards)):
        paths = [folder / f"{kind}_part_{number:05d}.npy" for kind in ("token_ids", "labels_mask")]
        _copy(pieces(number), *paths)
        offsets = split.map("offsets", number)
        with GzipFile(paths[0].with_suffix(".csv.gz"), "wb", mtime=0) as file:
            file.write("".join(f"{start},{end}\n" for start, end in pairwise(offsets.tolist())).encode())


def _megatron(split: Split, folder: Path, pieces: Pieces) -> None:
    numbers = range(len(split.shards))
    paths = [folder / f"{split.name}_{kind}_document.bin" for kind in ("text", "mask")]
    _copy(chain.from_iterable(map(pieces, numbers)), *paths)  # uint32 as int32: ids are below 2^20
    shards = [split.map("offsets", number) for number in numbers]
    firsts = np.cumsum([0, *(shard["tokens"] for shard in split.shards[:-1])])
    blocks = range(0, len(split) + 1, PIECE_TOKENS)
    codes = {"<u2": (8, 2), "<u4": (4, 4)}  # of Megatron's DType, and bytes
    for path, (code, num_bytes) in zip(paths, (codes[split.build.manifest["dtype"]], (1, 1)), strict=True):
        with path.with_suffix(".idx").open("wb") as file:
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, len(split), len(split) + 1))
            file.writelines(np.diff(offsets).astype("<i4").data for offsets in shards)
            for offsets, first in zip(shards, firsts, strict=True):
                file.write(((offsets[:-1] + first) * num_bytes).data)
            file.writelines(np.arange(i, min(i + PIECE_TOKENS, len(split) + 1)).data for i in blocks)


def _copy(pieces: Iterable[Piece], tokens_path: Path, mask_path: Path) -> None:
    with tokens_path.open("wb") as tokens_file, mask_path.open("wb") as mask_file:
        for tokens, mask, _ in pieces:
            tokens_file.write(tokens.data)
            mask_file.write(mask.data)


def _llmc(split: Split, folder: Path, pieces: Pieces) -> None:
    dtype = split.build.manifest["dtype"]
    for number, shard in enumerate(split.shards):
        if 1024 + shard["tokens"] * np.dtype(dtype).itemsize > MAX_LLMC_BYTES:
            raise BuildError(f"{split.path('tokens', number)}: too large, llm.c reads files below 2 GiB")
        with (folder / f"{split.name}_{number:06d}.bin").open("wb") as file:
            magic, version = (20240520, 1) if dtype == "<u2" else (20240801, 7)
            file.write(np.array([magic, version, shard["tokens"], *[0] * 253], "<i4").data)
            for tokens, _, _ in pieces(number):
                file.write(tokens.data)


WRITERS: dict[str, Callable[..., None]] = {"datasets": _datasets, "olmo": _olmo, "megatron": _megatron, "llmc": _llmc}
