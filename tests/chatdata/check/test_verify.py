from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatdata import open_build
from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.check.rerender import choose, verify_semantic
from chatdata.check.verify import verify_full, verify_quick
from chatdata.disk import write_json
from chatdata.document import Document
from chatdata.errors import MissingSource, RecipeError
from chatdata.recipe import load_recipe
from chatdata.render import specification as render
from chatdata.render.contract import Rules, check_documents
from chatdata.shards.index import index_arrays, index_schema
from chatdata.shards.manifest import FILE_KINDS, build_id_of, file_name
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

TOOL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "2+3"},
    {"type": "python_output", "text": "5"},
    {"type": "text", "text": "five"},
]
RECIPE = """
stage = "sft"
max_tokens = 40
overflow = "truncate"
zero_supervised = "drop"
[[train]]
task = "conversations"
path = "c.jsonl"
[[train]]
task = "identity"
path = "i.jsonl"
epochs = 2
[[val]]
task = "conversations"
path = "c.jsonl"
rows = 4
"""


def chat(user: str, *answers: Any) -> list[dict[str, Any]]:
    turns = [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}] for answer in answers]
    return [message for turn in turns for message in turn]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources and a recipe: tool calls, several turns, documents cut by max_tokens, one dropped, one on a user turn."""
    lines = [chat("x" * n, TOOL, "y" * n) for n in range(1, 9)] + [chat("u" * 60, "gone"), chat("q", "a")]
    lines.append([*chat("q", "a"), {"role": "user", "content": "more?"}])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(chat("who?", f"me {i}")) + "\n" for i in range(5)))
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def build_in(folder: Path, tokenizer: Tokenizer, out: str = "out") -> Path:
    tasks = load_tasks()
    plan = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder))
    build(plan, folder / out)
    return folder / out


@pytest.fixture
def built(folder: Path, byte_tokenizer: Tokenizer) -> Path:
    return build_in(folder, byte_tokenizer)


def semantic(built: Path, **options: Any) -> list[str]:
    tasks = load_tasks()
    recipe = load_recipe(str(built.parent / "r.toml"), tasks)
    return verify_semantic(built, Locations(Path()), tasks, recipe=recipe, **options)


def edit(built: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> None:
    """Let `change` edit tokens, mask, offsets and index (a list of rows) of a shard; write and sign it all again, so
    that nothing but the contract can find the change."""
    folder = built / split
    arrays: dict[str, Any] = {
        kind: np.array(np.load(folder / f"{kind}-00000.npy")) for kind in ("tokens", "mask", "offsets")
    }
    arrays["index"] = pq.ParquetFile(folder / "index-00000.parquet").read().to_pylist()
    change(arrays)
    for kind in ("tokens", "mask", "offsets"):
        np.save(folder / f"{kind}-00000.npy", arrays[kind])
    pq.write_table(pa.Table.from_pylist(arrays["index"], schema=index_schema()), folder / "index-00000.parquet")
    sign(built)


def sign(built: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Sizes, hashes and sums of the manifest as the files now have them, then build_id."""
    manifest = json.loads((built / "manifest.json").read_text())
    change(manifest)
    for name, split in manifest["splits"].items():
        for shard in split["shards"]:
            for record in shard["files"].values():
                content = (built / name / record["file"]).read_bytes()
                record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["build_id"] = build_id_of(manifest)
    write_json(built / "manifest.json", manifest)


def redo_digest(arrays: dict[str, Any], doc: int) -> None:
    part = slice(*arrays["offsets"][doc : doc + 2].tolist())
    ids, mask = arrays["tokens"][part].astype("<u4").tobytes(), arrays["mask"][part].tobytes()
    arrays["index"][doc]["digest"] = hashlib.blake2b(ids + mask, digest_size=16).digest()


def find(arrays: dict[str, Any], name: str, tokenizer: Tokenizer) -> int:
    return int(np.flatnonzero(arrays["tokens"] == tokenizer.special_ids[f"<|{name}|>"])[0])


def test_a_sound_build(built: Path, demo_mid: Path) -> None:
    index = open_build(built)["train"].index
    assert index["truncated"].any() and index["num_tool_calls"].sum()
    assert open_build(built).manifest["splits"]["train"]["entries"][0]["dropped"]["zero_supervised"] == 1
    for path in (built, demo_mid):
        assert verify_full(path) == []
    assert semantic(built) == []
    assert verify_semantic(demo_mid, Locations(Path()), load_tasks()) == []  # a shipped recipe needs no word about it


def test_semantic_through_the_command_line(built: Path, demo_mid: Path, chatdata: Callable) -> None:
    result = chatdata("verify", demo_mid, "--level", "semantic", "--share", "0.2")
    assert (result.returncode, result.stdout) == (0, f"{demo_mid}: no damage found (semantic)\n")
    assert "check train: " in result.stderr and "hash: " in result.stderr and "demo_math train: " in result.stderr
    recipe = built.parent / "r.toml"
    assert chatdata("verify", built, "--level", "semantic", "--recipe", recipe).returncode == 0
    source = built.parent / "i.jsonl"
    source.write_text(source.read_text().replace("me 3", "me 7"))
    result = chatdata("verify", built, "--level", "semantic", "--recipe", recipe, "--json")
    assert (result.returncode, json.loads(result.stdout)["problems"]) == (
        3,
        ["source i.jsonl: i.jsonl has another SHA-256 than the build's"],
    )
    result = chatdata("verify", built, "--recipe", recipe)
    assert (result.returncode, result.stderr) == (2, "Error: --recipe goes with --level semantic\n")


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_flipped_byte_is_named_with_its_file(built: Path, kind: str) -> None:
    file = built / "train" / file_name(kind, 0)
    content = bytearray(file.read_bytes())
    for place in (140, len(content) - 9):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert f"{file}: SHA-256 differs from the manifest's" in verify_full(built)
    file.write_bytes(content[:-3])
    assert any(problem.startswith(f"{file}: {len(content) - 3:,} bytes, but") for problem in verify_full(built))


def test_every_byte_of_a_header_counts(built: Path) -> None:
    file = built / "train" / "mask-00000.npy"
    content = file.read_bytes()
    for place in range(128):  # numpy's own parser would raise five kinds of errors here
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        problems = verify_quick(built)
        assert len(problems) == 1 and problems[0].startswith(f"{file}: ")


def add_empty_span(spans: list[dict[str, int]]) -> None:
    text = next(span for span in spans if span["role"] == 1)
    spans.insert(spans.index(text) + 1, {"role": 1, "start": text["start"] + text["length"], "length": 0})


# what is edited, and what the contract says of it; `built` is signed again, so that nothing else can
EDITS: list[tuple[Callable[[dict[str, Any], Callable[[str], int]], Any], str]] = [
    (
        lambda a, at: a["mask"].__setitem__(at("output_start") + 1, 1),
        "mask-00000.npy: supervised token inside tool out",
    ),
    (lambda a, at: a["mask"].__setitem__(at("output_start"), 1), "mask-00000.npy: output_start supervised: train"),
    (lambda a, at: a["mask"].__setitem__(at("assistant_end"), 0), "mask-00000.npy: assistant_end not supervised"),
    (lambda a, at: a["mask"].__setitem__(at("python_start") + 1, 0), "unsupervised token inside a python part"),
    (lambda a, at: a["mask"].__setitem__(at("assistant_start") + 1, 0), "unsupervised token inside assistant text"),
    (lambda a, at: a["mask"].__setitem__(at("user_start") + 1, 1), "supervised token inside a user message"),
    (lambda a, at: a["mask"].__setitem__(at("bos"), 1), "mask-00000.npy: bos supervised: train document 0, position 0"),
    (
        lambda a, at: a["mask"].__setitem__(7, 2),
        "mask-00000.npy: mask is neither 0 nor 1: train document 0, position 7",
    ),
    (lambda a, at: a["tokens"].__setitem__(2, 265), "tokens-00000.npy: id outside the vocabulary of 265: train doc"),
    (lambda a, at: a["tokens"].__setitem__(2, 65535), "tokens-00000.npy: id outside the vocabulary of 265: train doc"),
    (lambda a, at: a["tokens"].__setitem__(0, 97), "tokens-00000.npy: does not begin with bos: train document 0, posi"),
    (lambda a, at: a["tokens"].__setitem__(2, 256), "tokens-00000.npy: bos inside a document: train document 0, posi"),
    (lambda a, at: a["tokens"].__setitem__(at("python_end"), 97), "tokens-00000.npy: python_start without its end"),
    (lambda a, at: a["tokens"].__setitem__(at("python_start"), 97), "tokens-00000.npy: python_end without its start"),
    (lambda a, at: a["tokens"].__setitem__(at("assistant_start"), 97), "text outside a message"),
    (lambda a, at: a["tokens"].__setitem__(at("user_end"), 97), "tokens-00000.npy: user_start without its end"),
    (
        lambda a, at: a["index"][3].update(num_supervised=1),
        "index-00000.parquet: num_supervised differs from the mask: t",
    ),
    (
        lambda a, at: a["index"][3].update(num_turns=0),
        "index-00000.parquet: num_turns differs from the delimiters: tra",
    ),
    (lambda a, at: a["index"][3].update(original_tokens=3), "original_tokens does not agree with num_tokens"),
    (lambda a, at: a["index"][3].update(digest=b"\0" * 16), "digest differs from tokens and mask: train document 3"),
    (lambda a, at: a["index"][3].update(doc=4), "index-00000.parquet: doc does not count up: train document 3"),
    (lambda a, at: a["index"][3].update(entry=3), "index-00000.parquet: entry is not one of 0 … 2: train document 3"),
    (lambda a, at: a["index"][3].update(task="gsm8k"), "task differs from the entry's: train document 3"),
    (lambda a, at: a["index"][3]["spans"].pop(), "index-00000.parquet: spans differ from the delimiters: train docum"),
    (lambda a, at: a["index"][3]["spans"][0].update(length=2), "spans differ from the delimiters: train document 3"),
    (lambda a, at: add_empty_span(a["index"][3]["spans"]), "spans differ from the delimiters: train document 3"),
    (lambda a, at: a["index"][3].update(row=None), "index-00000.parquet: column row has nulls"),
    (lambda a, at: a["index"][3].update(truncated=not a["index"][3]["truncated"]), "(conversations): truncated is"),
]


@pytest.mark.parametrize(("change", "expected"), EDITS)
def test_the_contract_finds_what_is_signed(
    built: Path, byte_tokenizer: Tokenizer, change: Callable, expected: str
) -> None:
    def apply(arrays: dict[str, Any]) -> None:
        change(arrays, lambda name: find(arrays, name, byte_tokenizer))

    edit(built, apply)
    problems = verify_full(built)
    assert not any("SHA-256" in problem or "bytes" in problem for problem in problems)
    assert any(expected in problem for problem in problems), problems


def test_swapped_masks(folder: Path, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mask files of one length: found by hash, and by the contract where the manifest was signed again."""
    lines = [chat("x" * n, "y" * (10 - n)) for n in range(1, 9)]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    monkeypatch.setattr("chatdata.build.splits.MAX_SHARD_TOKENS", 30)
    built = build_in(folder, byte_tokenizer)
    one, two = (built / "train" / f"mask-0000{number}.npy" for number in (0, 1))
    content = [file.read_bytes() for file in (one, two)]
    assert len(content[0]) == len(content[1]) and verify_full(built) == []
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    assert {f"{file}: SHA-256 differs from the manifest's" for file in (one, two)} <= set(verify_full(built))
    sign(built)
    problems = [problem for problem in verify_full(built) if "supervised token inside" in problem]
    assert {problem.split(": ")[0] for problem in problems} == {str(one), str(two)}


def test_a_manifest_of_another_build(built: Path, folder: Path, byte_tokenizer: Tokenizer) -> None:
    (folder / "c.jsonl").write_text((folder / "c.jsonl").read_text().replace("five", "FIVE"))
    other = build_in(folder, byte_tokenizer, "other")
    shutil.copy(other / "manifest.json", built / "manifest.json")
    named = {problem.split(": ")[0] for problem in verify_full(built)}
    assert {str(built / "train" / name) for name in ("tokens-00000.npy", "index-00000.parquet")} <= named


def test_nothing_leaves_the_folder(built: Path) -> None:
    outside = built.parent / "outside.npy"
    file = built / "train" / "mask-00000.npy"
    file.rename(outside)
    file.symlink_to(outside)
    assert verify_quick(built) == [f"{file}: a link out of the build"]
    (built / "notes.txt").write_text("hi")
    assert f"{built / 'notes.txt'}: not a file of the build" in verify_full(built)

    def rename(manifest: dict[str, Any]) -> None:
        manifest["splits"]["../train"] = manifest["splits"].pop("val")
        manifest["tokenizer"]["files"]["../../c.jsonl"] = "0" * 64

    manifest = json.loads((built / "manifest.json").read_text())
    rename(manifest)
    manifest["build_id"] = build_id_of(manifest)
    write_json(built / "manifest.json", manifest)
    problems = verify_full(built)
    assert f'{built}/manifest.json, key "splits": ["../train", "train"], but expected ["train", "val"]' in problems
    assert any('"../../c.jsonl" is not the name of a file' in problem for problem in problems)


def test_many_problems_of_a_kind_are_counted(built: Path) -> None:
    edit(built, lambda arrays: arrays["mask"].fill(0))
    problems = [problem for problem in verify_full(built) if "assistant_end not supervised" in problem]
    file, documents = built / "train" / "mask-00000.npy", len(open_build(built)["train"])
    assert len(problems) == 11
    assert problems[-1].startswith(f"{file}: assistant_end not supervised: and ")
    ends = [open_build(built)["train"][i].tokens.tolist().count(260) > 0 for i in range(documents)]
    assert int(problems[-1].split("and ")[1].split()[0]) == sum(ends) - 10


def test_semantic_finds_another_renderer(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = render.render_conversation

    def one_token_more(tokenizer: Tokenizer, conversation: Any) -> Document:
        document = original(tokenizer, conversation)
        tokens, mask = (np.insert(values, 2, value) for values, value in ((document.tokens, 97), (document.mask, 0)))
        return Document(tokens, mask, document.spans, tokenizer)

    monkeypatch.setattr(render, "render_conversation", one_token_more)
    problems = semantic(built)
    assert len(problems) == 11 and all(": document " in problem for problem in problems[:10])
    assert "but rendered again" in problems[0] and problems[10].endswith(
        " more differences from what is rendered again"
    )


def test_semantic_finds_one_other_token(built: Path) -> None:
    def change(arrays: dict[str, Any]) -> None:
        start = int(arrays["offsets"][5])
        assert arrays["tokens"][start + 2] < 256
        arrays["tokens"][start + 2] ^= 1
        redo_digest(arrays, 5)

    edit(built, change)
    assert verify_full(built) == []
    problems = semantic(built)
    assert len(problems) == 1 and f"{built}/train: document 5 (" in problems[0] and "id at position 2 is" in problems[0]


def test_semantic_finds_another_order(built: Path) -> None:
    def swap(arrays: dict[str, Any]) -> None:
        one, *rest = arrays["index"]
        other = next(row for row in rest if row["entry"] == one["entry"])
        for key in ("row", "position"):
            one[key], other[key] = other[key], one[key]

    edit(built, swap)
    assert verify_full(built) == []
    assert any("is not in the order of the recipe's mixture" in problem for problem in semantic(built))


def test_semantic_needs_what_the_build_was_made_of(built: Path) -> None:
    with pytest.raises(MissingSource, match=r"c\.jsonl: no such file"):  # the manifest names files without folders
        verify_semantic(built, Locations(Path()), load_tasks())
    recipe = built.parent / "r.toml"
    recipe.write_text(RECIPE.replace("epochs = 2", "epochs = 3"))
    with pytest.raises(RecipeError, match=r"^r is not the recipe of this build: train\[3\] is absent in the build"):
        semantic(built)


@given(st.lists(st.integers(0, 5), max_size=400), st.floats(0, 1))
def test_the_choice(entries: list[int], share: float) -> None:
    chosen = choose(np.array(entries, dtype=np.int64), share).tolist()
    assert sorted(set(chosen)) == chosen and len(chosen) >= min(len(entries), max(100, share * len(entries)))
    assert {entries[i] for i in chosen} == set(entries)


def test_the_choice_is_spread() -> None:
    chosen = choose(np.zeros(100_000, dtype=np.int64), 0.01)
    assert len(chosen) == 1000
    assert all(60 < count < 140 for count in np.histogram(chosen, bins=10)[0])


TEXT = st.text(max_size=4)
PARTS = st.lists(
    st.builds(
        lambda kind, text: {"type": kind, "text": text}, st.sampled_from(["text", "python", "python_output"]), TEXT
    )
)
CHATS = st.lists(st.tuples(TEXT, st.one_of(TEXT, PARTS)), min_size=1, max_size=3)


@given(st.lists(st.tuples(CHATS, st.booleans(), st.integers(2, 60)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_what_the_renderer_makes_keeps_the_contract(byte_tokenizer: Tokenizer, chats: list) -> None:
    """Any conversation, whole or cut anywhere, is sound; with any one mask flipped it is not."""
    documents, rows = [], []
    for turns, ends_on_user, limit in chats:
        messages = [message for user, answer in turns for message in chat(user, answer)]
        whole = render.render_conversation(byte_tokenizer, messages[:-1] if ends_on_user else messages)
        cut = min(limit, len(whole))
        documents.append((whole.tokens[:cut], whole.mask[:cut]))
        spans = [(s.role, s.start, min(s.length, cut - s.start)) for s in whole.spans if s.start < cut]
        row = {"num_tokens": cut, "num_supervised": int(whole.mask[:cut].sum()), "original_tokens": len(whole)}
        row["num_turns"] = int(np.isin(whole.tokens, [257, 259]).sum())
        row |= {"num_tool_calls": sum(s.role == 2 for s in whole.spans), "truncated": cut < len(whole)}
        ids = whole.tokens[:cut].astype("<u4").tobytes()
        row["digest"] = hashlib.blake2b(ids + whole.mask[:cut].tobytes(), digest_size=16).digest()
        row["spans"] = [dict(zip(("role", "start", "length"), span, strict=True)) for span in spans]
        rows.append(row | {"doc": 0, "row": 0, "position": 0, "entry": 0, "task": "t"})
    tokens, mask = (np.concatenate([document[i] for document in documents]) for i in (0, 1))
    offsets = np.cumsum([0, *(len(ids) for ids, _ in documents)])
    index = index_arrays(pa.Table.from_pylist(rows, schema=index_schema()))
    rules = Rules(byte_tokenizer.special_ids, 265, "mid")
    cuts = {'length against the recipe\'s overflow = "keep"'}  # every document has a limit of its own here
    assert {finding.kind for finding in check_documents(tokens, mask, offsets, index, rules)} <= cuts
    for place in range(0, len(mask), max(1, len(mask) // 12)):
        flipped = mask.copy()
        flipped[place] ^= 1
        found = [
            finding for finding in check_documents(tokens, flipped, offsets, index, rules) if finding.file == "mask"
        ]
        document = int(np.searchsorted(offsets, place, side="right")) - 1
        assert [(f.documents.tolist(), f.positions.tolist()) for f in found] == [
            ([document], [place - offsets[document]])
        ]


def test_pieces_make_no_difference(demo_mid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_build(demo_mid)["train"]
    arrays = [np.array(split.map(kind, 0)) for kind in ("tokens", "mask", "offsets")]
    arrays[1][::97] ^= 1
    index = index_arrays(split.index_table())
    rules = Rules(split.build.tokenizer.special_ids, 400, "mid")
    found = []
    for tokens in (1 << 22, 1000, 100):
        monkeypatch.setattr("chatdata.render.contract.BLOCK_TOKENS", tokens)
        findings = check_documents(*arrays, index, rules)
        found.append({f.kind: list(zip(f.documents.tolist(), f.positions.tolist(), strict=True)) for f in findings})
    assert found[0] == found[1] == found[2] and len(found[0]) > 5


def test_plain_text(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "two"}\n')
    entries = "".join(f'[[train]]\ntask = "text"\npath = "{name}"\n' for name in ("a.txt", "b.jsonl"))
    (tmp_path / "r.toml").write_text(f'stage = "base"\nmax_tokens = 3\noverflow = "truncate"\n{entries}')
    built = build_in(tmp_path, byte_tokenizer)
    assert semantic(built) == []
    edit(built, lambda arrays: arrays["tokens"].__setitem__(-1, 257))
    assert any("tokens-00000.npy: user_start in plain text" in problem for problem in verify_full(built))


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.just("\ud800")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_manifest_crashes_quick(demo_mid: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any value of a manifest replaced, removed or added, signed or not: lines, never a traceback."""
    folder = tmp_path / "fuzz"
    if not folder.exists():
        shutil.copytree(demo_mid, folder)
    manifest = copy.deepcopy(open_build(demo_mid).manifest)
    parent: Any = manifest
    key: Any = data.draw(st.sampled_from(sorted(parent)))
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.integers(0, 9)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    if data.draw(st.booleans()):
        parent[key] = data.draw(JSON)
    else:
        del parent[key]
    with contextlib.suppress(UnicodeEncodeError):
        manifest["build_id"] = build_id_of(manifest) if "build_id" in manifest else "x"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    problems = verify_quick(folder)
    assert all(problem.startswith(str(folder)) and "\n" not in problem for problem in problems)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{}", "[]", "\x00", '{"format": "\\ud800"}', "NaN"])
def test_no_file_crashes_quick(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert len(verify_quick(tmp_path)) == 1
