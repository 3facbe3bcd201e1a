"""Train a tokenizer with rustbpe."""

from __future__ import annotations

from collections.abc import Iterator

from chatdata.errors import ChatdataError, TokenizerError
from chatdata.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, append_special_tokens


def train_tokenizer(texts: Iterator[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Train byte-level BPE with rustbpe to `vocab_size` entries, the nine special tokens included.

    Deterministic: ties between pairs are broken by the pair, so thread count does not matter.
    Raises TokenizerError if the texts do not yield enough merges, `vocab_size` is below 265, or the pattern is unfit.
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
            f"the training text yields only {len(ranks)} of the {vocab_size - len(SPECIAL_TOKENS)} entries asked for; "
            "give more text or a smaller --vocab-size"
        )
    return Tokenizer(ranks, pattern, append_special_tokens(ranks), "trained")
