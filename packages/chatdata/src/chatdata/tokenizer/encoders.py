"""Choose the encoder that turns texts into ids: tiktoken is the reference, fastokens and gigatoken give its ids faster.

The fast two (extra "fast") are tested with the tokenizer on a few hundred texts when they are loaded;
while they are used, `check_some` compares one text in 400. fast.py has the routes.
"""

import random
from contextlib import suppress
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from chatdata.errors import ChatdataError, EncoderError, UsageError, nearest
from chatdata.tokenizer.bpe import CANARIES, CANARY_TEXTS, SPECIAL_TOKENS, SPLIT_PATTERN, EncodeBatch, Ids, Tokenizer
from chatdata.tokenizer.fast import fastokens_route, gigatoken_route

ROUTES = {"gigatoken": gigatoken_route, "fastokens": fastokens_route}  # fastest first
ENCODERS = ("tiktoken", *reversed(ROUTES))
ONE_IN = 400  # texts is compared by check_some: 0.003 CPU-seconds per million tokens; gigatoken takes 0.09


class Encoder(NamedTuple):
    """`encode_batch`: texts → ids uint32 [num_ids], text after text; counts int64 [num_texts], how many of each.

    Ordinary encoding: a special token spelled in a text stays text. Raises TokenizerError if tiktoken gives up on one.
    """

    name: str
    version: str  # of the library
    encode_batch: EncodeBatch


def find_encoder(name: str, tokenizer: Tokenizer) -> Encoder:
    """The encoder of that name; for "auto" the fastest that is installed and has tiktoken's ids with this tokenizer.

    Raises UsageError for an unknown name, EncoderError if that encoder is not installed, cannot do the tokenizer's
    split pattern or vocabulary, or gives other ids than tiktoken. "auto" raises neither: tiktoken is always installed.
    """
    if name not in ("auto", *ENCODERS):
        raise UsageError(f"--encoder {name}: no such encoder{nearest(name, ('auto', *ENCODERS))}")
    for candidate in ROUTES if name == "auto" else ():
        with suppress(EncoderError):
            return _load(candidate, tokenizer)
    return _load("tiktoken" if name == "auto" else name, tokenizer)


def check_some(
    encoder: Encoder, tokenizer: Tokenizer, texts: list[str], found: Ids, where: str, one_in: int = ONE_IN
) -> int:
    """Compare every 400th (`one_in`th) text of a batch with tiktoken; at least one if there is one.

    found: what `encoder.encode_batch(texts)` gave. The first text depends on how many there are and how long.
    Returns how many were compared. Raises EncoderError, starting with `where`, for the first whose ids differ.
    """
    ids, counts = found
    about = f"{where}: {encoder.name} {encoder.version}"
    if len(counts) != len(texts) or counts.sum() != len(ids):
        raise EncoderError(f"{about} gave {len(ids)} ids and {len(counts)} counts for {len(texts)} texts; use tiktoken")
    chosen = range(len(ids) % max(1, min(one_in, len(texts))), len(texts), one_in)
    ends = counts.cumsum()
    for i in chosen:
        got, right = ids[ends[i] - counts[i] : ends[i]], tokenizer.encode_batch([texts[i]])[0]
        if not np.array_equal(got, right):
            raise EncoderError(f"{about} differs from tiktoken on {_difference(texts[i], got, right, tokenizer)}")
    return len(chosen)


def canary_texts() -> list[str]:
    """A few hundred short texts that mix whatever encoders could differ in."""
    draw = random.Random(0)
    spaces, letters, numbers, signs, longer = CANARIES["mixed"].values()
    texts = ["", *CANARY_TEXTS, "", *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)]
    texts += ["7" * n + end for n in range(1, 10) for end in ("", "x")]
    texts += [start + a + b for start in ("x", "!") for a in spaces for b in ("", " ", "\n", "\n  ")]
    texts += ["".join(draw.choices(spaces + letters + numbers + signs + longer, k=12)) for _ in range(150)]
    # gigatoken classifies 64 bytes at a time: every kind of character at different places of the 64
    texts += ["a" * n + "".join(draw.choices([" "] * 20 + letters + numbers + signs, k=60)) for n in range(0, 64, 3)]
    return [*texts, "the " * 400, "汉" * 300, "-" * 300, "ab" * 300, " " * 300, ""]


def _load(name: str, tokenizer: Tokenizer) -> Encoder:
    if name == "tiktoken":
        return Encoder(name, version(name), tokenizer.encode_batch)
    if tokenizer.pattern != SPLIT_PATTERN:
        raise EncoderError(f"{name} cannot do the split pattern of {tokenizer.name}, only nanochat's; use tiktoken")
    try:
        route = ROUTES[name](tokenizer)
        of_nfc: EncodeBatch = lambda texts: route(list(map(tokenizer.normalized, texts)))  # noqa: E731
        encoder = Encoder(name, version(name), of_nfc if tokenizer.nfc else route)
        texts = canary_texts()
        for size in (len(texts), 17):  # all in one batch, then in small ones: 0.02 to 0.05 s
            for start in range(0, len(texts), size):
                batch = texts[start : start + size]
                check_some(encoder, tokenizer, batch, encoder.encode_batch(batch), tokenizer.name, one_in=1)
    except ImportError:
        raise EncoderError(f"{name} is not installed: `uv sync --extra fast` installs it; or use tiktoken") from None
    except ChatdataError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # Rust's: how gigatoken refuses merges
        if not is_panic and not isinstance(error, (RuntimeError, ValueError)):
            raise
        reason = "a token is not made of two others" if is_panic else str(error).splitlines()[0]
        raise EncoderError(f"{name} cannot do the vocabulary of {tokenizer.name}: {reason}; use tiktoken") from None
    return encoder


def _difference(text: str, got: np.ndarray, right: np.ndarray, tokenizer: Tokenizer) -> str:
    shorter = min(len(got), len(right))
    num_same = int(np.argmin(np.append(got[:shorter] == right[:shorter], False)))
    at = len(tokenizer.decode(right[:num_same].tolist()))
    excerpt = "…" * (at > 20) + text[max(at - 20, 0) : at + 20] + "…" * (at + 20 < len(text))
    near = slice(num_same, num_same + 5)
    ids = f"{got[near].tolist()} instead of {right[near].tolist()}"
    return f"the text {excerpt!r}: from id {num_same} on {ids}; use tiktoken"
