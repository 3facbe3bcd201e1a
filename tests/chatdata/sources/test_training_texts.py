from __future__ import annotations

from pathlib import Path

import pytest

from chatdata.errors import SourceError
from chatdata.sources.training_texts import read_texts
from chatdata.tokenizer.bpe import train_tokenizer


def test_a_training_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"latin.txt: not UTF-8; save it as UTF-8$"):
        train_tokenizer(read_texts((tmp_path / "latin.txt",)), 300)
