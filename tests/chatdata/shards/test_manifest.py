"""The manifest: what is refused, and how a wrong key is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatdata.disk import write_json
from chatdata.errors import FormatError
from chatdata.shards.manifest import build_id_of, contradictions, parse_manifest, read_manifest

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


def changed(demo_mid: Path, folder: Path, place: list[Any], value: object) -> Path:
    """A folder with the demo's manifest, the value at `place` replaced (removed for ...), signed again."""
    manifest = json.loads((demo_mid / "manifest.json").read_text())
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    manifest["build_id"] = build_id_of(manifest)
    write_json(folder / "manifest.json", manifest)
    return folder


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["dtype"], ..., ': no key "dtype"; it must be <u2 or <u4'),
        (["dtype"], "<u8", ', key "dtype": "<u8"; did you mean "<u4"?'),
        (["splits", "train", "entries", 3, "rows"], "4", ', key "splits.train.entries[3].rows": must be an integer'),
        (["splits", "val", "entries", 0, "rows"], 2**53, ", not 9007199254740992"),
        (
            ["splits", "val", "entries", 0, "dropped", "x y"],
            -1,
            '.dropped[\\"x y\\"]": must be an integer of at least 0',
        ),
        (["splits", "train", "shards", 0, "files", "mask"], ..., 'shards[0].files": no key "mask"; it must be a table'),
        (["splits", "train", "shards", 0, "tokens"], True, 'shards[0].tokens": must be an integer of at least 1 and'),
        (["tokenizer", "files", "x"], "0" * 63 + "G", 'files.x": must be 64 hexadecimal digits, not "000'),
        (["tokenizer", "files", "x"], "0" * 64 + "\n", 'files.x": must be 64 hexadecimal digits, not "000'),
        (["recipe", "limit"], 0, ', key "recipe.limit": must be an integer of at least 1'),
        (["version"], 1, ": format version 1; this chatdata reads version 2: build it again"),
        (["format"], "other", ': format "other", not chatdata'),
        (["recipe", "stage"], "sft", ', key "recipe.stage": "sft", but expected "mid"'),
        (["recipe", "val"], ..., ', key "splits": ["train", "val"], but expected ["train"]'),
        (["splits", "val", "entries", 1, "entry"], 0, ', key "splits.val.entries[1].entry": 0, but expected 1'),
        (["splits", "val", "entries"], [], ', key "splits.val.entries": must be a list of one or more entries, not []'),
        (["splits", "val", "entries", 0, "source"], "x", ', key "splits.val.entries[0].source": "x", but expected ["'),
        (["splits", "val", "entries", 0, "split"], "x", ', key "splits.val.entries[0].split": "x", but expected "'),
        (["splits", "val", "shards"], [], ', key "splits.val.shards": must be a list of one or more shards, not []'),
        (["recipe", "train", 0, "task"], ["x"], ', key "recipe.train[0].task": must be a string, not ["x"]'),
        (["recipe", "train"], [1], ', key "recipe.train[0]": must be a table, not 1'),
        (["tokenizer", "special_ids", "<|bos|>"], ..., 'key "tokenizer.special_ids": <|bos|> missing'),
        (["tokenizer", "special_ids", "<|bos|>"], 400, "must be distinct ids below vocab_size"),
        (["tokenizer", "vocab_size"], 2**20, ', key "dtype": "<u2", but expected "<u4"'),
        (["tokenizer", "files", ".."], "0" * 64, '".." is not the name of a file in the folder tokenizer'),
        (["tokenizer", "files", ""], "0" * 64, '"" is not the name of a file in the folder tokenizer'),
    ],
)
def test_a_wrong_key_is_named(demo_mid: Path, tmp_path: Path, place: list[Any], value: object, message: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_manifest(changed(demo_mid, tmp_path, place, value))
    assert str(caught.value).startswith(f"{tmp_path}/manifest.json") and message in str(caught.value)


def test_other_keys_are_allowed(demo_mid: Path, tmp_path: Path) -> None:
    for place in (["more"], ["recipe", "more"], ["splits", "train", "shards", 0, "files", "more"]):
        manifest = read_manifest(changed(demo_mid, tmp_path, place, {"a": [1]}))
        assert manifest != json.loads((demo_mid / "manifest.json").read_text())


def test_a_manifest_changed_after_the_build(demo_mid: Path, tmp_path: Path) -> None:
    text = (demo_mid / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"stage": "mid"', '"stage": "sft"'))
    with pytest.raises(FormatError, match=r"manifest.json: does not match its build_id"):
        read_manifest(tmp_path)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_refused_in_one_line_or_fits(demo_mid: Path, tmp_path: Path, data: st.DataObject) -> None:
    manifest = copy.deepcopy(json.loads((demo_mid / "manifest.json").read_text()))
    place: list[Any] = []
    parent: Any = manifest
    while isinstance(parent, (dict, list)) and parent and (not place or data.draw(st.integers(0, 9))):
        place.append(data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent)))))
        parent = parent[place[-1]]
    try:
        list(contradictions(parse_manifest(changed(demo_mid, tmp_path, place, data.draw(JSON)))))
    except FormatError as error:
        assert len(str(error).splitlines()) == 1
