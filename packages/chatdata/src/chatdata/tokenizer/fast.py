"""From texts to tiktoken's ids: through tiktoken, fastokens or gigatoken. encoders.py chooses one and tests it.

All give ordinary encoding (a special token spelled in a text stays text) on the calling thread: work is parallel over
processes. The fast two are used with bpe.SPLIT_PATTERN and vocabularies they accept. Why their ids must equal
tiktoken's, and for which texts that is not proven, is in docs/building.md (Encoders); those texts go through tiktoken.

gigatoken takes a batch as one buffer: a mark after each text, and another where its split pattern needs a cut. Both are
declared as special tokens with ids above the vocabulary, so one flat array comes back and they tell where texts end.
"""

import base64
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile

import numpy as np

from chatdata.tokenizer.bpe import EncodeBatch, Ids, Tokenizer, quiet_rust

_END, _CUT = "\0", "\1"  # the marks: after a text, between two pieces
_MARK_OR_SURROGATE = re.compile("[\0\1\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("[\r\n]")

_LONG = 500_000  # characters of white space in a row; tiktoken gives up at 1,000,000
_LONG_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{_LONG}}}")

# gigatoken remembers every piece it meets for good: 64 MiB after 1 GB of web text by its authors' count
_BYTES_BEFORE_RELOAD = 2**28

_NEW, _ALIKE, _NUMERAL = range(3)  # what is known of a code point
_KINDS = np.full(0x110000, _NEW, np.uint8)  # filled in as code points are met: all at once takes 0.4 s


def fastokens_route(tokenizer: Tokenizer) -> EncodeBatch:
    """Raises ImportError, and fastokens' ValueError for a vocabulary that it cannot do."""
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # read once, when it first wants threads
    import fastokens

    id_of = np.sort(np.fromiter(tokenizer.ranks.values(), np.uint32))
    with _rank_file(tokenizer) as path:  # 0.6 s; through tokenizer.json 1.1 s
        fast = fastokens.Tokenizer.from_tiktoken(path, pattern=tokenizer.pattern, special_tokens={})

    def encode_batch(texts: list[str]) -> Ids:
        apart = {i for i, text in enumerate(texts) if "\u180e" in text} | _texts_with_long_white_space(texts)
        try:
            ranks, bounds = fast.encode_batch_flat(texts, False, True)
        except UnicodeEncodeError:
            apart |= {i for i, text in enumerate(texts) if _SURROGATE.search(text)}
            ranks, bounds = fast.encode_batch_flat(_without(texts, apart), False, True)
        counts = np.diff(np.frombuffer(bounds, np.uint64).astype(np.int64))
        return _through_tiktoken(tokenizer, texts, apart, id_of[np.frombuffer(ranks, np.uint32)], counts)

    return encode_batch


def gigatoken_route(tokenizer: Tokenizer) -> EncodeBatch:
    """Raises ImportError, and Rust's PanicException (no Exception) for a vocabulary that it cannot do."""
    import gigatoken

    id_of = np.sort(np.fromiter(tokenizer.ranks.values(), np.uint32))
    marks = {_END: len(id_of), _CUT: len(id_of) + 1}

    def load() -> gigatoken.Tokenizer:
        with _rank_file(tokenizer) as path, quiet_rust():  # it refuses a vocabulary by a panic
            return gigatoken.Tokenizer.from_tiktoken(path, "gpt4", marks)

    fast, num_bytes = load(), 0

    def encode_batch(texts: list[str]) -> Ids:
        nonlocal fast, num_bytes
        apart, kept, data = set[int](), texts, _join(texts)
        if data is None:
            apart = {i for i, text in enumerate(texts) if _MARK_OR_SURROGATE.search(text)}
            kept = _without(texts, apart)
            data = _join(kept)
            assert data is not None  # no text with a mark or a surrogate is left
        buffer = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(buffer == ord(_END))
        if np.diff(ends, prepend=-1).max(initial=0) > _LONG:  # a text of that many bytes, its mark counted
            apart |= _texts_with_long_white_space(kept)
        apart |= _texts_with_other_numerals(buffer, ends) | _texts_with_inner_newline_at_end(kept, buffer[ends - 1])
        cuts = _cuts_between_digits(buffer)
        if len(cuts):
            data = np.insert(buffer, cuts, ord(_CUT)).tobytes()
        if num_bytes > _BYTES_BEFORE_RELOAD:
            fast, num_bytes = load(), 0
        num_bytes += len(data)
        # one document: encode_batch takes many, but imports awkward (0.3 s) to return them, and takes a third more time
        marked = fast.encode(data)
        at = np.flatnonzero(marked >= marks[_END])
        bounds = (at - np.arange(len(at)))[marked[at] == marks[_END]]
        ranks = marked[marked < marks[_END]]
        return _through_tiktoken(tokenizer, texts, apart, id_of[ranks], np.diff(bounds, prepend=0))

    return encode_batch


def _join(texts: list[str]) -> bytes | None:
    """The texts as UTF-8, a mark after each; None if one of them has a mark or a lone surrogate."""
    try:
        data = _END.join([*texts, ""]).encode()
    except UnicodeEncodeError:
        return None
    return data if data.count(_END.encode()) == len(texts) and _CUT.encode() not in data else None


def _without(texts: list[str], numbers: set[int]) -> list[str]:
    """The texts, those of the given numbers empty."""
    return ["" if i in numbers else text for i, text in enumerate(texts)]


def _cuts_between_digits(buffer: np.ndarray) -> np.ndarray:
    """Where to cut runs of ASCII digits into pairs, from the left: `a1234567` → 3, 5, 7.

    buffer: uint8 [num_bytes]. Returns int64 [num_cuts], ascending: a cut comes before that byte.
    """
    digit = (buffer - np.uint8(ord("0"))) < 10
    triples = np.flatnonzero(digit[:-2] & digit[1:-1] & digit[2:])  # where three digits in a row start
    is_first = np.diff(triples, prepend=-2) > 1  # of its run
    run_starts = triples[is_first][np.cumsum(is_first) - 1]
    return triples[(triples - run_starts) % 2 == 0] + 2


def _texts_with_other_numerals(buffer: np.ndarray, ends: np.ndarray) -> set[int]:
    """Numbers of the texts with a numeral beyond ASCII, or a character that this Python does not know."""
    leads = np.flatnonzero(buffer >= 0xC0)  # first bytes of the characters beyond ASCII
    a = buffer[leads].astype(np.uint32)
    b, c, d = (buffer.take(leads + i, mode="clip").astype(np.uint32) & 0x3F for i in (1, 2, 3))
    of_two, of_three, of_four = (a & 0x1F) << 6 | b, (a & 0x0F) << 12 | b << 6 | c, (a & 7) << 18 | b << 12 | c << 6 | d
    code_points = np.where(a < 0xE0, of_two, np.where(a < 0xF0, of_three, of_four))
    for new in np.unique(code_points[_KINDS[code_points] == _NEW]):
        category = unicodedata.category(chr(new))
        _KINDS[new] = _NUMERAL if category == "Cn" or category.startswith("N") else _ALIKE
    return set(np.searchsorted(ends, leads[_KINDS[code_points] == _NUMERAL]).tolist())


def _texts_with_inner_newline_at_end(texts: list[str], last: np.ndarray) -> set[int]:
    """Numbers of the texts that end in white space with a newline in it that is not its last character.

    last: uint8 [num_texts], the last byte of each.
    """
    perhaps = np.flatnonzero(np.isin(last, [9, 11, 12, 32]) | (last >= 0x80)).tolist()
    return {i for i in perhaps if _NEWLINE.search(texts[i][len(texts[i].rstrip()) :].rstrip("\r\n"))}


def _texts_with_long_white_space(texts: list[str]) -> set[int]:
    return {i for i, text in enumerate(texts) if len(text) >= _LONG and _LONG_WHITE_SPACE.search(text)}


def _through_tiktoken(
    tokenizer: Tokenizer, texts: list[str], numbers: set[int], ids: np.ndarray, counts: np.ndarray
) -> Ids:
    """`ids` and `counts`, those of the texts `numbers` from tiktoken instead."""
    if not numbers:
        return ids, counts
    bounds = np.concatenate([[0], np.cumsum(counts)])
    counts, parts, done = counts.copy(), [], 0
    for i in sorted(numbers):
        right, counts[i : i + 1] = tokenizer.encode_batch([texts[i]])
        parts += [ids[done : bounds[i]], right]
        done = bounds[i + 1]
    return np.concatenate([*parts, ids[done:]]), counts


@contextmanager
def _rank_file(tokenizer: Tokenizer) -> Iterator[str]:
    """A .tiktoken file of the merges, numbered 0, 1, 2, … in the order of their ids: both libraries want no holes."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    with NamedTemporaryFile(prefix="chatdata-", suffix=".tiktoken") as file:
        file.writelines(b"%b %d\n" % (base64.b64encode(token), number) for number, token in enumerate(tokens))
        file.flush()
        yield file.name
