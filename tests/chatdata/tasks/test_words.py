from __future__ import annotations

from pathlib import Path

import pytest

from chatdata.errors import SourceError
from chatdata.tasks import spelling_bee
from chatdata.tasks.words import read_words


def test_word_lists(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_bytes(b"\xef\xbb\xbfapple\r\nkiwi\r\n")
    assert read_words(path) == ["apple", "kiwi"]
    path.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"^w.txt: not UTF-8 at byte 3$"):
        read_words(path)
    path.write_text("don't\n")
    with pytest.raises(SourceError, match=r'^w.txt: the word "don\'t" cannot be quoted in the call'):
        spelling_bee.generate("train", {"words": path, "holdout": False, "phrasings": spelling_bee.PHRASINGS})
