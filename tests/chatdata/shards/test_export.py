"""Exports: their bytes written down, read back by the published layouts and by the readers' own packages."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chatdata
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.document import IGNORED
from chatdata.errors import BuildError
from chatdata.packing.epoch import STAGE_MASKS
from chatdata.progress import no_progress
from chatdata.recipe import load_recipe
from chatdata.shards.export import export_build
from chatdata.shards.index import index_schema
from chatdata.shards.read import Split
from chatdata.shards.write import write_shard
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

RECIPE = """
stage = "{}"
shuffle = {{ train = false, val = false }}
[[train]]
name = "greetings"
task = "conversations"
path = "c.jsonl"
stop = 3
[[val]]
task = "conversations"
path = "c.jsonl"
start = 3
"""
TEXTS = [("hi", "yo"), ("", "A"), ("7*6", "42"), ("v", "w")]
BOS, US, UE, AS, AE = range(256, 261)
IDS = [[BOS, US, *user.encode(), UE, AS, *answer.encode(), AE] for user, answer in TEXTS]
MASKS = [[0] * (len(user) + 4) + [1] * (len(answer) + 1) for user, answer in TEXTS]
LENGTHS = [9, 6, 10]
SUPERVISED = 3 + 2 + 3


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Callable[..., chatdata.Build]:
    """make(stage, tokens in a shard): a build of TEXTS, three documents in train and one in val; a token is a byte."""

    def build_it(stage: str = "sft", shard_tokens: int = 2**27, tokenizer: Tokenizer = byte_tokenizer) -> Any:
        folder = tmp_path_factory.mktemp("export")
        rows = [[{"role": "user", "content": u}, {"role": "assistant", "content": a}] for u, a in TEXTS]
        (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "r.toml").write_text(RECIPE.format(stage))
        tasks = load_tasks()
        recipe = load_recipe(str(folder / "r.toml"), tasks)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", shard_tokens)
            build(make_build_plan(recipe, tasks, tokenizer, Locations(folder)), folder / "out")
        return chatdata.open_build(folder / "out")

    return build_it


@pytest.fixture(scope="module")
def small(make: Callable[..., chatdata.Build]) -> chatdata.Build:
    return make()


@pytest.fixture(scope="module")
def wide(make: Callable[..., chatdata.Build]) -> chatdata.Build:
    """Ids over 65,535, so uint32; a shard per document."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special_ids = {name: 70_000 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return make(shard_tokens=1, tokenizer=Tokenizer(ranks, r"\S+|\s+", special_ids, "wide"))


def export(build: chatdata.Build, to: str, out: Path, policy: Any = "apply", **options: bool) -> dict[str, Any]:
    out.mkdir(parents=True)
    return export_build(build, to, out, policy, no_progress, **options)


def flat(lists: list[list[int]]) -> list[int]:
    return [value for values in lists for value in values]


def files(folder: Path) -> list[str]:
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith("tokenizer/"))


# --- literals --------------------------------------------------------------------------------------------------------


def test_datasets(small: chatdata.Build, tmp_path: Path) -> None:
    facts = export(small, "datasets", tmp_path / "d")
    assert facts["train"] == {"documents": 3, "tokens": 25, "supervised": SUPERVISED}
    names = [f"{folder}-00000.parquet" for folder in ("documents/train", "documents/val", "train/data", "val/data")]
    assert files(tmp_path / "d") == names
    read = pq.read_table(tmp_path / "d" / "train" / "data-00000.parquet")
    types = [("input_ids", pa.int32()), ("attention_mask", pa.int8()), ("labels", pa.int32())]
    assert read.schema == pa.schema([(name, pa.list_(pa.field("element", kind))) for name, kind in types])
    labels = [[i if m else IGNORED for i, m in zip(*pair, strict=True)] for pair in zip(IDS, MASKS, strict=True)]
    assert read.to_pydict() == {
        "input_ids": IDS[:3],
        "attention_mask": [[1] * n for n in LENGTHS],
        "labels": labels[:3],
    }
    assert pq.read_table(tmp_path / "d" / "documents" / "train-00000.parquet").to_pylist() == [
        {"task": "conversations", "name": "greetings", "row": i, "doc": i} for i in range(3)
    ]
    export(small, "datasets", tmp_path / "e", extra_columns=True)
    assert files(tmp_path / "e") == ["train/data-00000.parquet", "val/data-00000.parquet"]
    assert pq.read_table(tmp_path / "e" / "val" / "data-00000.parquet").to_pylist() == [
        {
            "input_ids": IDS[3],
            "attention_mask": [1] * 7,
            "labels": labels[3],
            "task": "conversations",
            "name": "conversations",
            "row": 3,
            "doc": 0,
        }
    ]


def test_olmo(small: chatdata.Build, tmp_path: Path) -> None:
    export(small, "olmo", tmp_path / "d")
    names = ["labels_mask_part_00000.npy", "token_ids_part_00000.csv.gz", "token_ids_part_00000.npy"]
    assert files(tmp_path / "d") == [f"{split}/{name}" for split in ("train", "val") for name in names]
    mask, bounds, tokens = ((tmp_path / "d" / "train" / name).read_bytes() for name in names)
    assert tokens == struct.pack("<25H", *flat(IDS[:3]))
    assert mask == bytes(flat(MASKS[:3]))
    assert gzip.decompress(bounds) == b"0,9\n9,15\n15,25\n"
    export(small, "olmo", tmp_path / "again")
    assert (tmp_path / "again" / "train" / names[1]).read_bytes() == bounds


def test_megatron(small: chatdata.Build, tmp_path: Path) -> None:
    export(small, "megatron", tmp_path / "d")
    names = [f"train/train_{kind}_document.{end}" for kind in ("mask", "text") for end in ("bin", "idx")]
    assert files(tmp_path / "d")[:4] == names
    mask, mask_index, text, text_index = ((tmp_path / "d" / name).read_bytes() for name in names)
    assert text == struct.pack("<25H", *flat(IDS[:3]))
    assert mask == bytes(flat(MASKS[:3]))
    head = b"MMIDIDX\0\0" + b"\1\0\0\0\0\0\0\0"
    counts = b"\3\0\0\0\0\0\0\0" + b"\4\0\0\0\0\0\0\0" + struct.pack("<3i", 9, 6, 10)
    assert text_index == head + b"\x08" + counts + struct.pack("<3q", 0, 18, 30) + struct.pack("<4q", 0, 1, 2, 3)
    assert mask_index == head + b"\x01" + counts + struct.pack("<3q", 0, 9, 15) + struct.pack("<4q", 0, 1, 2, 3)


def test_llmc(small: chatdata.Build, tmp_path: Path) -> None:
    export(small, "llmc", tmp_path / "d")
    assert files(tmp_path / "d") == ["train/train_000000.bin", "val/val_000000.bin"]
    data = (tmp_path / "d" / "train" / "train_000000.bin").read_bytes()
    assert data == struct.pack("<3i", 20240520, 1, 25) + bytes(253 * 4) + struct.pack("<25H", *flat(IDS[:3]))


def test_the_tokenizer_is_next_to_the_splits(small: chatdata.Build, tmp_path: Path) -> None:
    for to in ("datasets", "olmo", "megatron", "llmc"):
        export(small, to, tmp_path / to)
        for name in small.manifest["tokenizer"]["files"]:
            content = (small.path / "tokenizer" / name).read_bytes()
            assert (tmp_path / to / "tokenizer" / name).read_bytes() == content


# --- read back by the published layouts ------------------------------------------------------------------------------


def read_back(folder: Path, to: str, dtype: str) -> list[tuple[list[int], list[int] | None]]:
    """(ids, mask) of each document of a split, with plain numpy; of llmc all of it as one, without a mask."""
    if to == "datasets":
        rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        return [(row["input_ids"], [int(label != IGNORED) for label in row["labels"]]) for row in rows]
    if to == "llmc":
        ids: list[int] = []
        for path in sorted(folder.glob("*.bin")):
            magic, version, num_tokens = np.fromfile(path, "<i4", 256)[:3].tolist()
            assert (magic, version) == ((20240520, 1) if dtype == "<u2" else (20240801, 7))
            ids += np.fromfile(path, dtype, offset=1024).tolist()
            assert num_tokens == len(np.fromfile(path, dtype, offset=1024))
        return [(ids, None)]
    found = []
    if to == "olmo":
        for path in sorted(folder.glob("token_ids_part_*.npy")):
            tokens = np.fromfile(path, dtype)
            mask = np.fromfile(str(path).replace("token_ids", "labels_mask"), np.bool_)
            with gzip.open(str(path).replace(".npy", ".csv.gz"), "rt") as file:
                bounds = [tuple(map(int, line.split(","))) for line in file]
            found += [(tokens[a:b].tolist(), mask[a:b].astype(int).tolist()) for a, b in bounds]
        return found
    parts = []
    for kind in ("text", "mask"):
        path = folder / f"{folder.name}_{kind}_document.idx"
        index = path.read_bytes()
        magic, version, code, num_sequences, num_bounds = struct.unpack("<9sQBQQ", index[:34])
        assert (magic, version) == (b"MMIDIDX\0\0", 1)
        lengths = np.frombuffer(index, "<i4", num_sequences, 34)
        pointers = np.frombuffer(index, "<i8", num_sequences, 34 + 4 * num_sequences)
        bounds = np.frombuffer(index, "<i8", num_bounds, 34 + 12 * num_sequences)
        assert len(index) == 34 + 12 * num_sequences + 8 * num_bounds
        assert bounds.tolist() == list(range(num_sequences + 1))
        kinds = {1: np.dtype("u1"), 4: np.dtype("<i4"), 8: np.dtype("<u2")}
        data = path.with_suffix(".bin").read_bytes()
        parts.append(
            [np.frombuffer(data, kinds[code], n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
        )
        assert lengths.sum() * kinds[code].itemsize == len(data)
    return list(zip(*parts, strict=True))


@pytest.mark.parametrize("to", ["datasets", "olmo", "megatron", "llmc"])
def test_many_shards_of_uint32(wide: chatdata.Build, to: str, tmp_path: Path) -> None:
    assert len(wide["train"].shards) == 3 and wide.manifest["dtype"] == "<u4"
    facts = export(wide, to, tmp_path / "d")
    assert facts["train"] == {"documents": 3, "tokens": 25, "supervised": SUPERVISED}
    ids = [[i + 70_000 - 256 if i >= 256 else i for i in document] for document in IDS[:3]]
    expected = [(flat(ids), None)] if to == "llmc" else list(zip(ids, MASKS[:3], strict=True))
    assert read_back(tmp_path / "d" / "train", to, "<u4") == expected


@pytest.mark.parametrize("to", ["datasets", "olmo", "megatron"])
def test_the_mask_is_the_policys(demo_mid: Path, to: str, tmp_path: Path) -> None:
    """Documents with calls of tools; the sums of all formats that hold a mask agree."""
    split = chatdata.open_build(demo_mid)["train"]
    for policy in ("apply", "ignore", "last-turn", "no-tools"):
        facts = export(split.build, to, tmp_path / policy, policy)
        expected = split.mask(0, split.num_tokens, policy)
        assert facts["train"]["supervised"] == int(expected.sum())
        documents = read_back(tmp_path / policy / "train", to, "<u2") if policy == "last-turn" else []
        for i, (ids, mask) in enumerate(documents):
            start, stop = split.offsets[i : i + 2]
            assert ids == split.tokens(start, stop).tolist() and mask == expected[start:stop].tolist()
        assert len(documents) in (0, len(split))


def split_of(folder: Path, shards: list[list[int]], dtype: str) -> Split:
    """A split of shards with documents of these lengths; ids and mask count up."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "train").mkdir()
    records, first = [], 0
    for number, lengths in enumerate(shards):
        total = sum(lengths)
        ids = np.arange(first, first + total)
        rows = [{field.name: 0 for field in index_schema() if field.name != "spans"} for _ in lengths]
        rows = [{**row, "doc": i, "task": "t", "digest": bytes(16), "truncated": False} for i, row in enumerate(rows)]
        index = pa.Table.from_pylist([{**row, "spans": []} for row in rows], schema=index_schema())
        chunk = iter([(ids, (ids % 3 == 0).astype(np.uint8))])
        records.append(
            write_shard(folder / "train", number, chunk, np.array(lengths), [index], np.dtype(dtype), 70_000)
        )
        first += total
    entries = [{"name": "n"}]
    manifest = {"dtype": dtype, "build_id": "0" * 64, "splits": {"train": {"shards": records, "entries": entries}}}
    return chatdata.Build(folder, manifest)["train"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4),
    piece=st.integers(1, 30),
    dtype=st.sampled_from(["<u2", "<u4"]),
)
def test_any_lengths_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], piece: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("lengths")
    split = split_of(folder / "build", shards, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.export.PIECE_TOKENS", piece)
        patch.setattr("chatdata.shards.export.sync", lambda path: None)
        facts = [export(split.build, to, folder / to) for to in ("datasets", "olmo", "megatron", "llmc")]
        export(split.build, "datasets", folder / "extra", extra_columns=True)
    tokens, mask = split.tokens(0, split.num_tokens).tolist(), split.mask(0, split.num_tokens).tolist()
    starts = split.offsets.tolist()
    expected = [(tokens[a:b], mask[a:b]) for a, b in pairwise(starts)]
    for to in ("datasets", "olmo", "megatron"):
        assert read_back(folder / to / "train", to, dtype) == expected
    assert read_back(folder / "llmc" / "train", "llmc", dtype) == [(tokens, None)]
    assert facts == [{"train": {"documents": len(split), "tokens": len(tokens), "supervised": sum(mask)}}] * 4
    extra = [pq.read_table(path) for path in sorted((folder / "extra" / "train").iterdir())]
    assert [table["doc"].to_pylist() for table in extra] == [list(range(len(lengths))) for lengths in shards]


# --- read back by the readers themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("arrow", [False, True])
def test_datasets_loads_it(wide: chatdata.Build, arrow: bool, tmp_path: Path) -> None:
    import datasets

    out = tmp_path / "d"
    export(wide, "datasets", out, arrow=arrow)
    cache = str(tmp_path / "cache")
    if arrow:
        loaded = datasets.load_from_disk(out)
        assert list(loaded) == ["train", "val"] and loaded["train"].split == "train"
        rows = [loaded["train"], datasets.load_from_disk(out / "train")]
    else:
        loaded = datasets.load_dataset(str(out), cache_dir=cache)
        assert list(loaded) == ["train", "validation"]
        rows = [
            loaded["train"],
            datasets.load_dataset("parquet", data_dir=str(out / "train"), cache_dir=cache)["train"],
        ]
    types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
    for dataset in rows:
        assert dataset.features == {name: datasets.List(datasets.Value(kind)) for name, kind in types.items()}
        assert [len(row["input_ids"]) for row in dataset] == LENGTHS
        assert dataset[2]["labels"] == [IGNORED] * 7 + [*b"42", 70_000 + AE - 256]
        assert dataset.map(lambda row: {"n": sum(row["attention_mask"])})["n"] == LENGTHS


def test_megatron_reads_it(small: chatdata.Build, wide: chatdata.Build, tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs megatron-core: uv sync")
    for split in (small["train"], wide["train"]):
        folder = tmp_path / split.build.manifest["dtype"][1:]
        export(split.build, "megatron", folder)
        for kind in ("text", "mask"):
            read = module.IndexedDataset(str(folder / "train" / f"train_{kind}_document"))
            expected = [getattr(document, {"text": "tokens"}.get(kind, kind)).tolist() for document in split]
            assert [read[i].tolist() for i in range(len(read))] == expected
            assert read.document_indices.tolist() == [0, 1, 2, 3]


def test_the_mask_of_megatron_is_a_twin(demo_mid: Path, tmp_path: Path) -> None:
    """GPTDataset over the mask draws the same sequences: its labels are the mask of the other's labels."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="needs megatron-core: uv sync")
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    split = chatdata.open_build(demo_mid)["val"]
    ids = split.build.manifest["tokenizer"]["special_ids"]
    export(split.build, "megatron", tmp_path / "d")
    tokenizer = SimpleNamespace(vocab_size=400, eod=ids["<|bos|>"], unique_identifiers={}, special_tokens_dict={})
    given = {"random_seed": 3, "sequence_length": 64, "tokenizer": tokenizer, "path_to_cache": str(tmp_path / "cache")}
    given |= dict.fromkeys(["reset_position_ids", "reset_attention_mask", "eod_mask_loss"], False)
    twins = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for kind in ("text", "mask"):
            blend = [([str(tmp_path / "d" / "val" / f"val_{kind}_document")], None), None, None]
            config = gpt.GPTDatasetConfig(blend_per_split=blend, **given)
            builder = BlendedMegatronDatasetBuilder(gpt.GPTDataset, [100, None, None], lambda: True, config)
            twins.append(builder.build()[0])
    finally:
        torch.distributed.destroy_process_group()
    text, mask = twins
    assert len(text) == len(mask) >= 100
    known = {i: split[int(i)] for i in text.document_index.tolist()}
    for place in range(20):
        # sequence `place` before Megatron's shuffle begins at this token of this document
        number, start = text.sample_index[text.shuffle_index[place]].tolist()
        document = known[int(text.document_index[number])]
        seen = min(64, len(document) - start - 1)
        assert text[place]["labels"][:seen].tolist() == document.tokens[start + 1 :][:seen].tolist()
        assert mask[place]["labels"][:seen].tolist() == document.mask[start + 1 :][:seen].tolist()
        assert text[place]["loss_mask"].all()


def test_trl_trains_on_it(small: chatdata.Build, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trains with trl: uv sync")
    torch = pytest.importorskip("torch", reason="trains with torch: uv sync")
    import datasets
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    export(small, "datasets", tmp_path / "d")
    rows = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"), split="train")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=265, intermediate_size=64, head_dim=16, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "d" / "tokenizer")
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_length=None,
        max_steps=1,
        per_device_train_batch_size=3,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    fed = next(iter(trainer.get_train_dataloader()))
    assert fed["input_ids"].shape == (3, 10) and int((fed["labels"] != IGNORED).sum()) == SUPERVISED
    trainer.train()
    assert trainer.state.global_step == 1
    assert f"{trainer.state.log_history[-1]['train_loss']:.1f}" == "5.6"  # ln 265


# --- limits ----------------------------------------------------------------------------------------------------------


def test_llmc_files_are_below_2_gib(small: chatdata.Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatdata.shards.export.MAX_LLMC_BYTES", 1024 + 49)
    with pytest.raises(BuildError, match=r"train/tokens-00000.npy: too large, llm.c reads files below 2 GiB"):
        export(small, "llmc", tmp_path / "d")
    monkeypatch.setattr("chatdata.shards.export.MAX_LLMC_BYTES", 1024 + 50)
    export(small, "llmc", tmp_path / "e")


def test_every_stage_has_a_policy(make: Callable[..., chatdata.Build], tmp_path: Path) -> None:
    mid = make("mid")
    assert export(mid, "olmo", tmp_path / "d", STAGE_MASKS["mid"])["train"]["supervised"] == 25
