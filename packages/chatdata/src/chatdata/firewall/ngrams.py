"""Which documents hold the words of which texts: n-grams of normalised words, hashed over the tokens as they lie.

A word is a run of letters and digits after NFKD, with marks dropped and case folded. That rule goes character by
character, so the words of a document follow from a table over the vocabulary, and no text is decoded: 14 million tokens
take a third of a second. A word's hash is sum(byte · R^i), an n-gram's is sum(word · Q^i), both modulo 2^64.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from chatdata.render.format import NANOCHAT
from chatdata.tokenizer.bpe import Tokenizer

NUM_WORDS = 8  # of an n-gram of a long text; one changed word in a question of 30 leaves 15 of its 23 n-grams
SIZES = (NUM_WORDS, 4, 2, 1)  # a shorter text is looked for by n-grams of the longest of these sizes it has
CHUNK_TOKENS = 1 << 18  # NumPy gives up the lock longer than for 2^16: two threads take 0.4 s for 14 M tokens, not 0.7
STRIDE = {NUM_WORDS: 4}  # n-grams of a long text that are looked for: those at words 0, 4, 8, ...
MAX_OWNERS = 4  # an n-gram of more texts than this is boilerplate ("which of the following statements about the"),
# and is passed over in a text that has others: MMLU has 895 questions that share their first 60 words
FILTER_PLACES = 16  # for each n-gram, or up to 32: 3 to 6 % of other n-grams are looked up in vain
MAX_WORD_BYTES = 1024  # a power of two; of a longer word the powers begin again
_R, _Q = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, and no small multiple of each other
_LETTERS, _BREAK_BEFORE, _BREAK_AFTER = 1, 2, 4  # flags of a token

_POWERS = np.multiply.accumulate(np.full(MAX_WORD_BYTES, _R, dtype=np.uint64)) * np.uint64(pow(_R, -1, 2**64))
_Q_POWERS = {size: np.uint64(pow(_Q, size, 2**64)) for size in (1, 2, 4)}
_FOLDED = bytes(i if i > 127 else ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(256))
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def normalise(text: str) -> str:
    """The words of `text`, a space between two: "Größe: 5²" → "grosse 52"."""
    return " ".join(_letters(text).decode().split())


def _letters(text: str) -> bytes:
    """`text` with a space for all that is no letter or digit."""
    if not text.isascii():
        text = _NOT_ASCII.sub(lambda run: _fold(run[0]), text)
    return text.encode().translate(_FOLDED)


@lru_cache(maxsize=1 << 16)  # dashes, quotes and signs come again and again
def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    kept = (char for char in folded if not unicodedata.category(char).startswith("M"))
    return "".join(char if char.isalnum() else " " for char in kept)


@dataclass(frozen=True)
class WordTable:
    """What each token adds to words, by id: flags uint8, num_bytes int64 and hashes uint64 of its letters."""

    flags: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray


def word_table(tokenizer: Tokenizer) -> WordTable:
    """Special tokens part words, and bos is a word like no other, so no n-gram crosses documents. So do tokens that are
    not whole characters (rare letters and emoji): what the vocabulary cuts inside a character is not seen."""
    letters = [b" "] * tokenizer.vocab_size
    for token_id, token in tokenizer.token_bytes.items():
        try:
            letters[token_id] = _letters(token.decode())
        except UnicodeDecodeError:
            continue
    letters[tokenizer.special_ids[NANOCHAT.bos]] = b" \0 "
    text = np.frombuffer(b"".join(letters), dtype=np.uint8)
    lengths = np.fromiter(map(len, letters), dtype=np.int64, count=len(letters))
    ends = np.cumsum(lengths)
    num_bytes = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[text != 32], minlength=len(lengths))
    first, last = np.minimum(ends - lengths, len(text) - 1), ends - 1
    flags = np.where(num_bytes > 0, _LETTERS, 0)
    flags |= np.where((num_bytes == 0) | (text[first] == 32), _BREAK_BEFORE, 0)
    flags |= np.where((num_bytes == 0) | (text[last] == 32), _BREAK_AFTER, 0)
    return WordTable(flags.astype(np.uint8), num_bytes, _hashes(text[text != 32], num_bytes))


def _hashes(letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash of each of the words that lie back to back in `letters` (uint8); 0 for an empty one."""
    hashes, ends = np.zeros(len(lengths), dtype=np.uint64), np.cumsum(lengths)
    for first in range(0, len(lengths), CHUNK_TOKENS):  # in memory that is there: all at once took twice as long
        filled = first + np.flatnonzero(lengths[first : first + CHUNK_TOKENS])
        if len(filled):
            counts = lengths[filled]
            begin = int(ends[filled[0]] - counts[0])
            starts = ends[filled] - counts - begin
            chunk = letters[begin : ends[filled[-1]]]
            places = (np.arange(len(chunk)) - np.repeat(starts, counts)) & (MAX_WORD_BYTES - 1)
            hashes[filled] = np.add.reduceat(chunk * _POWERS[places], starts)
    return hashes


@dataclass(frozen=True)
class Ngrams:
    """Distinct n-grams of one size: `hashes` sorted [num_ngrams], each in the texts
    `texts[starts[i] : starts[i + 1]]`; `filter` (bool) holds for the upper bits of every one."""

    hashes: np.ndarray
    starts: np.ndarray
    texts: np.ndarray
    filter: np.ndarray


@dataclass(frozen=True)
class Index:
    """Texts to look for: their n-grams by size, and how many distinct ones of each are looked for [num_texts]."""

    ngrams: dict[int, Ngrams]
    num_ngrams: np.ndarray


def index_texts(texts: Sequence[str]) -> Index:
    """An index over `texts` as they are written. One without any word is never found."""
    spelt = [_letters(text) + b" " for text in texts]
    letters = np.frombuffer(b"".join(spelt), dtype=np.uint8)
    ends_of_texts = np.cumsum(np.fromiter(map(len, spelt), dtype=np.int64, count=len(spelt)))
    inside = letters != 32
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    starts, stops = edges[0::2], edges[1::2]  # of words: a space ends the last one
    words = _hashes(letters[inside], stops - starts)
    text_of_word = np.searchsorted(ends_of_texts, starts, side="right")
    counts = np.bincount(text_of_word, minlength=len(texts))
    ends = np.cumsum(counts)[text_of_word]
    begins = ends - counts[text_of_word]
    ngrams, num_ngrams = {}, np.zeros(len(texts), dtype=np.int64)
    size_of_text = np.select([counts >= size for size in SIZES], SIZES)
    for size, hashes in _ngram_hashes(words, SIZES):
        first = np.arange(len(hashes))
        taken = (size_of_text[text_of_word[first]] == size) & (first + size <= ends[first])
        chosen = np.flatnonzero(taken & ((first - begins[first]) % STRIDE.get(size, 1) == 0))
        if len(chosen):
            order = chosen[np.argsort(hashes[chosen], kind="stable")]
            values, owners = hashes[order], text_of_word[order]  # of one n-gram the texts ascend: repeats are together
            fresh = np.append(True, (values[1:] != values[:-1]) | (owners[1:] != owners[:-1]))
            values, owners = values[fresh], owners[fresh]
            starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            num_owners = np.diff(np.append(starts, len(values)))
            rare = np.repeat(num_owners <= MAX_OWNERS, num_owners)
            kept = rare | (np.bincount(owners[rare], minlength=len(texts)) == 0)[owners]
            values, owners = values[kept], owners[kept]
            num_ngrams += np.bincount(owners, minlength=len(texts))
            starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            there = np.zeros(1 << (len(starts) * FILTER_PLACES).bit_length(), dtype=bool)
            there[_upper_bits(values, there)] = True
            ngrams[size] = Ngrams(values[starts], np.append(starts, len(values)), owners, there)
    return Index(ngrams, num_ngrams)


def _upper_bits(hashes: np.ndarray, filter: np.ndarray) -> np.ndarray:
    """Where in the filter (a power of two long) hashes stand, int64: numpy looks places up faster by signed ones."""
    return (hashes >> np.uint64(65 - len(filter).bit_length())).view(np.int64)


def _ngram_hashes(words: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(size, hash of the n-gram from each word on) by doubling: one of 8 words is two of 4."""
    size = 1
    while True:
        if size in sizes:
            yield size, words
        size *= 2
        if size > max(sizes, default=0) or len(words) <= size // 2:
            return
        words = words[: -(size // 2)] + words[size // 2 :] * _Q_POWERS[size // 2]


def find_texts(
    index: Index, table: WordTable, tokens: np.ndarray, num_tokens: np.ndarray, num_kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, text, share of the text's indexed n-grams in the document) wherever that is not 0.

    tokens: documents back to back, `num_tokens` of each, of which only the first `num_kept` count.
    """
    ends = np.cumsum(num_tokens)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    first = 0
    while first < len(ends):
        begin = int(ends[first] - num_tokens[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + CHUNK_TOKENS, side="right")))
        words, places = _words(table, tokens[begin : ends[last - 1]])
        for size, hashes in _ngram_hashes(words, tuple(index.ngrams)):
            if size not in index.ngrams:
                continue
            ngrams = index.ngrams[size]
            hits = np.flatnonzero(ngrams.filter.take(_upper_bits(hashes, ngrams.filter)))
            at = np.searchsorted(ngrams.hashes, hashes[hits])
            at[at == len(ngrams.hashes)] = 0
            same = ngrams.hashes[at] == hashes[hits]
            at, place = at[same], places[hits[same]] + begin
            document = np.searchsorted(ends, place, side="right")
            kept = place - (ends - num_tokens)[document] < num_kept[document]
            found.append(_texts_of(ngrams, document[kept], at[kept]))
        first = last
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    documents, texts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    pairs, counts = np.unique(documents * len(index.num_ngrams) + texts, return_counts=True)
    documents, texts = np.divmod(pairs, len(index.num_ngrams))
    return documents, texts, counts / index.num_ngrams[texts]


def _words(table: WordTable, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash uint64, place of its first token) of every word of a chunk."""
    flags = table.flags.take(tokens)
    begins = (flags & _BREAK_BEFORE) > 0
    begins[1:] |= (flags[:-1] & _BREAK_AFTER) > 0
    places = np.flatnonzero((flags & _LETTERS) > 0)
    begins = begins[places]
    begins[:1] = True
    hashes = table.hashes.take(tokens[places])
    starts = np.flatnonzero(begins)
    in_several = ~begins  # words of several tokens: behind the first the powers go on
    in_several[:-1] |= ~begins[1:]
    several = np.flatnonzero(in_several)
    if len(several):
        num_bytes = table.num_bytes[tokens[places[several]]]
        before = np.cumsum(num_bytes) - num_bytes
        before -= np.maximum.accumulate(np.where(begins[several], before, 0))
        hashes[several] *= _POWERS[before & (MAX_WORD_BYTES - 1)]
        hashes = np.add.reduceat(hashes, starts)
    return hashes, places[starts]


def _texts_of(ngrams: Ngrams, documents: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(document, text) for every text that has the n-gram, once for each n-gram a document has."""
    pairs = np.unique(documents * len(ngrams.hashes) + at)
    documents, at = np.divmod(pairs, len(ngrams.hashes))
    counts = ngrams.starts[at + 1] - ngrams.starts[at]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(documents, counts), ngrams.texts[np.repeat(ngrams.starts[at], counts) + within]
