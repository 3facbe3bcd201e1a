"""`chatdata tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from chatdata.tokenizer.bpe import train_tokenizer
from chatdata.tokenizer.files import save_tokenizer


def test_show(tmp_path: Path, chatdata: Callable) -> None:
    save_tokenizer(train_tokenizer(iter(["banana bandana " * 9]), 270), tmp_path / "t")
    shown = json.loads(chatdata("tokenizer", "show", tmp_path / "t", "--text", "banana", "--json").stdout)
    assert shown["vocab_size"] == 270 and shown["shards"] == "uint16"
    assert "".join(piece for _, piece in shown["tokens"]) == "banana"
    assert "vocab_size" in chatdata("tokenizer", "show", tmp_path / "t").stdout
