from __future__ import annotations

from pathlib import Path

import pytest

from chatdata.identity.persona import Persona, load_persona
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chatdata.tokenizer.files import load_tokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}
PERSONA = """
name = "Korvo"
description = "a helpful chat model"
maker = "Acme Inc."
licence = "Apache 2.0"
languages = ["English", "spanish", "Klingon"]
facts = [
    "I have read many books about trains.",
    { question = "How big are you?", answer = ["I am quite small.", "I have a billion parameters."] },
    { question = ["Who are you?", "What is your favourite food?"], answer = "I eat electricity." },
]
"""


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """ids = bytes, special tokens 256 … 264: every expectation can be written down by hand."""
    return Tokenizer(BYTES, SPLIT_PATTERN, append_special_tokens(BYTES), "bytes")


@pytest.fixture(scope="session")
def nanochat_tokenizer(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "data" / "tokenizer" / "tokenizer.pkl")


@pytest.fixture
def korvo(tmp_path: Path) -> Persona:
    """The persona in me.toml of the test's folder."""
    (tmp_path / "me.toml").write_text(PERSONA)
    return load_persona(tmp_path / "me.toml")
