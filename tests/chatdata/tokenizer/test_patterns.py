"""Split patterns: tiktoken and tokenizers cut every text at the same places, or the pattern is refused."""

from __future__ import annotations

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chatdata.tokenizer.merges import spell
from chatdata.tokenizer.patterns import covering, to_tiktoken, to_tokenizers

BYTES = {bytes([byte]): byte for byte in range(256)}
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces_of_tiktoken(pattern: str, text: str) -> list[str]:
    """Every part of the text is a token, so each piece is one."""
    parts = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    ranks = BYTES | {part: 256 + i for i, part in enumerate(sorted(parts - BYTES.keys()))}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)]


def pieces_of_tokenizers(pattern: str, text: str) -> list[str]:
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "pattern", [SPLIT_PATTERN, LLAMA3, O200K, r"\S+|\s+", r".|\s", r"[^\S\n]+|[一-龥あ-ん]+|[\s\S]"]
)
def test_what_both_read_the_same_way_stays_as_it_is(pattern: str) -> None:
    assert to_tokenizers(pattern) == to_tiktoken(pattern) == pattern


def test_what_is_translated() -> None:
    for pattern, saved, back in [
        (r"\p{N}{1,3}+|.", r"(?>\p{N}{1,3})|.", r"(?>\p{N}{1,3})|."),
        (r"(?:ab){2}+|.", r"(?>(?:ab){2})|.", r"(?>(?:ab){2})|."),
        (r"[a-c]{2,}+|.", r"(?>[a-c]{2,})|.", r"(?>[a-c]{2,})|."),
        (r"a+$|^.", r"a+\z|\A.", r"a+\z|\A."),
    ]:
        assert to_tokenizers(pattern) == saved
        assert to_tiktoken(saved) == back == to_tokenizers(back)
    # and the other way: what a tokenizer.json means by it
    assert to_tiktoken(r"\p{N}{1,3}+|.") == r"(?:\p{N}{1,3})+|."
    assert to_tiktoken(r"a{2}+|.") == r"(?:a{2})+|."
    assert to_tiktoken("a$|.") == r"a(?=\n|\z)|."


def test_the_translated_cut_at_the_same_places() -> None:
    for text, expected in [
        ("12345 ab\n", ["123", "45", " ab", "\n"]),
        ("x = 1000000  \n \n", ["x", " =", " ", "100", "000", "0", "  \n \n"]),
    ]:
        assert pieces_of_tiktoken(CL100K, text) == pieces_of_tokenizers(to_tokenizers(CL100K), text) == expected
    repeated = r"\p{N}{1,2}+|a+$|[\s\S]"
    assert pieces_of_tokenizers(repeated, "12345aa\nab") == ["12345", "aa", "\n", "a", "b"]
    assert pieces_of_tiktoken(to_tiktoken(repeated), "12345aa\nab") == ["12345", "aa", "\n", "a", "b"]
    assert pieces_of_tiktoken(repeated, "12345aa\nab") == ["12", "34", "5", "a", "a", "\n", "a", "b"]


REFUSED = [
    *(r"\w+|.", r"\bx|.", r"\h", r"\R", r"a\Kb", r"\X", r"\Z", r"\G", r"\<a", r"\1", r"(a)\1", r"\Q.\E", r"\N", r"\0"),
    *(r"\xe9", r"\pL", r"\p{^L}", r"\p{Han}", r"\p{Alphabetic}", r"[\w]", r"[\b]", r"[\xe9]"),
    *(r"a{,3}", r"a{2}?", "a{3,2}", "a{0}", "a**", "a+*", "a{1}{2}", "{", "a{", "}", "]", "a{1,2}++", "^*a", "(?=a)*b"),
    *("[a--b]", "[a&&b]", "[a~~b]", "[[a]]", "[a[b]]", "[[:alpha:]]", "[]a]", "[]", "[^]", r"[\s-a]", r"[a-\d]"),
    *("(?i)a", "a(?i)b|c", "(?m)a", "(?s:.)", "(?x:a)", "(?-i:a)", "(?im:a)", "(?#a)b", "(?P<n>a)", "(?<n>a)"),
    *(
        "(?<=a)b",
        "(?<!a)b",
        "(?~a)",
        "(?(1)a)",
        r"(?i:ss)",
        "(?i:[a]st)",
        "(?i:FI)",
        "(?i:s+)",
        r"(?i:\s)",
        "(?i:[^s])",
    ),
    *("(?i:é)", "(?i:(?:s)s)", "(?i:a|)", "(?:a+)+", "(?:a?)*", "(?:(?:a{100}){100})", "(a", "a)", "(?:" * 30),
]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_they_may_read_differently_is_refused(pattern: str) -> None:
    for translate in (to_tokenizers, to_tiktoken):
        with pytest.raises(ValueError, match=r"^the split pattern has ") as caught:
            translate(pattern)
        assert len(str(caught.value).splitlines()) == 1


def test_the_message_says_where() -> None:
    with pytest.raises(ValueError) as caught:
        to_tokenizers("a|" + r"\w+|\s")
    assert str(caught.value) == (
        r"the split pattern has '\w+|\s' at character 3, which tiktoken and tokenizers may read differently "
        "(docs/format.md says what both read the same way)"
    )
    for pattern in ("^a", "a{0,2}+b", "a{2,}+"):  # the ends of lines; what repeats nothing; repetition of repetition
        with pytest.raises(ValueError, match=r" at character [12], which"):
            to_tiktoken(pattern)
    assert to_tokenizers("^a|.") == r"\Aa|."


def test_the_alternatives_that_lose_nothing() -> None:
    alternatives, characters = covering(SPLIT_PATTERN)
    assert alternatives == r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+"
    assert set(map(chr, range(256))) <= set(characters)
    assert covering(r"(?:ab)?\d|(?>x+)|(?>xy?)|(?:ab)?+z|a(?!b)|$c|(?i:d)e")[0] == r"(?:ab)?\d|(?>x+)"
    assert covering(r"\x{0}|[^\x{0}]|\x{10ffff}|\x{d800}")[1].startswith("\0\1")
    assert {"龤", "龥", "龦"} <= set(covering("[一-龥]|a")[1]) and "\x81" in covering(r"\x{80}")[1]


# patterns of the grammar at random; a last alternative keeps texts whole
_CHARACTERS = st.sampled_from([*"asSfilt'1 -x.é漢ß", r"\n", r"\r", r"\x41", r"\x{e9}", r"\u0073", r"\.", r"\-"])
_SETS = st.sampled_from([".", r"\s", r"\S", r"\d", r"\D", r"\p{L}", r"\P{L}", r"\p{N}", r"\p{Lu}", r"\p{M}", r"\P{Zs}"])
_MEMBERS = st.sampled_from([*"asx' é&~.", r"\n", r"\-", r"\x{e9}", "a-f", "0-9", "à-ü", r"\s", r"\S", r"\d", r"\p{L}"])
_ENDS = st.sampled_from(["", "-"])
_SEVERAL = st.lists(_MEMBERS, min_size=1, max_size=3).map("".join)
_CLASSES = st.builds("[{}{}{}{}]".format, st.sampled_from(["", "^"]), _ENDS, _SEVERAL, _ENDS)
_LETTERS = st.lists(st.sampled_from([*"staflik'", "[sa]", "[lt]"]), min_size=1, max_size=3).map("".join)
_FOLDS = _LETTERS.map("(?i:{})".format)
_COUNTS = st.sampled_from(["", "", "", "?", "*", "+", "{2}", "{1,2}", "{2,}", "{0,2}", "{1,3}"])
_QUANTIFIERS = st.tuples(_COUNTS, st.sampled_from(["", "", "?", "+"])).map(
    lambda pair: "".join(pair) if pair[0] else ""
)


def _quantified(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(items, _QUANTIFIERS).map("".join)


def _groups(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    alternatives = st.lists(st.lists(items, min_size=1, max_size=3).map("".join), min_size=1, max_size=2).map("|".join)
    around = st.builds("{}{})".format, st.sampled_from(["(?=", "(?!"]), alternatives)
    return _quantified(st.builds("{}{})".format, st.sampled_from(["(", "(?:", "(?>"]), alternatives)) | around


_ANCHORS = st.sampled_from(["^", "$", r"\A", r"\z"])
_ITEMS = st.recursive(_quantified(_CHARACTERS | _SETS | _CLASSES | _FOLDS) | _ANCHORS, _groups, max_leaves=5)
_PATTERNS = st.lists(st.lists(_ITEMS, min_size=1, max_size=3).map("".join), min_size=1, max_size=2).map(
    lambda alternatives: "|".join([*alternatives, r"[\s\S]"])
)
_TEXTS = st.text(st.sampled_from("aAsStTfil'1 \n\r\té漢٣ſßﬆ🤖\u0301-.x"), min_size=1, max_size=8)


@settings(max_examples=400, deadline=None)
@given(_PATTERNS, st.lists(_TEXTS, min_size=4, max_size=4))
def test_any_pattern_that_is_accepted_cuts_at_the_same_places(pattern: str, texts: list[str]) -> None:
    for translate, written, read in (
        (to_tokenizers, pieces_of_tiktoken, pieces_of_tokenizers),
        (to_tiktoken, pieces_of_tokenizers, pieces_of_tiktoken),
    ):
        try:
            translated = translate(pattern)
        except ValueError:
            continue
        assert to_tokenizers(translated) and to_tiktoken(translated)
        for text in texts:
            assert written(pattern, text) == read(translated, text)


@settings(max_examples=200, deadline=None)
@given(_PATTERNS, st.sampled_from(["", r"|\S|\s+", r"|\p{L}+|\P{L}", r"|\S+|\s+(?!\S)"]), _TEXTS)
def test_a_pattern_that_is_accepted_loses_no_text(pattern: str, end: str, text: str) -> None:
    pattern = pattern.removesuffix(r"|[\s\S]") + end
    try:
        tokenizer = Tokenizer(BYTES, pattern, append_special_tokens(BYTES), "random")
    except TokenizerError:
        return
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_both_know_the_same_characters() -> None:
    """Every code point, by general category, white space, digits and case: the Unicode tables of both are the same."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers")
    names = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()  # noqa: SIM905
    sets = [r"\p{" + name + "}" for name in names]
    by_category = "|".join(f"{one}+" for one in [*sets, f"[^{''.join(sets)}]"])
    # all pairs of bytes are tokens, so that another cut gives other ids
    ranks = BYTES | {bytes([a, b]): 256 + 256 * a + b for a in range(256) for b in range(256)}
    blocks = [block for block in range(0x1100) if not 0xD8 <= block < 0xE0]
    texts = ["".join(map(chr, range(256 * block, 256 * block + 256))) for block in blocks]
    vocab = {spell(token): i for token, i in ranks.items()}
    model = tokenizers.models.BPE(vocab, [(token[0], token[1]) for token in vocab if len(token) == 2])
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for pattern in (by_category, r"\s+|\d+|(?i:[abcdefghijklmnopqrstuvwxyz])+|[^\s\d]"):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(to_tokenizers(pattern)), "isolated")
        theirs = tokenizers.Tokenizer(model)
        theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
        ours = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for text, encoded in zip(texts, theirs.encode_batch(texts), strict=True):
            assert encoded.ids == ours.encode_ordinary(text), f"from U+{ord(text[0]):04X}"
