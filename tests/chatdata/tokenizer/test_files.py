"""Tokenizer files that would not mean the same ids are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import Tokenizer, train_tokenizer
from chatdata.tokenizer.files import read_json, save_tokenizer


def test_tokenizer_json_that_means_something_else(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    save_tokenizer(train_tokenizer(iter(["the cat and the hat, " * 60]), 272), tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    split, byte_level = good["pre_tokenizer"]["pretokenizers"]
    path = tmp_path / "x.json"

    def read(**changes: object) -> None:
        path.write_text(json.dumps({**good, **changes}))
        read_json(path)

    def with_split(**changes: object) -> dict:
        return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, **changes}, byte_level]}}

    read()
    merges = good["model"]["merges"]
    hello = {**good["added_tokens"][0], "content": "hello", "id": 999, "special": False}
    for changes, message in [
        (with_split(behavior="Removed"), "its Split must be Isolated"),
        (with_split(behavior="MergedWithNext"), "tiktoken cannot do MergedWithNext"),
        (with_split(invert=True), "its Split must be Isolated, not inverted"),
        (with_split(pattern={"String": " "}), "with a Regex"),
        (with_split(pattern={"Regex": r"\w+"}), "the split pattern loses text"),
        ({"model": {**good["model"], "dropout": 0.5}}, "its model has dropout = 0.5"),
        ({"model": {**good["model"], "ignore_merges": False, "merges": merges[:3]}}, "no merge makes the token"),
        ({"added_tokens": [*good["added_tokens"], hello]}, "'hello' is added but not special"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            read(**changes)


@pytest.mark.parametrize("bad", ["x", 1.5, None, True, -1, 2**32, 2**70])
def test_an_id_that_is_no_number_of_32_bits(tmp_path: Path, byte_tokenizer: Tokenizer, bad: object) -> None:
    save_tokenizer(byte_tokenizer, tmp_path)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    contents["model"]["vocab"]["a"] = bad
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(TokenizerError, match=rf"tokenizer.json: id {bad!r} does not fit uint32 shards; ids must"):
        read_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_a_tokenizer_json_that_python_cannot_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not valid JSON: "):
        read_json(tmp_path / "tokenizer.json")
