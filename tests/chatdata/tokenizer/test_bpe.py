from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from chatdata.errors import TokenizerError
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, append_special_tokens, train_tokenizer
from chatdata.tokenizer.files import save_tokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}
SPECIALS = append_special_tokens(BYTES)


def test_special_ids_follow_the_merges(nanochat_tokenizer: Tokenizer) -> None:
    assert nanochat_tokenizer.vocab_size == 65_536
    assert nanochat_tokenizer.special_ids == {name: 65_527 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert nanochat_tokenizer.dtype.str == "<u2"


def test_canary_tells_tokenizers_apart() -> None:
    other = train_tokenizer(iter(["the same size but other text, " * 20]), 256 + 9 + 5)
    again = train_tokenizer(iter(["the same size but other text, " * 20]), 256 + 9 + 5)
    assert other.canary_sha256 == again.canary_sha256
    assert other.canary_sha256 != train_tokenizer(iter(["completely different words " * 20]), 270).canary_sha256


def test_training_is_deterministic_over_thread_counts(tmp_path: Path, chatdata: Callable) -> None:
    # many equal counts: ties must not be broken by chance
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcdefgh", k=6)) + " " for _ in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    contents = []
    for threads in ("1", "2", "5"):
        out = tmp_path / f"tokenizer{threads}"
        arguments = ("tokenizer", "train", tmp_path / "text.txt", "--vocab-size", 600, "--out", out)
        result = chatdata(*arguments, env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads})
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{out}: 600 tokens, shards will be uint16\n"
        contents.append((out / "tokenizer.json").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_training_on_too_little_text() -> None:
    with pytest.raises(TokenizerError, match="yields only 258 of the 991 tokens requested"):
        train_tokenizer(iter(["abc"]), 1000)
    with pytest.raises(TokenizerError, match="256 bytes and 9 special tokens need 265"):
        train_tokenizer(iter(["abc"]), 264)


def test_wide_vocabularies_get_uint32_shards(tmp_path: Path) -> None:
    # 65,527 merges and nine specials still fit; one more entry does not
    def sized(num_ranks: int) -> Tokenizer:
        extra = {i.to_bytes(3, "big"): 256 + i for i in range(num_ranks - 256)}
        return Tokenizer({**BYTES, **extra}, SPLIT_PATTERN, append_special_tokens({**BYTES, **extra}), "wide")

    assert sized(65_527).dtype.str == "<u2"
    assert sized(65_528).dtype.str == "<u4"


def test_vocabulary_is_checked() -> None:
    specials = append_special_tokens(BYTES)
    for ranks, special_ids, message in [
        ({**BYTES, b"ab": 2**32}, specials, r"id 4294967296 does not fit; ids must be integers in 0 … 1,048,575$"),
        ({**BYTES, b"ab": 256}, specials, "id 256 is used twice"),
        ({**BYTES, b"ab": -1}, specials, "id -1 does not fit"),
        ({**BYTES, b"ab": 2**20}, specials, "id 1048576 does not fit"),
        ({**BYTES, b"ab": True}, specials, "id true does not fit"),
        ({**BYTES, b"a" * 10_000: 265}, specials, "its tokens are too long, up to 10,000 bytes"),
        ({b"a": 0}, specials, "255 of the 256 single bytes have no token"),
    ]:
        with pytest.raises(TokenizerError, match=message):
            Tokenizer(ranks, SPLIT_PATTERN, special_ids, "test")
    assert Tokenizer({**BYTES, b"ab": 2**20 - 1}, SPLIT_PATTERN, specials, "test").vocab_size == 2**20
    with pytest.raises(TokenizerError, match="the split pattern does not compile"):
        Tokenizer(BYTES, "[z-a]|[^a]|a", specials, "test")


@pytest.mark.parametrize(
    ("pattern", "lost"),
    [
        (r"[^\x00]+", r"'\x00'"),
        (r"\S+", r"'\t'"),
        (r"\d|[^\d一-龥]|[一-龤]", "'龥'"),
        (r"\S+|\s+(?!\S)", r"'\t'"),  # only where another space, or nothing, follows
        (r"(?:\s\S)?+[\s\S](?!x)", r"'\x00'"),
        (r"[^a]|(?>ab?)(?!b)", "'a'"),
    ],
)
def test_a_pattern_that_loses_text_is_refused(pattern: str, lost: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(BYTES, pattern, SPECIALS, "lossy")
    assert str(caught.value).startswith(f"lossy: the split pattern loses text ({lost} for one); it must match every")


@pytest.mark.parametrize("pattern", ["", "a*", "(?=a)", "a|b?"])
def test_a_pattern_that_matches_nothing_is_refused_in_silence(pattern: str, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(
        TokenizerError, match=r"^t: the split pattern can match the empty text; tiktoken fails on that$"
    ):
        Tokenizer(BYTES, pattern, SPECIALS, "t")
    assert capfd.readouterr() == ("", "")  # Rust would report its panic


def test_training_with_a_bad_pattern() -> None:
    for pattern in (r"\w+", "[a-z", ""):
        with pytest.raises(TokenizerError):
            train_tokenizer(iter(["some text here, and there " * 50]), 300, pattern)


def test_a_text_the_pattern_gives_up_on_names_file_and_line(
    tmp_path: Path, byte_tokenizer: Tokenizer, chatdata: Callable
) -> None:
    with pytest.raises(TokenizerError, match=r"gives up on a text of 1,000,001 characters"):
        byte_tokenizer.encode_ordinary(" " * 1_000_000 + "x")
    save_tokenizer(byte_tokenizer, tmp_path / "t")
    lines = ("Hi", " " * 1_000_000 + "x")
    (tmp_path / "c.jsonl").write_text("".join(f'[{{"role": "user", "content": "{line}"}}]\n' for line in lines))
    (tmp_path / "r.toml").write_text('stage = "mid"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    result = chatdata(
        "build", "--recipe", tmp_path / "r.toml", "--tokenizer", tmp_path / "t", "--out", tmp_path / "out"
    )
    assert result.stderr.splitlines()[-1].startswith("Error: c.jsonl line 2: ")
    assert "Traceback" not in result.stderr and "panicked" not in result.stderr


def test_training_on_a_text_the_pattern_gives_up_on(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(TokenizerError, match=r"^training failed: regex match failed: "):
        train_tokenizer(iter(["abc " * 100, " " * 1_000_000 + "x"]), 270)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_gives_up_in_silence(byte_tokenizer: Tokenizer, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(TokenizerError, match=r"gives up on a text of 1,000,001 characters"):
        byte_tokenizer.encode_ordinary(" " * 1_000_000 + "x")
    assert capfd.readouterr() == ("", "")
    os.write(2, b"standard error is back")
    assert capfd.readouterr() == ("", "standard error is back")
