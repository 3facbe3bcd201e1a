"""Words of texts and tokens, and the share of a text's n-grams that a document has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.firewall.ngrams import find_texts, index_texts, normalise, word_table
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  The cat's\n hat!", "the cat s hat"),
        ("Größe: 5² — ﬁne", "grosse 52 fine"),
        ("e\u0301t\u00e9 ÉTÉ", "ete ete"),
        ("snake_case ｗｉｄｅ", "snake case wide"),
    ],
)
def test_normalised(text: str, words: str) -> None:
    assert normalise(text) == words


@given(st.lists(st.text("ab .,é", max_size=40), max_size=6), st.lists(st.text("ab .,é", max_size=30), max_size=4))
def test_shares_are_those_of_the_words(documents: list[str], texts: list[str]) -> None:
    """Against n-grams compared as text; a byte tokenizer cuts é, which then parts words on neither side."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks[" é".encode()] = 300
    ranks["é".encode()] = 301
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "test")
    ids = [[tokenizer.special_ids["<|bos|>"], *tokenizer.encode_ordinary(text)] for text in documents]
    tokens = np.array([i for some in ids for i in some], dtype=np.uint16)
    counts = np.array([len(some) for some in ids], dtype=np.int64)
    found = find_texts(index_texts(texts), word_table(tokenizer), tokens, counts, counts)
    expected = {}
    for i, document in enumerate(documents):
        for j, text in enumerate(texts):
            words, there = normalise(text).split(), f" {normalise(document)} "
            size = next((size for size in (8, 4, 2, 1) if len(words) >= size), 0)
            stride = 4 if size == 8 else 1
            ngrams = {" ".join(words[k : k + size]) for k in range(0, len(words) - size + 1, stride)} if size else set()
            if any(f" {ngram} " in there for ngram in ngrams):
                expected[i, j] = sum(f" {ngram} " in there for ngram in ngrams) / len(ngrams)
    assert {(int(i), int(j)): share for i, j, share in zip(*found, strict=True)} == pytest.approx(expected)


def test_boilerplate_is_ignored_in_texts_that_have_other_ngrams() -> None:
    shared = "which of the following statements about the lamp is true"
    index = index_texts([f"{shared} {i} {i} {i} {i} {i}" for i in range(5)] + [shared])
    assert index.num_ngrams.tolist() == [1, 1, 1, 1, 1, 1]
