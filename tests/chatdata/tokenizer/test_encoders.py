from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.demo.tokenizer import demo_tokenizer
from chatdata.errors import EncoderError, TokenizerError, UsageError
from chatdata.tokenizer import encoders, fast
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, EncodeBatch, Ids, Tokenizer, append_special_tokens
from chatdata.tokenizer.encoders import Encoder, canary_texts, check_some, find_encoder

DEMO = demo_tokenizer()
BYTES = {bytes([byte]): byte for byte in range(256)}
FAST = ("fastokens", "gigatoken")


@pytest.fixture(scope="session", params=FAST)
def demo_encoder(request: pytest.FixtureRequest) -> Encoder:
    return installed(request.param, DEMO)


@pytest.fixture(scope="session", params=FAST)
def edge_encoder(request: pytest.FixtureRequest) -> Encoder:
    return installed(request.param, EDGES)


@pytest.fixture(scope="session", params=FAST)
def nanochat_encoder(request: pytest.FixtureRequest, nanochat_tokenizer: Tokenizer) -> Encoder:
    return installed(request.param, nanochat_tokenizer)


def installed(name: str, tokenizer: Tokenizer) -> Encoder:
    pytest.importorskip(name)
    return find_encoder(name, tokenizer)


def assert_like_tiktoken(encoder: Encoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, counts = encoder.encode_batch(texts)
    assert (ids.dtype, counts.dtype) == (np.uint32, np.int64)
    expected = [tokenizer.encode_ordinary(text) for text in texts]
    assert counts.tolist() == list(map(len, expected))
    assert [part.tolist() for part in np.split(ids, counts.cumsum())[:-1]] == expected


def made_with(tokens: dict[bytes, int]) -> Tokenizer:
    ranks = BYTES | tokens
    return Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "made by hand")


# Merges that show where pieces end: any two digits, a newline and white space after it, two numerals
EDGES = made_with(
    {
        token: 256 + i
        for i, token in enumerate(
            [b"%02d" % number for number in range(100)]
            + [
                a + b
                for a in (b"\n", b"\r")
                for b in (b" ", b"\n", b"\t", b"\x0b", b"\x0c", b"\r", b"\xc2", b"\xe2", b"\xe3")
            ]
            + ["²".encode(), b"0\xc2\xb2", "½".encode(), "½½".encode(), b"  "]
        )
    }
)

# Texts of every kind: what the two patterns could see differently, and any text at all
SPACES = st.sampled_from([*" \n\r\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u3000", "\r\n"])
DIGITS = st.text("0123456789", min_size=1, max_size=9)
WORDS = st.sampled_from(
    [
        "the",
        "It",
        "'s",
        "'LL",
        "'Ve",
        "'ſ",
        "’",
        "K",
        "İ",
        "e\u0301",
        "汉字",
        "हि",
        "ſ",
        "👩\u200d👧",
        "<|bos|>",
        "½",
        "٣",
    ]
)
PARTS = st.one_of(SPACES, DIGITS, WORDS, st.text(max_size=5), st.text("ab .,'", max_size=80))
TEXTS = st.lists(PARTS, max_size=12).map("".join)


# equal to tiktoken


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=8))
def test_any_batch_gives_the_ids_of_tiktoken(demo_encoder: Encoder, texts: list[str]) -> None:
    assert_like_tiktoken(demo_encoder, DEMO, texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=8))
def test_any_batch_gives_the_ids_of_tiktoken_with_65536_entries(
    nanochat_encoder: Encoder, nanochat_tokenizer: Tokenizer, texts: list[str]
) -> None:
    assert_like_tiktoken(nanochat_encoder, nanochat_tokenizer, texts)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "", ""],
        ["", "a", "", "", "12345", ""],
        ["a\0b", "", "12345"],  # a mark of gigatoken's buffer
        ["", "12345\1", "x"],  # the other one
        ["ab", "lone \ud800 surrogate", "\udfff", "cd", "\ud83d\ude00 a pair"],
        ["x\n  ", "x\r\n \t", "x  ", "x\n", "x \n\u3000", "\n ", " \n \n", "!\n\n  ", "x\n\u2028\x85"],
        [f"x{newline}{space}" for newline in "\n\r" for space in " \t\x0b\x0c\x85\xa0\u2003\u3000"],
        ["1234567890" * 9, "12", "123", "a1234b", "٣٤٥", "10²", "x½", "1٢3", "½½½", "½½", "100²"],
        ["a\u180eb", "\u180e  \u180e"],
        list(SPECIAL_TOKENS),
        ["a" * n + "汉1234 b's\u00a0\n c" for n in range(70)],
    ],
    ids=lambda texts: ascii(texts)[:30],
)
def test_edges(edge_encoder: Encoder, texts: list[str]) -> None:
    assert_like_tiktoken(edge_encoder, EDGES, texts)
    assert_like_tiktoken(find_encoder("tiktoken", EDGES), EDGES, texts)


def test_digits_are_cut_into_pairs() -> None:
    buffer = np.frombuffer(b"a1234567 12 123 1234\05", np.uint8)
    cuts = fast._cuts_between_digits(buffer)
    assert np.insert(buffer, cuts, ord("|")).tobytes() == b"a12|34|56|7 12 12|3 12|34\05"


def test_only_texts_that_could_differ_leave_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    gigatoken = installed("gigatoken", DEMO)
    left = []

    def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Ids:
        left.extend(texts)
        return original(tokenizer, texts)

    original = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    stay = [
        "",
        "12345",
        "汉字 naïve 🤖👩\u200d👧",
        "x \n",
        "x  ",
        " \n x",
        "'ſ \u180e",
        "e\u0301 \u2028",
        "<|bos|>\x1c",
    ]
    leave = ["10²", "𝟙", "\0", "x\n ", "\U000e0080", "\ud800"]
    assert_like_tiktoken(gigatoken, DEMO, stay + leave)
    assert left == leave


def test_very_long_white_space_is_refused_like_tiktoken_does(demo_encoder: Encoder) -> None:
    with pytest.raises(TokenizerError, match="gives up on a text of 1,000,001 characters"):
        demo_encoder.encode_batch(["a", " " * 1_000_000 + "x"])
    assert_like_tiktoken(demo_encoder, DEMO, ["a", " " * 500_000, "b " * 300_000])


def test_gigatoken_loaded_afresh_goes_on_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_BYTES_BEFORE_RELOAD", 10)
    encoder = installed("gigatoken", DEMO)
    for _ in range(3):
        assert_like_tiktoken(encoder, DEMO, canary_texts()[:50])


@pytest.mark.parametrize("name", FAST)
def test_ids_with_holes_that_start_elsewhere(name: str) -> None:
    ranks = {bytes([byte]): 1000 - 3 * byte for byte in range(256)} | {b"ab": 5000, b"12": 7000, b"abab": 7001}
    tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "holes")
    encoder = installed(name, tokenizer)
    assert encoder.encode_batch(["ababab123", ""])[0].tolist() == [7001, 5000, 7000, 1000 - 3 * ord("3")]
    assert_like_tiktoken(encoder, tokenizer, canary_texts())


# vocabularies and patterns they cannot do


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(
    "tokens",
    [{b"abc": 256}, {b"abc": 256, b"ab": 257}, {b"ab": 256, b"cd": 257, b"bc": 258, b"bcd": 259, b"abcde": 260}],
)
def test_merges_that_are_not_closed_are_refused(
    name: str, tokens: dict[bytes, int], capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = made_with(tokens)
    pytest.importorskip(name)
    with pytest.raises(EncoderError, match=f"^{name} cannot do the vocabulary of made by hand: .*; use tiktoken$"):
        find_encoder(name, tokenizer)
    assert find_encoder("auto", tokenizer).name == "tiktoken"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", FAST)
def test_closed_merges_of_any_shape_are_equal(name: str) -> None:
    tokens = [
        b"ab",
        b"bc",
        b"abc",
        b"cd",
        b"abcd",
        b"cdab",
        b"aa",
        b"aaa",
        b"aaaa",
        b" a",
        b" ab",
        b"12",
        b"\n\n",
        b"\xc3\xa9",
    ]
    tokenizer = made_with({token: 256 + i for i, token in enumerate(tokens)})
    texts = [" abcdabcdab abab aaaaaaa aaaab bcdab é ée 1212121", "cdabcdabc\n\n\n ab", "xabcabcdd"]
    assert_like_tiktoken(installed(name, tokenizer), tokenizer, texts)


@pytest.mark.parametrize("name", FAST)
def test_other_split_patterns_are_for_tiktoken(name: str) -> None:
    tokenizer = Tokenizer(DEMO.ranks, r"\S+|\s+", DEMO.special_ids, "words")
    with pytest.raises(EncoderError, match=f"^{name} cannot do the split pattern of words, only nanochat's"):
        find_encoder(name, tokenizer)
    assert find_encoder("auto", tokenizer).name == "tiktoken"


# choosing


def test_auto_is_the_fastest() -> None:
    pytest.importorskip("fastokens")
    pytest.importorskip("gigatoken")
    assert find_encoder("auto", DEMO).name == "gigatoken"


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match=r'^--encoder fasttokens: no such encoder; did you mean "fastokens"\?$'):
        find_encoder("fasttokens", DEMO)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAST:
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    for name in FAST:
        with pytest.raises(EncoderError) as error:
            find_encoder(name, DEMO)
        assert str(error.value) == f"{name} is not installed: `uv sync --extra fast` installs it; or use tiktoken"
    assert find_encoder("auto", DEMO).name == "tiktoken"


def test_awkward_is_not_imported() -> None:
    """Importing it takes 0.3 s; nor does importing the module import a library."""
    pytest.importorskip("gigatoken")
    code = """
import json, sys
import chatdata.tokenizer.encoders
before = [name for name in ("tiktoken", "gigatoken", "fastokens") if name in sys.modules]
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
ranks = {bytes([byte]): byte for byte in range(256)}
tokenizer = Tokenizer(ranks, SPLIT_PATTERN, append_special_tokens(ranks), "")
encoder = chatdata.tokenizer.encoders.find_encoder("gigatoken", tokenizer)
encoder.encode_batch(["a", "b"])
print(json.dumps([before, "awkward" in sys.modules]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(result.stdout) == [[], False]


# sabotage is caught


def change_numbers(texts: list[str], found: Ids) -> Ids:
    """As if digits were in threes: one id of the texts with long numbers is another."""
    ids, counts = found[0].copy(), found[1]
    for text, start, end in zip(texts, counts.cumsum() - counts, counts.cumsum(), strict=True):
        if "12345" in text:
            ids[start:end] = ids[start:end][::-1]
    return ids, counts


def drop_a_text(texts: list[str], found: Ids) -> Ids:
    return found[0], found[1][: len(texts) - 1]


def drop_an_id(texts: list[str], found: Ids) -> Ids:
    return found[0][1:], found[1]


def move_a_bound(texts: list[str], found: Ids) -> Ids:
    counts = found[1].copy()
    if len(counts) > 3:
        counts[1:3] += [1, -1]
    return found[0], counts


@pytest.mark.parametrize("sabotage", [change_numbers, drop_a_text, drop_an_id, move_a_bound])
def test_a_wrong_encoder_is_caught_when_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[list[str], Ids], Ids]
) -> None:
    def wrong_route(tokenizer: Tokenizer) -> EncodeBatch:
        return lambda texts: sabotage(texts, tokenizer.encode_batch(texts))

    for name in FAST:
        monkeypatch.setitem(encoders.ROUTES, name, wrong_route)
        pytest.importorskip(name)
        with pytest.raises(EncoderError, match=rf"^{DEMO.name}: {name} [0-9.]+ .*; use tiktoken$"):
            find_encoder(name, DEMO)
    assert find_encoder("auto", DEMO).name == "tiktoken"


@pytest.mark.parametrize("sabotage", [drop_a_text, drop_an_id])
def test_a_wrong_batch_is_caught_by_the_check(sabotage: Callable[[list[str], Ids], Ids]) -> None:
    tiktoken = find_encoder("tiktoken", DEMO)
    texts = [f"text {i}" for i in range(100)]
    with pytest.raises(EncoderError, match=r"^here: tiktoken [0-9.]+ gave "):
        check_some(tiktoken, DEMO, texts, sabotage(texts, tiktoken.encode_batch(texts)), "here")


def test_the_check_names_the_text_and_both_ids(byte_tokenizer: Tokenizer) -> None:
    encoder = Encoder("slow", "1.2", find_encoder("tiktoken", byte_tokenizer).encode_batch)
    texts = ["x" * 50 + "here" + "y" * 50]
    ids, counts = encoder.encode_batch(texts)
    assert check_some(encoder, byte_tokenizer, texts, (ids, counts), "mmlu, rows 0 to 9") == 1
    ids[51] = 7
    with pytest.raises(EncoderError) as error:
        check_some(encoder, byte_tokenizer, texts, (ids, counts), "mmlu, rows 0 to 9")
    assert str(error.value) == (
        "mmlu, rows 0 to 9: slow 1.2 differs from tiktoken on the text "
        f"'…{'x' * 19}here{'y' * 17}…': from id 51 on [7, 114, 101, 121, 121] instead of [101, 114, 101, 121, 121]; "
        "use tiktoken"
    )


def test_the_check_sees_ids_that_are_missing_at_the_end(byte_tokenizer: Tokenizer) -> None:
    encoder = find_encoder("tiktoken", byte_tokenizer)
    with pytest.raises(EncoderError, match=r"on the text 'abc': from id 2 on \[\] instead of \[99\]; use tiktoken$"):
        check_some(encoder, byte_tokenizer, ["abc"], (np.array([97, 98]), np.array([2])), "here")


def test_one_text_in_400_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = find_encoder("tiktoken", DEMO)
    encode_ordinary, seen = DEMO.encode_ordinary, []

    def sampled(texts: list[str]) -> list[str]:
        found = encoder.encode_batch(texts)
        seen.clear()
        assert check_some(encoder, DEMO, texts, found, "") == len(seen)
        return list(seen)

    monkeypatch.setattr(DEMO, "encode_ordinary", lambda text: seen.append(text) or encode_ordinary(text))
    texts = [f"{i} " * (1 + i % 7) for i in range(12_000)]
    chosen = sampled(texts)
    assert len(chosen) == 30 and 0.0023 <= sum(map(len, chosen)) / sum(map(len, texts)) < 0.0027
    assert chosen == sampled(texts) and set(chosen).isdisjoint(sampled([*texts[:-1], "another"]))
    assert sampled([]) == [] and sampled([""]) == [""] and len(sampled(["", "a", ""])) == 1
