"""The tokenizer: byte-level BPE on tiktoken with nine special tokens directly after the merges; training with rustbpe.

Loading and saving are in files.py.
"""

import hashlib
import os
import re
import tomllib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from chatdata.disk import shown
from chatdata.errors import ChatdataError, TokenizerError, first_line
from chatdata.tokenizer.merges import Pair, all_merges, spell
from chatdata.tokenizer.patterns import covering, to_tokenizers

# karpathy/nanochat@790f3be:nanochat/tokenizer.py fixes names and order; the order fixes the ids
SPECIAL_TOKENS = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)

# GPT-4's split pattern with digits in runs of at most 2 instead of 3, nanochat's choice for a 64K vocabulary
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# texts whose ids identify a tokenizer, and what encoders could differ in
CANARIES = tomllib.loads(Path(__file__).with_name("canaries.toml").read_text(encoding="utf-8"))
CANARY_TEXTS = tuple(CANARIES["texts"])

MAX_UINT16_VOCAB = 65_536
MAX_VOCAB = 2**20  # readers make arrays of this length; the largest vocabularies in use have 262,144 tokens
MAX_SQUARES = 2**26  # sum over the squared lengths of tokens: what their merges cost; 200,000 tokens have a quarter
_COMPOSES = re.compile("[\u0300-\U0010ffff]")  # texts of characters below are in NFC
LONG = 10_000  # characters from which a text may be too much for the pattern

BYTES = {bytes([byte]): byte for byte in range(256)}

Ids = tuple[np.ndarray, np.ndarray]  # uint32 [num_ids], text after text; int64 [num_texts], how many of each
EncodeBatch = Callable[[list[str]], Ids]


class Tokenizer:
    """Byte-level BPE: `ranks` (token bytes → id), a split pattern, and special tokens (name → id).

    nfc: texts are brought to Unicode's normalization form C before they are split, as Qwen's tokenizers do.
    missing_special_tokens: which of nanochat's nine it lacks; nanochat's chat format needs them all.
    dtype: of shards, little-endian uint16, or uint32 if the vocabulary size (special tokens included) exceeds 65,536.
    canary_sha256: over the ids of CANARY_TEXTS: per text its count, then its ids, all `<u4`.

    Raises TokenizerError if one of the 256 single bytes is missing, an id is used twice or not below 1,048,576, or the
    pattern loses text or is not read the same way by tokenizers (patterns.py).
    """

    def __init__(
        self, ranks: Mapping[bytes, int], pattern: str, special_ids: Mapping[str, int], name: str, nfc: bool = False
    ) -> None:
        from tiktoken import Encoding

        _check_vocabulary(ranks, special_ids, name)
        self.name = name
        self.nfc = nfc
        self.is_as_saved = False  # read from a tokenizer.json that save_tokenizer wrote, so compared with tokenizers
        self.num_bytes_appended = 0  # single bytes that the tokenizer.json had no token for
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.special_ids = dict(sorted(special_ids.items(), key=itemgetter(1)))
        self.missing_special_tokens = [token for token in SPECIAL_TOKENS if token not in special_ids]
        self.vocab_size = max(*ranks.values(), *special_ids.values()) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= MAX_UINT16_VOCAB else "<u4")
        try:
            self.pattern_of_tokenizers = to_tokenizers(pattern)
            alternatives, characters = covering(pattern)
        except ValueError as error:
            raise TokenizerError(f"{name}: {error}") from None
        try:
            self.encoding = Encoding(name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.special_ids)
        except ValueError as error:
            raise TokenizerError(f"{name}: the split pattern does not compile: {first_line(error)}") from None
        single = Encoding(name, pat_str=alternatives or "(?!)", mergeable_ranks=BYTES, special_tokens={})
        # what no alternative of the pattern matches, tiktoken drops in silence: `\S+` loses spaces
        if lost := [char for char in characters if not single.encode_ordinary(char)]:
            right = "it must match every character, whatever comes after it, for example by ending in |\\s+|."
            raise TokenizerError(f"{name}: the split pattern loses text ({lost[0]!r} for one); {right}")

    @cached_property
    def canary_sha256(self) -> str:
        digest = hashlib.sha256()
        for text in CANARY_TEXTS:
            ids = self.encode_ordinary(text)
            digest.update(np.array([len(ids), *ids], dtype="<u4").tobytes())
        return digest.hexdigest()

    def normalized(self, text: str) -> str:
        """The text that is split: `text`, or its NFC by the tables of `tokenizers` (those of Python are newer)."""
        if not self.nfc or text.isascii() or not _COMPOSES.search(text):
            return text
        from tokenizers.normalizers import NFC  # 0.02 s the first time

        # a lone surrogate becomes U+FFFD, as in tiktoken
        return NFC().normalize_str(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`; a special token spelled in it stays text. Raises TokenizerError if the pattern gives up."""
        text = self.normalized(text)
        try:
            with quiet_rust() if len(text) >= LONG else nullcontext():
                return self.encoding.encode_ordinary(text)
        except BaseException as error:  # tiktoken's regex engine panics, for example on 1,000,000 spaces
            if type(error).__name__ != "PanicException":
                raise
            what = f"a text of {len(text):,} characters (a very long run of white space?); shorten it"
            raise TokenizerError(f"{self.name}: the split pattern gives up on {what}") from None

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

    @cached_property
    def spelled(self) -> tuple[dict[str, int], list[Pair]]:
        """The tokens in the byte-level alphabet with their ids, in the order of these; and the merges they need."""
        vocab = {spell(token): rank for token, rank in sorted(self.ranks.items(), key=itemgetter(1))}
        return vocab, all_merges(vocab)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.ranks, self.pattern, self.special_ids, self.name, self.nfc)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over everything that decides the ids of a text: merges, pattern, special tokens, normalization."""
        digest = hashlib.sha256(repr((self.pattern, sorted(self.special_ids.items()))).encode() + b"NFC" * self.nfc)
        for token, rank in sorted(self.ranks.items(), key=itemgetter(1)):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        return digest.hexdigest()


@contextmanager
def quiet_rust() -> Iterator[None]:
    """Standard error is closed meanwhile: Rust prints 80 lines there for a panic, even for one that is caught."""
    standard_error = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)


def append_special_tokens(ranks: Mapping[bytes, int], special_ids: Mapping[str, int] | None = None) -> dict[str, int]:
    """`special_ids`, and those of the nine that are not in it with the ids directly after the highest one."""
    found = dict(special_ids or {})
    first = max([*ranks.values(), *found.values()], default=-1) + 1
    return found | {name: first + i for i, name in enumerate(name for name in SPECIAL_TOKENS if name not in found)}


def train_tokenizer(texts: Iterator[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Train byte-level BPE with rustbpe to a vocabulary of `vocab_size`, the nine special tokens included.

    Deterministic: ties between pairs are broken by the pair, so thread count does not matter.
    Raises TokenizerError if the texts do not yield enough merges, `vocab_size` is below 265, or the pattern is invalid.
    """
    import rustbpe

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise TokenizerError(f"--vocab-size {vocab_size} is too small: 256 bytes and 9 special tokens need {smallest}")
    trainer, num_ranks = rustbpe.Tokenizer(), vocab_size - len(SPECIAL_TOKENS)
    try:
        with quiet_rust():
            trainer.train_from_iterator(texts, num_ranks, pattern=pattern)
    except BaseException as error:  # a panic of the pattern, on 1,000,000 spaces for one, is no Exception
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, ChatdataError) or not (is_panic or isinstance(error, (ValueError, OverflowError))):
            raise
        raise TokenizerError(f"training failed: {first_line(error)}") from None
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < num_ranks:
        found = f"only {len(ranks)} of the {num_ranks} tokens requested"
        raise TokenizerError(f"the training text yields {found}; give more text or a smaller --vocab-size")
    return Tokenizer(ranks, pattern, append_special_tokens(ranks), "trained")


def _check_vocabulary(ranks: Mapping[bytes, int], special_ids: Mapping[str, int], name: str) -> None:
    ids = [*ranks.values(), *special_ids.values()]
    if unfit := [shown(i) for i in ids if type(i) is not int or not 0 <= i < MAX_VOCAB]:
        raise TokenizerError(f"{name}: id {unfit[-1]} does not fit; ids must be integers in 0 … {MAX_VOCAB - 1:,}")
    if sum(len(token) ** 2 for token in ranks) > MAX_SQUARES:
        longest = max(map(len, ranks))
        raise TokenizerError(f"{name}: its tokens are too long, up to {longest:,} bytes; at most a few may have 1,000")
    if len(set(ids)) != len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise TokenizerError(f"{name}: id {int(values[counts > 1][0])} is used twice")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{name}: {len(absent)} of the 256 single bytes have no token (first: 0x{absent[0]:02x})")
