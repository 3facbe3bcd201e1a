"""chatdata verify, levels quick and full."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatdata import open_build
from chatdata.check.verify import verify_full, verify_quick
from chatdata.disk import write_json
from chatdata.shards.manifest import FILE_KINDS, FILE_NAMES, build_id_of
from chatdata.tokenizer.bpe import Tokenizer


def test_a_sound_build(built: Path, demo_mid: Path) -> None:
    index = open_build(built)["train"].index
    assert index["truncated"].any() and index["num_tool_calls"].sum()
    assert open_build(built).manifest["splits"]["train"]["entries"][0]["dropped"]["zero_supervised"] == 1
    for path in (built, demo_mid):
        assert verify_full(path) == []


@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_flipped_byte_is_named_with_its_file(built: Path, kind: str) -> None:
    file = built / "train" / FILE_NAMES[kind].format(0)
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
    spans.insert(spans.index(text) + 1, {**text, "start": text["start"] + text["length"], "length": 0})


def find(arrays: dict[str, Any], name: str, tokenizer: Tokenizer) -> int:
    return int(np.flatnonzero(arrays["tokens"] == tokenizer.special_ids[f"<|{name}|>"])[0])


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
    (
        lambda a, at: a["index"][3]["spans"][0].update(trained=True),
        "spans differ from the delimiters: train document 3",
    ),
    (lambda a, at: a["index"][3].update(untrained_turns=-1), "untrained_turns differs from the mask: train document 3"),
    (lambda a, at: a["index"][3].update(row=None), "index-00000.parquet: column row has nulls"),
    (lambda a, at: a["index"][3].update(truncated=not a["index"][3]["truncated"]), "(conversations): truncated is"),
]


@pytest.mark.parametrize(("change", "expected"), EDITS)
def test_the_contract_finds_what_is_signed(
    built: Path, edit: Callable, byte_tokenizer: Tokenizer, change: Callable, expected: str
) -> None:
    def apply(arrays: dict[str, Any]) -> None:
        change(arrays, lambda name: find(arrays, name, byte_tokenizer))

    edit(built, apply)
    problems = verify_full(built)
    assert not any("SHA-256" in problem or "bytes" in problem for problem in problems)
    assert any(expected in problem for problem in problems), problems


def test_swapped_masks(
    folder: Path, build_in: Callable, sign: Callable, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mask files of one length: found by hash, and by the contract where the manifest was signed again."""
    lines = [
        [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * (10 - n)}] for n in range(1, 9)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    monkeypatch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 30)
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


def test_a_manifest_of_another_build(built: Path, folder: Path, build_in: Callable, byte_tokenizer: Tokenizer) -> None:
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


def test_many_problems_of_a_kind_are_counted(built: Path, edit: Callable) -> None:
    edit(built, lambda arrays: arrays["mask"].fill(0))
    problems = [problem for problem in verify_full(built) if "assistant_end not supervised" in problem]
    file, documents = built / "train" / "mask-00000.npy", len(open_build(built)["train"])
    assert len(problems) == 11
    assert problems[-1].startswith(f"{file}: assistant_end not supervised: and ")
    ends = [open_build(built)["train"][i].tokens.tolist().count(260) > 0 for i in range(documents)]
    assert int(problems[-1].split("and ")[1].split()[0]) == sum(ends) - 10


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


def test_another_tokenizer(built: Path) -> None:
    file = built / "tokenizer" / "tokenizer.json"
    file.write_text("hi")
    assert verify_quick(built) == [f"{file}: SHA-256 differs from the manifest's"]
