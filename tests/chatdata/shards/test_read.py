from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import chatdata
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.verify import verify_quick
from chatdata.disk import write_json
from chatdata.errors import FormatError
from chatdata.recipe import load_recipe
from chatdata.shards.index import index_schema
from chatdata.shards.manifest import build_id_of
from chatdata.shards.write import write_shard
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


# views


def test_views_of_documents(small: chatdata.Build) -> None:
    train = small["train"]
    numbers = [3, 11, 0, 3]
    booleans = np.arange(12) % 5 == 0
    for chosen, expected in [
        (numbers, numbers),
        (np.array(numbers), numbers),
        (pl.Series(numbers), numbers),
        ([-1], [11]),
        (booleans, [0, 5, 10]),
        (booleans.tolist(), [0, 5, 10]),
        (slice(8, None, -3), [8, 5, 2]),
        ([], []),
    ]:
        view = train[chosen]
        assert view.documents.tolist() == expected and len(view) == len(expected)
        assert [d.tokens.tolist() for d in view] == [train[i].tokens.tolist() for i in expected]
        assert view.num_tokens == sum(len(train[i]) for i in expected)
        assert view.index["doc"].to_list() == view.index_table()["doc"].to_pylist() == expected
        assert view.to_dataset().to_list() == [train.to_dataset()[i] for i in expected]
        assert view.names == train.names
    view = train[numbers]
    assert np.shares_memory(view[1].tokens, train[11].tokens)
    assert view[1:][[2, 0]].documents.tolist() == [3, 11] and view[1:].whole is train
    assert view[-1].tokens.tolist() == train[3].tokens.tolist()
    for bad in ([12], [True], "a", [0.5]):
        with pytest.raises(IndexError):
            train[bad]
    with pytest.raises(IndexError, match="document 4 of 4 in train"):
        view[4]
    with pytest.raises(IndexError, match="tokens 0 … 1 of 0 in train"):
        train[[]].tokens(0, 1)
    assert repr(view) == f"View('train', 4 documents, {view.num_tokens} tokens)"


def test_filters(small: chatdata.Build) -> None:
    train = small["train"]
    short = train.filter(pl.col("num_tokens") < 10)
    assert sorted(len(document) for document in short) == [6, 7, 8, 9]
    assert short.filter(pl.col("name") == "conversations", pl.col("row") > 1).index["row"].sort().to_list() == [2, 3]
    assert len(train.filter(pl.col("name") == "gsm8k")) == 0


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> chatdata.Split:
    """30 documents of two turns in shards of at most 100 tokens."""
    folder = tmp_path_factory.mktemp("talks")
    turns = [[("user", "a" * n), ("assistant", "b"), ("user", "c"), ("assistant", "d" * (n % 4))] for n in range(30)]
    rows = [json.dumps([{"role": role, "content": text} for role, text in talk]) for talk in turns]
    (folder / "c.jsonl").write_text("\n".join(rows))
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    tasks = load_tasks()
    plan = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, byte_tokenizer, Locations(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 100)
        build(plan, folder / "out")
    return chatdata.open_build(folder / "out")["train"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 29)), st.sampled_from(["apply", "ignore", "last-turn"]), st.data())
def test_a_view_reads_like_a_split_of_its_documents(
    talks, numbers: list[int], policy: str, data: st.DataObject
) -> None:
    view = talks[numbers]
    whole = talks.mask(0, talks.num_tokens, policy)
    tokens = [token for i in numbers for token in talks[i].tokens.tolist()]
    mask = [bit for i in numbers for bit in whole[talks.offsets[i] : talks.offsets[i + 1]].tolist()]
    assert np.diff(view.offsets).tolist() == [len(talks[i]) for i in numbers] and view.offsets[-1] == len(tokens)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
    assert view.tokens(start, stop).tolist() == tokens[start:stop]
    assert view.mask(start, stop, policy).tolist() == mask[start:stop]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 70), st.integers(0, 30), st.sampled_from(["apply", "ignore", "last-turn"]))
def test_filter_then_to_dataset(talks, num_tokens: int, row: int, policy: str) -> None:
    """The same as a filter of the dataset, whose rows have their lengths and places."""
    view = talks.filter((pl.col("num_tokens") <= num_tokens) | (pl.col("row") == row))
    rows = zip(talks.index["row"].to_list(), talks.to_dataset(policy).to_list(), strict=True)
    expected = [found for number, found in rows if len(found["input_ids"]) <= num_tokens or number == row]
    assert view.to_dataset(policy).to_list() == expected


def test_datasets_of_views_have_names_of_their_own(talks) -> None:
    names = [talks[chosen].to_dataset()._fingerprint for chosen in ([1, 2], [2, 1], [1, 2], slice(None))]
    assert names[0] == names[2] and len({*names}) == 3 and names[3] == talks.to_dataset()._fingerprint


def test_splits_are_pickled_without_their_arrays(talks) -> None:
    view = talks[[5, 6]]
    assert view[0].text() and len(talks.index) == 30 and talks._maps
    for split in (talks, view):
        again = pickle.loads(pickle.dumps(split))
        assert not again._maps and [d.text() for d in again] == [d.text() for d in split]
    assert pickle.loads(pickle.dumps(talks.build)) == talks.build


def test_notebooks_show_tables(talks) -> None:
    build = talks.build
    entry = {"name": "<b>&", "documents": 1500, "tokens": 3000, "supervised": 1000}
    shown = {**build.manifest, "splits": {"train": {**build.manifest["splits"]["train"], "entries": [entry, entry]}}}
    html = chatdata.Build(build.path, shown)["train"]._repr_html_()
    assert ">&lt;b&gt;&amp;</td><td>3,000</td><td>6,000</td><td>33.3%</td></tr>" in html
    assert "30 documents, " in html and "color" not in html and "<b>" not in html
    html = build._repr_html_()
    assert f"Build: build_id {build.manifest['build_id']}, stage sft, chat_format nanochat" in html
    assert ">conversations</td><td>30</td>" in html
    assert talks[:3]._repr_html_ is None  # a notebook shows its repr


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
        assert row["digest"] == xxhash.xxh3_128_digest(document.tokens.tobytes() + document.mask.tobytes())
        assert row["task_position"] == row["row"] == len(document) - 6
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


# A line of docs/format.md under "What a reader must do", damage that breaks it, and what is said. `sign` makes the
# manifest's sizes, hashes and build_id fit the files again, so that nothing but the rule itself can find the damage.
MUST: dict[str, list[tuple[Callable[[Path], object], str]]] = {
    "a folder without `manifest.json`": [
        (lambda out: (out / "manifest.json").unlink(), "out: an unfinished build or no build (no manifest.json)")
    ],
    "another `format`, and any other `version`": [
        (lambda out: sign(out, format="other"), 'manifest.json: format "other", not chatdata'),
        (lambda out: sign(out, version=1), "manifest.json: format version 1; this chatdata reads version 2"),
    ],
    "a key twice in one object": [
        (lambda out: edit(out, '"stage": "mid"', '"stage": "sft", "stage": "mid"'), 'key "stage" twice in one object'),
        (lambda out: edit(out, '"seed"', '"a": {"b": 1, "b": 1}, "seed"'), 'valid JSON: key "b" twice in one object'),
    ],
    "keys, types, ranges and sums of the manifest": [
        (lambda out: sign(out, mask=...), 'manifest.json: no key "mask"; it must be a string'),
        (lambda out: sign(out, mask=1), 'manifest.json, key "mask": must be a string, not 1'),
        (lambda out: sign(out, dtype="<u4"), 'manifest.json, key "dtype": "<u4", but expected "<u2"'),
        (lambda out: sign_split(out, tokens=1), 'key "splits.train.tokens": 1, but expected 138'),
        (lambda out: sign_entry(out, supervised=1), 'key "splits.train.supervised": 24, but expected 1'),
        (lambda out: sign_entry(out, rows=1), 'key "splits.train.entries[0].rows": 1, but expected 12'),
    ],
    "`build_id` does not match": [(lambda out: edit(out, '"seed": 42', '"seed": 43'), "does not match its build_id: ")],
    "files of the wrong size": [
        (lambda out: (out / "train/mask-00001.npy").unlink(), "mask-00001.npy: missing"),
        (lambda out: write(out / "train/tokens-00000.npy", lambda data: data[:-1]), "-00000.npy: 191 bytes, but the"),
        (lambda out: write(out / "train/mask-00000.npy", lambda data: data + b"\0"), "-00000.npy: 161 bytes, but the"),
    ],
    "whose `sha256` does not match": [
        (lambda out: flip(out / "train/offsets-00000.npy", 128 + 8), "offsets-00000.npy: SHA-256 differs from the man"),
        (lambda out: flip(out / "train/index-00002.parquet", -1), "index-00002.parquet: SHA-256 differs from the mani"),
        (lambda out: flip(out / "tokenizer/tokenizer.json", 99), "tokenizer.json: SHA-256 differs from the manifest's"),
        (lambda out: (out / "tokenizer/tokenizer.json").unlink(), "tokenizer/tokenizer.json: missing"),
    ],
    "Refuse any other name": [
        (lambda out: sign_file(out, "mask", "mask-0.npy"), 'mask.file": "mask-0.npy", but expected "mask-00000.npy"'),
        (lambda out: sign_file(out, "index", "../i"), 'index.file": "../i", but expected "index-00000.parquet"'),
        (lambda out: sign_tokenizer(out, "../report.json"), '"../report.json" is not the name of a file in the folder'),
        (lambda out: sign_tokenizer(out, "a\\b"), '"a\\\\b" is not the name of a file in the folder tokenizer'),
    ],
    "links that lead out of OUT": [
        (lambda out: link(out / "train/tokens-00000.npy"), "train/tokens-00000.npy: a link out of the build"),
        (lambda out: link(out / "tokenizer/tokenizer.json"), "tokenizer/tokenizer.json: a link out of the build"),
        (lambda out: link(out / "tokenizer"), "a link out of the build"),
        (lambda out: link(out / "train"), "a link out of the build"),
    ],
    "other headers and lengths": [
        (lambda out: flip(out / "train/tokens-00000.npy", 22), "tokens-00000.npy: <q2 of shape (32,), but the"),
        (lambda out: flip(out / "train/mask-00000.npy", 5), "mask-00000.npy: another header, but the"),
        (lambda out: sign(write(out / "train/mask-00000.npy", lambda data: data + b"\0")), "32 values of |u1 make 160"),
    ],
    "Do not unpickle": [
        (lambda out: sign(write(out / "train/offsets-00000.npy", objects)), ".npy: |O of shape (4,), but the manifest")
    ],
    "`offsets` that": [
        (lambda out: offsets(out, 0, 1), "offsets-00000.npy: offsets do not rise from 0 to 32"),
        (lambda out: offsets(out, -1, 33), "offsets-00000.npy: offsets do not rise from 0 to 32"),
        (lambda out: offsets(out, 1, 2**62), "offsets-00000.npy: offsets do not rise from 0 to 32"),
        (lambda out: offsets(out, 1, 5), "index-00000.parquet: num_tokens differs from the offsets"),
    ],
    "an index": [
        (lambda out: index(out, lambda table: table.slice(1)), "index-00000.parquet: 2 rows for 3 documents"),
        (lambda out: index(out, lambda table: table.drop(["spans"])), "columns are not those of the format"),
        (lambda out: index(out, one_supervised), "index-00000.parquet: num_supervised does not add up to 6"),
        (lambda out: sign(write(out / "train/index-00000.parquet", backwards)), "not a readable Parquet file: "),
    ],
}


@pytest.mark.parametrize(("line", "number"), [(line, i) for line, cases in MUST.items() for i in range(len(cases))])
def test_opening_keeps_every_must_of_the_page(small: chatdata.Build, line: str, number: int) -> None:
    """And `verify --level quick`, which lists what `open_build` stops at, says the same."""
    page = (Path(__file__).parents[3] / "docs/format.md").read_text()
    assert line in " ".join(page.split("## What a reader must")[1].split("\n## ")[0].split())
    damage, said = MUST[line][number]
    chatdata.open_build(small.path)
    damage(small.path)
    with pytest.raises(FormatError) as caught:
        chatdata.open_build(small.path)
    assert said in str(caught.value) and str(caught.value).startswith(str(small.path))
    assert verify_quick(small.path)[0] == str(caught.value)


def sign(path: Path, **changes: object) -> None:
    """Sizes and hashes as the files now have them, keys of the manifest changed (removed for ...), then build_id."""
    out = next(folder for folder in (path, *path.parents) if (folder / "manifest.json").is_file())
    manifest = json.loads((out / "manifest.json").read_text()) | changes
    for shard in manifest["splits"]["train"]["shards"]:
        for record in shard["files"].values():
            if (file := out / "train" / record["file"]).is_file():
                content = file.read_bytes()
                record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {key: value for key, value in manifest.items() if value is not ...}
    write_json(out / "manifest.json", manifest | {"build_id": build_id_of(manifest)})


def sign_split(out: Path, **changes: object) -> None:
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    sign(out, splits={"train": splits["train"] | changes})


def sign_entry(out: Path, **changes: object) -> None:
    (entry,) = json.loads((out / "manifest.json").read_text())["splits"]["train"]["entries"]
    sign_split(out, entries=[entry | changes])


def sign_file(out: Path, kind: str, name: str) -> None:
    splits = json.loads((out / "manifest.json").read_text())["splits"]
    splits["train"]["shards"][0]["files"][kind]["file"] = name
    sign(out, splits=splits)


def sign_tokenizer(out: Path, name: str) -> None:
    tokenizer = json.loads((out / "manifest.json").read_text())["tokenizer"]
    tokenizer["files"][name] = "0" * 64
    sign(out, tokenizer=tokenizer)


def edit(out: Path, old: str, new: str) -> None:
    text = (out / "manifest.json").read_text()
    assert text.count(old) >= 1
    (out / "manifest.json").write_text(text.replace(old, new, 1))


def write(file: Path, change: Callable[[bytes], bytes]) -> Path:
    file.write_bytes(change(file.read_bytes()))
    return file


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0x04
    file.write_bytes(data)


def link(path: Path) -> None:
    outside = path.parents[1] / f"outside-{path.name}" if path.is_dir() else path.parents[2] / path.name
    path.rename(outside)
    path.symlink_to(outside)


def offsets(out: Path, place: int, value: int) -> None:
    def change(data: bytes) -> bytes:
        values = np.frombuffer(data[128:], "<i8").copy()
        values[place] = value
        return data[:128] + values.tobytes()

    sign(write(out / "train/offsets-00000.npy", change))


def index(out: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = out / "train/index-00000.parquet"
    table = change(pq.ParquetFile(file).read())
    pq.write_table(table, file)
    sign(out)


def backwards(data: bytes) -> bytes:
    return data[::-1]


def objects(data: bytes) -> bytes:
    return data.replace(b"'<i8', ", b"'|O', ", 1).replace(b" }", b"  }", 1)


def one_supervised(table: pa.Table) -> pa.Table:
    place = table.column_names.index("num_supervised")
    return table.set_column(place, "num_supervised", pa.array([1] * len(table), pa.int32()))


def test_an_index_that_changes_after_opening(small: chatdata.Build) -> None:
    """Or one that is signed, but whose other columns are wrong: a line names the file, never pyarrow's own error."""
    train, file = small["train"], small.path / "train/index-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"2")
    for read in (lambda: train.index_table(), lambda: train.index, lambda: train.mask(0, 9, "last-turn")):
        with pytest.raises(FormatError, match=r"index-00000.parquet: not a readable Parquet file: "):
            read()
    file.write_bytes(content)
    spans = pq.ParquetFile(file).read()["spans"].to_pylist()
    spans[0][0]["length"] = 2**31
    place = pa.array(spans, index_schema().field("spans").type)
    index(small.path, lambda table: table.set_column(len(table.columns) - 1, "spans", place))
    with pytest.raises(FormatError, match=r"index-00000.parquet: spans overlap or leave their document"):
        chatdata.open_build(small.path)["train"].mask(0, 9, "last-turn")


def test_none_is_no_document(small: chatdata.Build) -> None:
    with pytest.raises(IndexError, match=r"train: None is neither a number, a slice nor a list"):
        small["train"][None]


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
