from __future__ import annotations

from pathlib import Path

import pytest

from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chatdata.tokenizer.files import load_tokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """ids = bytes, special tokens 256 … 264: every expectation can be written down by hand."""
    return Tokenizer(BYTES, SPLIT_PATTERN, append_special_tokens(BYTES), "bytes")


@pytest.fixture(scope="session")
def nanochat_tokenizer(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data" / "tokenizer" / "tokenizer.pkl")
