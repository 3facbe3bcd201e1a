"""The merges of a tokenizer.json and ids as ranks: when they give the same ids for every text.

tokenizers merges the pair that comes first in its list; tiktoken any two neighbours that together are a token, the
lowest id first. What happens to a token's bytes does not depend on the text around them until it is whole, so it is
enough to look at every token by itself. Here a token is spelled in the byte-level alphabet, a character per byte.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[str, str]

# byte → printable character, the byte-level alphabet of GPT-2 (openai/gpt-2:src/encoder.py)
TO_CHAR = {byte: chr(byte) for byte in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in TO_CHAR)}
TO_BYTE = {char: byte for byte, char in TO_CHAR.items()}


def spell(token: bytes) -> str:
    """A token in the byte-level alphabet."""
    return token.decode("latin-1").translate(TO_CHAR)


def all_merges(vocab: Mapping[str, int]) -> list[Pair]:
    """The merges that give ids as ranks: every split of a token into two tokens. `vocab` is in the order of its ids.

    tiktoken joins *any* two neighbours whose bytes are a token, not only the two that it was trained with.
    """
    merges = []
    for token in vocab:
        lefts = [token[:i] for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        if len(lefts) > 1:
            lefts.sort(key=vocab.__getitem__)
        merges += [(left, token[len(left) :]) for left in lefts]
    return merges


def ranks_of_merges(vocab: Mapping[str, int], merges: Sequence[Pair], ignore_merges: bool) -> dict[str, int]:
    """The tokens with which tiktoken gives the ids that tokenizers gives, whatever the text.

    ignore_merges: tokenizers looks up a whole piece before it merges, as tiktoken always does. Without it, tokens that
    no merge makes are never given and left out. Every token must come out of its characters by the merges and by ids,
    or by neither, and the last merge of each must rank as its id does. Raises ValueError for the first that does not.
    """
    order = {}  # of a pair that is listed twice the last counts
    for number, (left, right) in enumerate(merges):
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(f"merge {left!r} {right!r} is not of two tokens into a third")
        order[left, right] = number
    made = {token: last for token in vocab if (last := _last_merge(token, order.get)) is not None}
    ranks = {token: i for token, i in vocab.items() if ignore_merges or token in made or len(token) == 1}
    before = ("", -1)
    for token in sorted(ranks, key=ranks.__getitem__):
        by_id = _last_merge(token, lambda pair: ranks.get(pair[0] + pair[1]))
        if (by_id is None) != (token not in made):
            raise ValueError(f"the merges, and tiktoken, which merges by id, do not both make the token {token!r}")
        if token in made:
            if made[token] < before[1]:
                why = f"{before[0]!r} has a lower id and is merged later; tiktoken merges in id order"
                raise ValueError(f"the merge that makes {token!r} is out of id order: {why}")
            before = token, made[token]
    return ranks


def _last_merge(token: str, order: Callable[[Pair], int | None]) -> int | None:
    """The order of the merge that makes the whole token of its characters; None if they do not come together."""
    symbols, last = list(token), None
    while len(symbols) > 1:
        found = [(number, i) for i, pair in enumerate(pairwise(symbols)) if (number := order(pair)) is not None]
        if not found:
            return None
        last, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return last
