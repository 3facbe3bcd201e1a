from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import chatdata
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.verify import verify_quick
from chatdata.disk import write_json
from chatdata.errors import FormatError
from chatdata.recipe import load_recipe
from chatdata.shards.manifest import build_id_of
from chatdata.shards.write import index_schema, write_shard
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer


@pytest.fixture
def small(tmp_path: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> chatdata.Build:
    """12 documents of known lengths in shards of at most 40 tokens."""
    monkeypatch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 40)
    lines = [
        json.dumps([{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}]) for n in range(12)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.toml").write_text('stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    tasks = load_tasks()
    recipe = load_recipe(str(tmp_path / "r.toml"), tasks)
    build(make_build_plan(recipe, tasks, byte_tokenizer, Locations(tmp_path)), tmp_path / "out")
    return chatdata.open_build(tmp_path / "out")


def test_reading_over_shards(small: chatdata.Build) -> None:
    train = small["train"]
    assert len(train.shards) > 3 and len(train) == 12
    lengths = np.array([len(document) for document in train])
    assert sorted(lengths) == [6 + n for n in range(12)]
    assert np.diff(train.offsets).tolist() == lengths.tolist()
    everything = train.tokens(0, train.num_tokens)
    mask = train.mask(0, train.num_tokens)
    for i in range(12):
        start, stop = train.offsets[i], train.offsets[i + 1]
        assert train[i].tokens.tolist() == everything[start:stop].tolist() == train.tokens(start, stop).tolist()
        assert train[i].mask.tolist() == mask[start:stop].tolist()
    for start, stop in [(0, 0), (3, 90), (39, 41), (train.num_tokens, train.num_tokens)]:
        assert train.tokens(start, stop).tolist() == everything[start:stop].tolist()
    assert train[-1].tokens.tolist() == train[11].tokens.tolist()
    assert [len(document) for document in train[2:5]] == lengths[2:5].tolist()
    for bad in (12, -13):
        with pytest.raises(IndexError):
            train[bad]
    with pytest.raises(IndexError):
        train.tokens(0, train.num_tokens + 1)
    with pytest.raises(KeyError, match="has no split 'val'; it has train"):
        small["val"]


def test_views_copy_nothing(small: chatdata.Build) -> None:
    train = small["train"]
    document = train[0]
    assert np.shares_memory(document.tokens, train.map("tokens", 0))
    assert np.shares_memory(document.mask, train.map("mask", 0))
    assert np.shares_memory(train.tokens(0, 5), train.map("tokens", 0))
    assert not document.tokens.flags.writeable


def test_files_are_what_the_format_says(small: chatdata.Build) -> None:
    folder = small.path / "train"
    for kind, descr in (("tokens", "<u2"), ("mask", "|u1"), ("offsets", "<i8")):
        with (folder / f"{kind}-00000.npy").open("rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            assert (len(shape), fortran, dtype.str, file.tell()) == (1, False, descr, 128)
    index = small["train"].index
    assert index.columns == index_schema().names
    assert index["doc"].to_list() == list(range(12))
    for i, row in enumerate(index.iter_rows(named=True)):
        document = small["train"][i]
        assert (row["num_tokens"], row["num_supervised"]) == (len(document), 2)
        assert (row["num_turns"], row["num_tool_calls"], row["truncated"]) == (2, 0, False)
        ids = document.tokens.astype("<u4").tobytes()
        assert row["digest"] == hashlib.blake2b(ids + document.mask.tobytes(), digest_size=16).digest()
        assert row["position"] == row["row"] == len(document) - 6
    assert index.schema["entry"] == pl.Int16 and index.schema["row"] == pl.Int64
    manifest = small.manifest
    for shard in manifest["splits"]["train"]["shards"]:
        for record in shard["files"].values():
            content = (folder / record["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])


def test_ids_are_checked_before_the_cast(tmp_path: Path) -> None:
    def write(ids: np.ndarray, dtype: str, vocab_size: int) -> None:
        chunks = iter([(ids, np.zeros(len(ids), dtype=np.uint8))])
        write_shard(tmp_path, 0, chunks, np.array([len(ids)]), [], np.dtype(dtype), vocab_size)

    with pytest.raises(FormatError, match=r"^token id 65536 is outside 0 … 65535"):
        write(np.array([1, 65_536]), "<u2", 70_000)
    with pytest.raises(FormatError, match=r"^token id 300 is outside 0 … 299"):
        write(np.array([300]), "<u2", 300)
    with pytest.raises(FormatError, match=r"^token id -1 is outside"):
        write(np.array([-1]), "<u4", 300)


def change_manifest(build: chatdata.Build, **changes: object) -> None:
    manifest = {**build.manifest, **changes}
    manifest["build_id"] = build_id_of(manifest)
    write_json(build.path / "manifest.json", manifest)


def test_opening_refuses_what_is_not_a_whole_build(small: chatdata.Build, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"absent: no such folder \(no manifest.json\)"):
        chatdata.open_build(tmp_path / "absent")
    path = small.path / "train" / "mask-00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(FormatError, match=r"mask-00001.npy: \d+ bytes, but the manifest says \d+"):
        chatdata.open_build(small.path)
    path.unlink()
    with pytest.raises(FormatError, match=r"mask-00001.npy: missing"):
        chatdata.open_build(small.path)
    path.write_bytes(content)
    chatdata.open_build(small.path)
    change_manifest(small, version=2)
    with pytest.raises(FormatError, match=r"format version 2; this chatdata reads version 1: build it again"):
        chatdata.open_build(small.path)
    change_manifest(small, format="other")
    with pytest.raises(FormatError, match=r'format "other", not chatdata'):
        chatdata.open_build(small.path)
    splits = json.loads(json.dumps(small.manifest["splits"]))
    splits["train"]["shards"][0]["files"]["mask"]["file"] = "../../mask.npy"
    change_manifest(small, splits=splits)
    with pytest.raises(FormatError, match=r'mask.file": "../../mask.npy", but expected "mask-00000.npy"$'):
        chatdata.open_build(small.path)
    (small.path / "manifest.json").write_text("{")
    with pytest.raises(FormatError, match=r"manifest.json: not valid JSON: "):
        chatdata.open_build(small.path)


def test_quick_verify_finds_damage(small: chatdata.Build) -> None:
    assert verify_quick(small.path) == []
    offsets = small.path / "train" / "offsets-00000.npy"
    content = offsets.read_bytes()
    values = np.frombuffer(content[128:], dtype="<i8").copy()
    values[1] += 1
    offsets.write_bytes(content[:128] + values.tobytes())
    assert [problem.split(": ", 1)[1] for problem in verify_quick(small.path)] == [
        "num_tokens differs from the offsets"
    ]
    values[1] = values[0]
    offsets.write_bytes(content[:128] + values.tobytes())
    assert any("offsets do not rise from 0 to" in problem for problem in verify_quick(small.path))
    offsets.write_bytes(content)
    tokens = small.path / "train" / "tokens-00002.npy"
    tokens.write_bytes(tokens.read_bytes().replace(b"<u2", b"<i2", 1))
    assert any("<i2 of shape" in problem for problem in verify_quick(small.path))
    (small.path / "tokenizer" / "tokenizer.json").unlink()
    assert any(problem.endswith("tokenizer.json: missing") for problem in verify_quick(small.path))


def test_document_views(small: chatdata.Build) -> None:
    document = next(d for d in small["train"] if len(d) == 8)
    assert document.text() == "<|bos|><|user_start|>xx<|user_end|><|assistant_start|>y<|assistant_end|>"
    assert document.conversation_markup() == (
        "<|bos|>\n<|user_start|>xx<|user_end|>\n<|assistant_start|>⟦y<|assistant_end|>⟧"
    )
    html = document._repr_html_()
    assert "8 tokens, 2 supervised" in html
    assert "<|bos|>" not in html and "&lt;|bos|&gt;" in html
    assert '<span style="background:#c8ecc8;color:#0b3d0b">y&lt;|assistant_end|&gt;</span>' in html
