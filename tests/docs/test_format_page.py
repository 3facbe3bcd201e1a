"""docs/format.md is complete: a reader that follows only its rules reads real builds, and refuses everything else."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash

import chatdata as library
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.verify import verify_full
from chatdata.disk import write_json
from chatdata.errors import FormatError
from chatdata.recipe import load_recipe
from chatdata.shards.manifest import build_id_of
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import CANARY_TEXTS, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers: uv sync")

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


# The reader uses neither chatdata nor numpy. At most 40 lines (a test counts them).
def read_build(out: Path) -> Iterator[tuple[str, dict, list[int], list[int]]]:
    """(split, index row, ids, mask) of every document, after every check that the page allows."""
    manifest = json.loads((out / "manifest.json").read_text("utf-8"), object_pairs_hook=_once)
    assert (manifest["format"], manifest["version"]) == ("chatdata", 2), "unknown format or version"
    rest = {key: value for key, value in manifest.items() if key != "build_id"}
    canonical = json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == manifest["build_id"], "build_id"
    for name, sha256 in manifest["tokenizer"]["files"].items():
        assert not set("/\\\0") & set(name) and name not in ("", ".", ".."), "path"
        assert hashlib.sha256(_inside(out, f"tokenizer/{name}")).hexdigest() == sha256, "sha256"
    for split, contents in manifest["splits"].items():
        assert split in ("train", "val"), "path"
        for number, shard in enumerate(contents["shards"]):
            files = {}
            for kind, suffix in (("tokens", "npy"), ("mask", "npy"), ("offsets", "npy"), ("index", "parquet")):
                record = shard["files"][kind]
                assert record["file"] == f"{kind}-{number:05}.{suffix}", "path"
                files[kind] = _inside(out, f"{split}/{record['file']}")
                assert len(files[kind]) == record["bytes"], "size"
                assert hashlib.sha256(files[kind]).hexdigest() == record["sha256"], "sha256"
            tokens = _values(files["tokens"], manifest["dtype"], shard["tokens"])
            mask = _values(files["mask"], "|u1", shard["tokens"])
            offsets = _values(files["offsets"], "<i8", shard["documents"] + 1)
            index = pq.read_table(io.BytesIO(files["index"])).to_pylist()
            for row, start, stop in zip(index, offsets[:-1], offsets[1:], strict=True):
                ids, ones = tokens[start:stop], mask[start:stop]
                data = struct.pack(f"<{len(ids)}{'H' if manifest['dtype'] == '<u2' else 'I'}", *ids) + bytes(ones)
                assert xxhash.xxh3_128_digest(data) == row["digest"], "digest"
                yield split, row, list(ids), list(ones)


def _once(pairs: list[tuple[str, object]]) -> dict:
    assert len(dict(pairs)) == len(pairs), "a key twice"
    return dict(pairs)


def _inside(out: Path, name: str) -> bytes:
    assert (out / name).resolve().is_relative_to(out.resolve()), "link"
    return (out / name).read_bytes()


def _values(data: bytes, dtype: str, length: int) -> tuple[int, ...]:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}".ljust(117) + "\n"
    assert data[:128] == b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode(), "header"
    return struct.unpack(f"<{length}{ {'<u2': 'H', '<u4': 'I', '|u1': 'B', '<i8': 'q'}[dtype] }", data[128:])


# The end of the reader.


def test_the_reader_is_short_and_uses_nothing_of_ours() -> None:
    code = Path(__file__).read_text().split("# The reader uses")[1].split("# The end of the reader.")[0]
    lines = [line for line in code.splitlines()[1:] if line.strip()]
    assert (
        len(lines) <= 40 and "library" not in code and "shards." not in code and "numpy" not in code.split("\n", 1)[1]
    )


def chat(user: str, *parts: tuple[str, str]) -> list[dict]:
    answer = [{"type": kind, "text": text} for kind, text in parts]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything odd: `<u4` (special ids over 65,536, and a tenth special token), shards of 40 tokens, truncation, both
    splits, two text parts in a row, an option with a letter outside ASCII."""
    folder = tmp_path_factory.mktemp("small")
    ranks = {bytes([byte]): byte for byte in range(256)}
    special_ids = {name: 70_000 + i for i, name in enumerate((*SPECIAL_TOKENS, "<|more|>"))}
    call = chat("2+3?", ("python", "2+3"), ("python_output", "5"), ("text", "a"), ("text", "b"))
    records = [call, *(chat("x" * 3 * n, ("text", "é" * n)) for n in range(8)), chat("", ("reasoning", "r"))]
    untrained = {"type": "text", "text": "b", "trained": False}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [untrained], "trained": False}]
    records += [said, [*said, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]]
    (folder / "ü.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = 'task = "conversations"\npath = "ü.jsonl"\n'
    rule = 'stage = "sft"\nmax_tokens = 20\noverflow = "truncate"\n'
    (folder / "r.toml").write_text(f"{rule}[[train]]\n{entry}epochs = 2\n[[val]]\n{entry}rows = 2\n")
    tasks = load_tasks()
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, special_ids, "bytes")
    plan = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 40)
        build(plan, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module", params=["the demo, by its command", "everything odd"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("small" if request.param == "everything odd" else "demo_mid")


def test_read_by_the_page_alone(folder: Path) -> None:
    found = library.open_build(folder)
    documents = list(read_build(folder))
    for split in ("train", "val"):
        read = [document[1:] for document in documents if document[0] == split]
        assert [row for row, _, _ in read] == found[split].index_table().to_pylist()
        assert [(ids, mask) for _, ids, mask in read] == [(d.tokens.tolist(), d.mask.tolist()) for d in found[split]]
        # what the page says about columns, ledger and spans
        assert [row["doc"] for row, _, _ in read] == list(range(len(read)))
        ledger = found.manifest["splits"][split]["entries"]
        for number, entry in enumerate(ledger):
            rows = [row for row, _, _ in read if row["entry"] == number]
            lost = [row["original_tokens"] - row["num_tokens"] for row in rows]
            assert (entry["entry"], entry["documents"], entry["tokens_lost"]) == (number, len(rows), sum(lost))
            assert entry["rows"] == entry["documents"] + sum(entry["dropped"].values())
            assert entry["truncated"] == sum(row["truncated"] for row in rows) == sum(n > 0 for n in lost)
        for row, ids, mask in read:
            assert (len(ids), sum(mask)) == (row["num_tokens"], row["num_supervised"])
            special_ids = found.manifest["tokenizer"]["special_ids"]
            ends = [i for i, token in enumerate(ids) if token == special_ids["<|assistant_end|>"]]
            untrained = [i for i in ends if not mask[i]]
            assert len(untrained) == row["untrained_turns"] or row["truncated"]
            expected = rendered(row["spans"], ids, special_ids)
            assert [0 if i in untrained else one for i, one in enumerate(expected)] == mask


def rendered(spans: list[dict], ids: list[int], special_ids: dict[str, int]) -> list[int]:
    """The mask that the section "Documents" calls for, computed from spans, if all turns are trained."""
    mask = [int(token == special_ids["<|assistant_end|>"]) for token in ids]
    names = {token: name for name, token in special_ids.items()}
    opened = {0: "<|user_start|>", 2: "<|python_start|>", 3: "<|output_start|>"}
    assert names[ids[0]] == "<|bos|>" and ids.count(ids[0]) == 1
    for role, start, length, trained in (span.values() for span in spans):
        inside = ids[start : start + length]
        assert length and names.get(inside[0]) == opened.get(role)
        assert sum(token in names for token in inside) <= 2 * (role not in (1, 4))
        assert role in (1, 2, 4) or not trained
        mask[start : start + length] = [int(trained)] * length
    return mask


def test_the_odd_build_is_odd(small: Path) -> None:
    found = library.open_build(small)
    assert (found.manifest["dtype"], found.manifest["tokenizer"]["vocab_size"]) == ("<u4", 70_010)
    assert len(found["train"].shards) > 3 and verify_full(small) == []
    assert any(document.num_supervised == 0 for document in found["train"])  # cut inside the user's message
    spans = [[tuple(span.values()) for span in row["spans"]] for row in found["val"].index_table().to_pylist()]
    expected = [(0, 1, 6, False), (2, 8, 5, True), (3, 13, 3, False), (1, 16, 1, True), (1, 17, 1, True)]
    assert expected in spans and set(found["train"].index["untrained_turns"]) == {0, 1}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a key twice": lambda out: (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace('"dtype": "<u4"', '"dtype": "<u4", "dtype": "<u4"')
    ),
    "unknown format or version": lambda out: rewrite(out, lambda m: m.update(version=1)),
    "build_id": lambda out: (out / "manifest.json").write_text(
        (out / "manifest.json").read_text().replace("sft", "mid")
    ),
    "path": lambda out: rewrite(out, lambda m: shard_file(m, "mask").update(file="../mask-00000.npy")),
    "size": lambda out: (out / "val" / "mask-00000.npy").open("ab").write(b"\0"),
    "sha256": lambda out: flip(out / "train" / "offsets-00001.npy"),
    "link": lambda out: link(out / "train" / "index-00000.parquet"),
    "header": lambda out: rewrite(out, lambda m: m.update(dtype="<u2")),
}


def shard_file(manifest: dict, kind: str) -> dict:
    return manifest["splits"]["train"]["shards"][0]["files"][kind]


def rewrite(out: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    write_json(out / "manifest.json", manifest | {"build_id": build_id_of(manifest)})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link(file: Path) -> None:
    outside = file.parents[2] / file.name
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize("said", DAMAGE)
def test_what_a_reader_refuses(said: str, small: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small, tmp_path / "out")
    assert list(read_build(out))
    DAMAGE[said](out)
    with pytest.raises(AssertionError, match=said):
        list(read_build(out))
    assert verify_full(out)  # and so do ours
    with pytest.raises(FormatError):
        library.open_build(out)


def test_every_manifest_key_is_on_the_page(folder: Path) -> None:
    text = PAGE.split("## Manifest")[1].split("## What a reader")[0]

    def keys(value: object, names_are_data: bool = False) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from () if names_are_data else (key,)
                yield from keys(item, key in ("special_ids",) or (key == "files" and "canary_sha256" in value))
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    manifest = json.loads((folder / "manifest.json").read_text())
    options = {"words", "words_sha256", "holdout", "phrasings"}  # docs/recipes.md
    missing = {key for key in keys(manifest) if not re.search(rf"\b{key}\b", text)} - options
    assert missing == set()


def test_the_canary_of_the_page(demo_mid: Path) -> None:
    texts = json.loads(re.search(r"^    (\[\".*?\"\])$", PAGE, re.M | re.S)[1])
    assert texts == list(CANARY_TEXTS)
    tokenizer = tokenizers.Tokenizer.from_file(str(demo_mid / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    digest = hashlib.sha256()
    for text in texts:
        ids = tokenizer.encode(text).ids
        digest.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))
    manifest = json.loads((demo_mid / "manifest.json").read_text())
    assert digest.hexdigest() == manifest["tokenizer"]["canary_sha256"]
