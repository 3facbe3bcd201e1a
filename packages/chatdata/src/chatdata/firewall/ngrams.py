"""Find known texts in documents by n-grams of normalised words, hashed straight from the tokens.

A word is a run of letters and digits after NFKD, with marks dropped and case folded. That rule goes character by
character, so the words of a document follow from a table over the vocabulary, and no text is decoded: 14 million tokens
take a third of a second. A word's hash is sum(byte · R^i), an n-gram's is sum(word · Q^i), both modulo 2^64.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from chatdata.document import blocks_of
from chatdata.render.format import NANOCHAT
from chatdata.tokenizer.bpe import Tokenizer

NUM_WORDS = 8  # of an n-gram of a long text; one changed word in a question of 30 leaves 15 of its 23 n-grams
SIZES = (NUM_WORDS, 4, 2, 1)  # a shorter text is searched by n-grams of the longest of these sizes that it has
CHUNK_TOKENS = 1 << 18  # NumPy gives up the lock longer than for 2^16: two threads take 0.4 s for 14 M tokens, not 0.7
STRIDE = {NUM_WORDS: 4}  # of a long text only the n-grams at words 0, 4, 8, ... are searched
# An n-gram of more texts than this is boilerplate ("which of the following statements about the") and is ignored in a
# text that has others: MMLU has 895 questions that share their first 60 words.
MAX_OWNERS = 4
SLOTS_PER_NGRAM = 16  # or up to 32: 3 to 6 % of other n-grams are looked up for nothing
MAX_WORD_BYTES = 1024  # a power of two; in a longer word the powers start over
_R, _Q = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, and no small multiple of each other
_LETTERS, _BREAK_BEFORE, _BREAK_AFTER = 1, 2, 4  # flags of a token

_POWERS = np.multiply.accumulate(np.full(MAX_WORD_BYTES, _R, dtype=np.uint64)) * np.uint64(pow(_R, -1, 2**64))
_Q_POWERS = {size: np.uint64(pow(_Q, size, 2**64)) for size in (1, 2, 4)}
_FOLDED = bytes(i if i > 127 else ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(256))
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def normalise(text: str) -> str:
    """The words of `text`, separated by single spaces: "Größe: 5²" → "grosse 52"."""
    return " ".join(_letters(text).decode().split())


def _letters(text: str) -> bytes:
    """`text` with a space for everything that is not a letter or digit."""
    if not text.isascii():
        text = _NOT_ASCII.sub(lambda run: _fold(run[0]), text)
    return text.encode().translate(_FOLDED)


@lru_cache(maxsize=1 << 16)  # dashes, quotes and signs come again and again
def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    kept = (char for char in folded if not unicodedata.category(char).startswith("M"))
    return "".join(char if char.isalnum() else " " for char in kept)


class WordTable(NamedTuple):
    """What each token adds to words, by id: flags uint8, num_bytes int64 and hashes uint64 of its letters."""

    flags: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray


def word_table(tokenizer: Tokenizer) -> WordTable:
    """The table of a vocabulary.

    Special tokens separate words, and bos (in other chat formats, every special token) is a word like no other, so no
    n-gram crosses documents. Tokens that are not
    whole characters separate words, too: rare letters and emoji that the vocabulary cuts are not seen.
    """
    letters = [b" "] * tokenizer.vocab_size
    for token_id, token in tokenizer.token_bytes.items():
        try:
            letters[token_id] = _letters(token.decode())
        except UnicodeDecodeError:
            continue
    ids = tokenizer.special_ids
    for token_id in [ids[NANOCHAT.bos]] if NANOCHAT.bos in ids else ids.values():
        letters[token_id] = b" \0 "
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
    """Hash of each of the words that follow each other in `letters` (uint8); 0 for an empty one."""
    hashes, ends, filled = np.zeros(len(lengths), dtype=np.uint64), np.cumsum(lengths), np.flatnonzero(lengths)
    for first in range(0, len(filled), CHUNK_TOKENS):  # in reused memory: all at once took twice as long
        part = filled[first : first + CHUNK_TOKENS]
        begins = ends[part] - lengths[part]
        chunk, starts = letters[begins[0] : ends[part[-1]]], begins - begins[0]
        places = (np.arange(len(chunk)) - np.repeat(starts, lengths[part])) & (MAX_WORD_BYTES - 1)
        hashes[part] = np.add.reduceat(chunk * _POWERS[places], starts)
    return hashes


class Ngrams(NamedTuple):
    """Distinct n-grams of one size, ascending by hash: n-gram i is in the texts `texts[starts[i] : starts[i + 1]]`.

    slots (bool): whether any n-gram has these upper bits; most others are ruled out by one look here.
    """

    hashes: np.ndarray
    starts: np.ndarray
    texts: np.ndarray
    slots: np.ndarray


class Index(NamedTuple):
    """Texts to search for: their n-grams by size, and how many distinct ones of each are searched [num_texts]."""

    ngrams: dict[int, Ngrams]
    num_ngrams: np.ndarray


def index_texts(texts: Sequence[str]) -> Index:
    """An index over `texts`. A text without any word is never found."""
    letters_of_texts = [_letters(text) + b" " for text in texts]
    letters = np.frombuffer(b"".join(letters_of_texts), dtype=np.uint8)
    ends_of_texts = np.cumsum(np.fromiter(map(len, letters_of_texts), dtype=np.int64, count=len(texts)))
    inside = letters != 32
    edges = np.flatnonzero(np.diff(inside, prepend=False))
    starts, stops = edges[0::2], edges[1::2]  # of words: a space ends the last one
    words = _hashes(letters[inside], stops - starts)
    text = np.searchsorted(ends_of_texts, starts, side="right")  # of each word
    num_words = np.bincount(text, minlength=len(texts))
    place = np.arange(len(words)) - (np.cumsum(num_words) - num_words)[text]  # of each word in its text
    size_of_text = np.select([num_words >= size for size in SIZES], SIZES)
    ngrams, num_ngrams = {}, np.zeros(len(texts), dtype=np.int64)
    for size, hashes in _ngram_hashes(words, SIZES):
        owner, first = text[: len(hashes)], place[: len(hashes)]
        searched = (size_of_text[owner] == size) & (first + size <= num_words[owner])
        chosen = np.flatnonzero(searched & (first % STRIDE.get(size, 1) == 0))
        if len(chosen):
            ngrams[size] = _without_boilerplate(hashes[chosen], owner[chosen], len(texts))
            num_ngrams += np.bincount(ngrams[size].texts, minlength=len(texts))
    return Index(ngrams, num_ngrams)


def _without_boilerplate(hashes: np.ndarray, texts: np.ndarray, num_texts: int) -> Ngrams:
    """Distinct n-grams of texts (n-gram i is in texts[i], texts ascend), less those that too many texts share."""
    order = np.argsort(hashes, kind="stable")  # the texts of an n-gram still ascend: repeats are neighbours
    hashes, texts = hashes[order], texts[order]
    fresh = _differs(hashes) | _differs(texts)
    hashes, texts = hashes[fresh], texts[fresh]
    num_owners = np.diff(np.flatnonzero(np.append(_differs(hashes), True)))
    rare = np.repeat(num_owners <= MAX_OWNERS, num_owners)
    kept = rare | (np.bincount(texts[rare], minlength=num_texts) == 0)[texts]
    hashes, texts = hashes[kept], texts[kept]
    starts = np.flatnonzero(np.append(_differs(hashes), True))
    slots = np.zeros(1 << ((len(starts) - 1) * SLOTS_PER_NGRAM).bit_length(), dtype=bool)
    slots[_slot_of(hashes, slots)] = True
    return Ngrams(hashes[starts[:-1]], starts, texts, slots)


def _differs(values: np.ndarray) -> np.ndarray:
    """Whether each value differs from the one before it (bool)."""
    return np.append(True, values[1:] != values[:-1])


def _slot_of(hashes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The upper bits of hashes, as places in `slots` (a power of two long); int64, which NumPy looks up faster."""
    return (hashes >> np.uint64(65 - len(slots).bit_length())).view(np.int64)


def _ngram_hashes(words: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(size, hash of the n-gram from each word on) by doubling: one of 8 words is two of 4."""
    for size in reversed(SIZES):
        if size > max(sizes, default=0):
            return
        if half := size // 2:
            words = words[:-half] + words[half:] * _Q_POWERS[half]
        yield size, words


def find_texts(
    index: Index, table: WordTable, tokens: np.ndarray, num_tokens: np.ndarray, num_kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, text, share of the text's indexed n-grams in the document) wherever the share is not 0.

    tokens: the documents, one after the other. A document has `num_tokens` tokens; only its first `num_kept` count.
    """
    ends = np.cumsum(num_tokens)
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    for first, last in blocks_of(num_tokens, CHUNK_TOKENS):
        begin = int(ends[first] - num_tokens[first])
        words, places = _words(table, tokens[begin : ends[last - 1]])
        for size, hashes in _ngram_hashes(words, tuple(index.ngrams)):
            if size in index.ngrams:
                word, ngram = _look_up(index.ngrams[size], hashes)
                place = places[word] + begin
                document = np.searchsorted(ends, place, side="right")
                kept = place - (ends - num_tokens)[document] < num_kept[document]
                found.append(_texts_of(index.ngrams[size], document[kept], ngram[kept]))
    documents, texts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    pairs, counts = np.unique(documents * len(index.num_ngrams) + texts, return_counts=True)
    documents, texts = np.divmod(pairs, len(index.num_ngrams))
    return documents, texts, counts / index.num_ngrams[texts]


def _look_up(ngrams: Ngrams, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in `hashes`, number of the n-gram) of every hash that is one of `ngrams`."""
    possible = np.flatnonzero(ngrams.slots.take(_slot_of(hashes, ngrams.slots)))
    number = np.searchsorted(ngrams.hashes, hashes[possible])
    number[number == len(ngrams.hashes)] = 0
    same = ngrams.hashes[number] == hashes[possible]
    return possible[same], number[same]


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
    in_several = ~begins  # tokens of words that have several: from the second on the powers continue
    in_several[:-1] |= ~begins[1:]
    several = np.flatnonzero(in_several)
    num_bytes = table.num_bytes[tokens[places[several]]]
    before = np.cumsum(num_bytes) - num_bytes
    before -= np.maximum.accumulate(np.where(begins[several], before, 0))
    hashes[several] *= _POWERS[before & (MAX_WORD_BYTES - 1)]
    return np.add.reduceat(hashes, starts), places[starts]


def _texts_of(ngrams: Ngrams, documents: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(document, text) for every text that has the n-gram, once for each n-gram a document has."""
    documents, numbers = np.divmod(np.unique(documents * len(ngrams.hashes) + numbers), len(ngrams.hashes))
    counts = ngrams.starts[numbers + 1] - ngrams.starts[numbers]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(documents, counts), ngrams.texts[np.repeat(ngrams.starts[numbers], counts) + within]
