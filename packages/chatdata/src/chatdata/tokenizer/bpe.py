"""The tokenizer: byte-level BPE on tiktoken with nine special tokens directly after the merges; training with rustbpe.

Loading and saving are in files.py.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from chatdata.errors import ChatdataError, TokenizerError

# karpathy/nanochat@790f3be:nanochat/tokenizer.py fixes names and order; the order fixes the ids
SPECIAL_TOKENS = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)

# GPT-4's split pattern with digits in runs of at most 2 instead of 3, nanochat's choice for a 64K vocabulary
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Texts whose ids identify a tokenizer by its behaviour: equal files with different code, or equal sizes with different
# merges, differ here. Never change one: the hash of their ids is in every manifest.
CANARY_TEXTS = (
    "Hello, world! It's 2026-01-31 and we'll spell s,t,r,a,w,b,e,r,r,y.",
    "def f(x):\n    return x**2 + 10.5\n\n\n\tprint(f(1234567890))  \r\n",
    "#### 1,234 = 5/6 * 7 - 8.90 % (A) <|bos|> <|assistant_end|>",
    "Größe, naïve, año, İstanbul, Ελληνικά, Русский, עברית, العربية, हिन्दी",
    "汉字与标点，日本語のテキスト、한국어 문장. ٣٤ ५६ ⅷ ½ 🤖👩‍👩‍👧 \u200b\u2028e\u0301",
    "  leading and trailing   \n \n\x00\x1f~",
)

MAX_UINT16_VOCAB = 65_536

Ids = tuple[np.ndarray, np.ndarray]  # uint32 [num_ids], text after text; int64 [num_texts], how many of each
EncodeBatch = Callable[[list[str]], Ids]


class Tokenizer:
    """Byte-level BPE: `ranks` (token bytes → id), a split pattern, and special tokens (name → id).

    dtype: of shards, little-endian uint16, or uint32 if the vocabulary size (special tokens included) exceeds 65,536.
    canary_sha256: over the ids of CANARY_TEXTS: per text its count, then its ids, all `<u4`.

    Raises TokenizerError if one of the nine special tokens or of the 256 single bytes is missing, an id does not fit 32
    bits or is used twice, or the pattern does not compile or loses text.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special_ids: Mapping[str, int], name: str) -> None:
        import tiktoken

        _check_vocabulary(ranks, special_ids, name)
        self.name = name
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.special_ids = dict(special_ids)
        self.vocab_size = max(max(ranks.values()), max(special_ids.values())) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= MAX_UINT16_VOCAB else "<u4")
        try:
            self.encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids
            )
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise TokenizerError(f"{name}: the split pattern does not compile: {reason}") from None
        digest = hashlib.sha256()
        for text in CANARY_TEXTS:
            ids = self.encode_ordinary(text)
            # what no alternative of the pattern matches, tiktoken drops in silence: `\w+` loses spaces and signs
            if (found := self.encoding.decode(ids)) != text:
                lost = next((char for char in text if char not in found), text[0])
                raise TokenizerError(
                    f"{name}: the split pattern loses text ({lost!r} for one); it must match every character, "
                    "for example by ending in |\\s+|."
                )
            digest.update(np.array([len(ids), *ids], dtype="<u4").tobytes())
        self.canary_sha256 = digest.hexdigest()

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`; a special token spelled in it stays text. Raises TokenizerError if the pattern gives up."""
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:  # tiktoken's regex engine panics, for example on 1,000,000 spaces
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"{self.name}: the split pattern gives up on a text of {len(text):,} characters (a very long run of "
                "white space?); shorten it"
            ) from None

    def encode_batch(self, texts: list[str]) -> Ids:
        """Ids of all texts, one text at a time: what faster encoders are held to. Raises TokenizerError."""
        ids, counts = array("I"), np.empty(len(texts), np.int64)
        for i, text in enumerate(texts):
            found = self.encode_ordinary(text)
            ids.extend(found)  # 0.02 of the 0.7 s per million tokens; tiktoken's conversion to NumPy takes no less
            counts[i] = len(found)
        return np.array(ids, np.uint32), counts

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids), errors="replace")

    def decode_token(self, token_id: int) -> str:
        return self.decode([token_id])

    @cached_property
    def token_bytes(self) -> dict[int, bytes]:
        """id → bytes, from the merges themselves; special tokens have none."""
        return {rank: token for token, rank in self.ranks.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.ranks, self.pattern, self.special_ids, self.name)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over everything that decides the ids of a text: merges, pattern, special tokens."""
        digest = hashlib.sha256(repr((self.pattern, sorted(self.special_ids.items()))).encode())
        for token, rank in sorted(self.ranks.items(), key=itemgetter(1)):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        return digest.hexdigest()


def append_special_tokens(ranks: Mapping[bytes, int]) -> dict[str, int]:
    """The nine special tokens' ids, directly after the highest rank."""
    first = max(ranks.values(), default=-1) + 1
    return {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}


def train_tokenizer(texts: Iterator[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Train byte-level BPE with rustbpe to a vocabulary of `vocab_size`, the nine special tokens included.

    Deterministic: ties between pairs are broken by the pair, so thread count does not matter.
    Raises TokenizerError if the texts do not yield enough merges, `vocab_size` is below 265, or the pattern is invalid.
    """
    import rustbpe

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(f"--vocab-size {vocab_size} is too small: 256 bytes and 9 special tokens need {smallest}")
    trainer = rustbpe.Tokenizer()
    try:
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
    except (ValueError, OverflowError) as error:
        if isinstance(error, ChatdataError):
            raise
        raise TokenizerError(f"training failed: {str(error).splitlines()[0]}") from None
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < vocab_size - len(SPECIAL_TOKENS):
        raise TokenizerError(
            f"the training text yields only {len(ranks)} of the {vocab_size - len(SPECIAL_TOKENS)} tokens requested; "
            "give more text or a smaller --vocab-size"
        )
    return Tokenizer(ranks, pattern, append_special_tokens(ranks), "trained")


def _check_vocabulary(ranks: Mapping[bytes, int], special_ids: Mapping[str, int], name: str) -> None:
    missing = [token for token in SPECIAL_TOKENS if token not in special_ids]
    if missing:
        raise TokenizerError(
            f"{name}: special tokens missing: {', '.join(missing)}; all nine must be in the tokenizer "
            "(import a .tiktoken file, or train one, to have them appended)"
        )
    ids = [*ranks.values(), *special_ids.values()]
    unfit = [token_id for token_id in ids if type(token_id) is not int or not 0 <= token_id < 2**32]
    if unfit:
        raise TokenizerError(f"{name}: id {unfit[-1]!r} does not fit uint32 shards; ids must be in 0 … {2**32 - 1}")
    if len(set(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise TokenizerError(f"{name}: id {int(values[counts > 1][0])} is used twice")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise TokenizerError(f"{name}: {len(absent)} of the 256 single bytes have no token (first: 0x{absent[0]:02x})")
