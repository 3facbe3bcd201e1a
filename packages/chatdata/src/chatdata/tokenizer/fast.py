"""The routes from texts to tiktoken's ids: through tiktoken itself, fastokens or gigatoken. encoders.py chooses one.

All give ordinary encoding (a special token spelled in a text stays text) on the calling thread: work is parallel over
processes. The fast two are for tokenizer.SPLIT_PATTERN only, and for vocabularies whose merges are closed (below).

gigatoken has no such pattern, but cl100k's. Alternative by alternative, ours beside it:

    contraction, letters, signs   the same (its possessive quantifiers end where our greedy ones do)
    \\p{N}{1,2}                    \\p{N}{1,3}: so runs of three or more digits are cut into pairs before encoding
    -                             \\s++$, white space that ends a text is one piece; ours ends after its last
                                  newline, `"x\\n  "` → `\\n`, two spaces; with none, or with it last, one piece too
    \\s*[\\r\\n], \\s+(?!\\S), \\s+     the same

A cut between digits is always between two pieces, as a number joins nothing beside it. All 1,112,064 characters are
letter, number, white space or other alike in gigatoken 0.10.0 and tiktoken 0.14.0: walked, the assigned ones in 17
contexts. A batch becomes one buffer: a mark after each text and another at each cut, both declared to gigatoken as
special tokens with ids above the vocabulary, so one flat array comes back in which the marks tell where texts end.

Texts whose equality is not shown go through tiktoken:

    gigatoken   numerals beyond 0-9 (`10²` is three in a row), characters this Python does not know (they may be
                numerals), white space at the end with an inner newline, the two marks themselves: U+0000 and U+0001
    fastokens   U+180E: white space in its tables
    both        500,000 characters of white space in a row (at 1,000,000 tiktoken gives up, and so must every encoder),
                lone surrogates (tiktoken encodes U+FFFD)

Merges are closed if each entry of two or more bytes, merged by the entries before it, becomes two pieces. Both
libraries keep that one pair per entry and refuse other vocabularies. tiktoken joins any two neighbours that make an
entry; but while no merge crosses the ends of those bytes they develop as they do alone, so it meets that pair only.
"""

from __future__ import annotations

import base64
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from chatdata.tokenizer.bpe import Tokenizer

Ids = tuple[np.ndarray, np.ndarray]  # uint32 [num_ids], text after text; int64 [num_texts], how many of each
EncodeBatch = Callable[[list[str]], Ids]

_END, _CUT = "\0", "\1"  # the marks: after a text, between two pieces
_MARK_OR_SURROGATE = re.compile("[\0\1\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

_LONG = 500_000
_LONG_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{_LONG}}}")

# gigatoken remembers every piece it meets for good: 64 MiB after 1 GB of web text by its authors' count
_BYTES_BEFORE_RELOAD = 2**28

_NOT_LOOKED_UP, _ALIKE, _APART = range(3)  # of a code point


def encode_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    """The reference. Raises TokenizerError if tiktoken gives up on a text."""
    ids, counts = array("I"), np.empty(len(texts), np.int64)
    for i, text in enumerate(texts):
        found = tokenizer.encode_ordinary(text)
        ids.extend(found)  # 0.02 of the 0.7 s per million tokens; tiktoken's own way to NumPy takes no less
        counts[i] = len(found)
    return np.array(ids, np.uint32), counts


def tiktoken_route(tokenizer: Tokenizer) -> EncodeBatch:
    return lambda texts: encode_one_by_one(tokenizer, texts)


def fastokens_route(tokenizer: Tokenizer) -> EncodeBatch:
    """Raises ImportError, and fastokens' ValueError for a vocabulary that is not closed."""
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # read once, when it first wants threads
    import fastokens

    with _rank_file(tokenizer) as path:  # 0.6 s; through tokenizer.json 1.1 s
        fast = fastokens.Tokenizer.from_tiktoken(path, pattern=tokenizer.pattern, special_tokens={})
    ids_of = _ids_of_numbers(tokenizer)

    def encode_batch(texts: list[str]) -> Ids:
        apart = {i for i, text in enumerate(texts) if "\u180e" in text} | _texts_with_long_white_space(texts)
        try:
            ids, bounds = fast.encode_batch_flat(texts, False, True)
        except UnicodeEncodeError:
            apart |= {i for i, text in enumerate(texts) if _SURROGATE.search(text)}
            ids, bounds = fast.encode_batch_flat(_without(texts, apart), False, True)
        counts = np.diff(np.frombuffer(bounds, np.uint64).astype(np.int64))
        return _replace(ids_of(np.frombuffer(ids, np.uint32)), counts, texts, sorted(apart), tokenizer)

    return encode_batch


def gigatoken_route(tokenizer: Tokenizer) -> EncodeBatch:
    """Raises ImportError, and Rust's PanicException (no Exception) for a vocabulary that is not closed."""
    import gigatoken

    marks = {_END: len(tokenizer.ranks), _CUT: len(tokenizer.ranks) + 1}

    def load() -> gigatoken.Tokenizer:
        with _rank_file(tokenizer) as path, _silence():
            return gigatoken.Tokenizer.from_tiktoken(path, "gpt4", marks)

    fast, num_bytes = load(), 0
    ids_of = _ids_of_numbers(tokenizer)

    def encode_batch(texts: list[str]) -> Ids:
        nonlocal fast, num_bytes
        apart = set()
        if (data := _join(texts)) is None:
            apart = {i for i, text in enumerate(texts) if _MARK_OR_SURROGATE.search(text)}
            data = _join(_without(texts, apart))
            assert data is not None  # all texts with a mark or a surrogate are left out
        buffer = np.frombuffer(data, np.uint8)
        ends = np.flatnonzero(buffer == ord(_END))
        if np.diff(ends, prepend=-1).max(initial=0) > _LONG:  # a text of that many bytes, its mark counted
            apart |= _texts_with_long_white_space(texts)
        apart |= {*_texts_with_other_numerals(buffer, ends), *_texts_with_inner_newline_at_end(texts, buffer, ends)}
        cuts = _cuts_between_digits(buffer)
        if len(cuts):
            data = np.insert(buffer, cuts, ord(_CUT)).tobytes()
        if num_bytes > _BYTES_BEFORE_RELOAD:
            fast, num_bytes = load(), 0
        num_bytes += len(data)
        # one document: encode_batch takes many, but imports awkward (0.3 s) to give them back, and a third more time
        marked = fast.encode(data)
        at = np.flatnonzero(marked >= marks[_END])
        bounds = (at - np.arange(len(at)))[marked[at] == marks[_END]]
        ids = marked[marked < marks[_END]]
        return _replace(ids_of(ids), np.diff(bounds, prepend=0), texts, sorted(apart), tokenizer)

    return encode_batch


def _join(texts: list[str]) -> bytes | None:
    """The texts as UTF-8, a mark after each; None if there is a mark or a lone surrogate in one."""
    try:
        data = _END.join([*texts, ""]).encode()
    except UnicodeEncodeError:
        return None
    return data if data.count(_END.encode()) == len(texts) and _CUT.encode() not in data else None


def _cuts_between_digits(buffer: np.ndarray) -> np.ndarray:
    """Where to cut runs of ASCII digits into pairs, from the left: `a1234567` → 3, 5, 7.

    buffer: uint8 [num_bytes]. Returns int64 [num_cuts], ascending: a cut stands in front of that byte.
    """
    digit = (buffer - np.uint8(ord("0"))) < 10
    triples = np.flatnonzero(digit[:-2] & digit[1:-1] & digit[2:])  # where three digits in a row start
    is_first = np.diff(triples, prepend=-2) > 1  # of its run
    run_starts = triples[is_first][np.cumsum(is_first) - 1]
    return triples[(triples - run_starts) % 2 == 0] + 2


def _texts_with_other_numerals(buffer: np.ndarray, ends: np.ndarray) -> list[int]:
    """Numbers of the texts with a numeral beyond ASCII, or a character that this Python does not know."""
    leads = np.flatnonzero(buffer >= 0xC0)  # first bytes of the characters beyond ASCII
    a = buffer[leads].astype(np.uint32)
    b, c, d = (buffer.take(leads + i, mode="clip").astype(np.uint32) & 0x3F for i in (1, 2, 3))
    of_four = (a & 0x07) << 18 | b << 12 | c << 6 | d
    of_three = (a & 0x0F) << 12 | b << 6 | c
    of_two = (a & 0x1F) << 6 | b
    code_points = np.where(a < 0xE0, of_two, np.where(a < 0xF0, of_three, of_four))
    kinds = _kinds_of_code_points()
    for new in np.unique(code_points[kinds[code_points] == _NOT_LOOKED_UP]):
        category = unicodedata.category(chr(new))
        kinds[new] = _APART if category == "Cn" or category.startswith("N") else _ALIKE
    return np.searchsorted(ends, leads[kinds[code_points] == _APART]).tolist()


@cache
def _kinds_of_code_points() -> np.ndarray:
    """uint8 [0x110000]; filled in as code points are met, for all at once takes 0.4 s."""
    return np.full(0x110000, _NOT_LOOKED_UP, np.uint8)


def _texts_with_inner_newline_at_end(texts: list[str], buffer: np.ndarray, ends: np.ndarray) -> Iterator[int]:
    """Numbers of the texts that end in white space with a newline in it that is not its last character."""
    last = buffer.take(ends - 1, mode="clip")
    for i in np.flatnonzero(np.isin(last, [9, 11, 12, 32]) | (last >= 0x80)).tolist():
        white_space = texts[i][len(texts[i].rstrip()) :].rstrip("\r\n")
        if "\n" in white_space or "\r" in white_space:
            yield i


def _texts_with_long_white_space(texts: list[str]) -> set[int]:
    if max(map(len, texts), default=0) < _LONG:
        return set()
    return {i for i, text in enumerate(texts) if len(text) >= _LONG and _LONG_WHITE_SPACE.search(text)}


def _without(texts: list[str], numbers: Iterable[int]) -> list[str]:
    """The texts, those of the given numbers empty."""
    left_out = set(numbers)
    return ["" if i in left_out else text for i, text in enumerate(texts)]


def _replace(ids: np.ndarray, counts: np.ndarray, texts: list[str], numbers: list[int], tokenizer: Tokenizer) -> Ids:
    """`ids` and `counts` with those of the texts `numbers` (ascending) from tiktoken instead."""
    if not numbers:
        return ids, counts
    bounds = np.concatenate([[0], np.cumsum(counts)])
    counts, parts, done = counts.copy(), [], 0
    for i in numbers:
        right, counts[i : i + 1] = encode_one_by_one(tokenizer, [texts[i]])
        parts += [ids[done : bounds[i]], right]
        done = bounds[i + 1]
    return np.concatenate([*parts, ids[done:]]), counts


def _ids_of_numbers(tokenizer: Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """From the numbers in the rank file to ids: the same unless the ids have holes or do not start at 0."""
    ids = np.sort(np.fromiter(tokenizer.ranks.values(), np.uint32))
    return (lambda numbers: numbers) if ids[-1] == len(ids) - 1 else (lambda numbers: ids[numbers])


@contextmanager
def _rank_file(tokenizer: Tokenizer) -> Iterator[str]:
    """A .tiktoken file of the merges, numbered 0, 1, 2, … in the order of their ids: both libraries want no holes."""
    tokens = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
    lines = [b"%b %d\n" % (base64.b64encode(token), number) for number, token in enumerate(tokens)]
    with TemporaryDirectory(prefix="chatdata-") as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(b"".join(lines))
        yield str(path)


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error: Rust reports a panic there, be it only the refusal of a vocabulary."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
