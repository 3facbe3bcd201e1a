"""Merges and ids as ranks: accepted only where tiktoken and tokenizers give the same ids for every text."""

from __future__ import annotations

import itertools

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from chatdata.tokenizer.merges import all_merges, ranks_of_merges

TEXTS = ["".join(letters) for n in range(1, 7) for letters in itertools.product("abc" if n < 6 else "ab", repeat=n)]
A, B, C, D = "abcd"
LETTERS = {A: 0, B: 1, C: 2, D: 3}


def vocabulary(*tokens: str) -> dict[str, int]:
    return LETTERS | {token: 4 + i for i, token in enumerate(tokens)}


def test_every_split_into_two_tokens_is_a_merge() -> None:
    assert all_merges(vocabulary("ab", "bc", "abc")) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    assert all_merges({"a": 1, "aa": 0, "aaa": 2}) == [("a", "a"), ("aa", "a"), ("a", "aa")]


@pytest.mark.parametrize(
    ("tokens", "merges", "ignore_merges", "message"),
    [
        # a look-up gives abc, merges in a longer piece ab, c; tiktoken abc everywhere
        (["ab", "bc", "abc"], ["a b", "b c", "a bc"], True, "do not both make the token 'abc'"),
        (["ab", "cd", "abc", "abcd"], ["a b", "c d", "ab c", "abc d"], True, "do not both make the token 'abcd'"),
        (["ab", "cd"], ["c d", "a b"], False, "the merge that makes 'cd' is out of id order: 'ab' has a lower id"),
        # of a pair listed twice the last counts
        (["ab", "cd"], ["a b", "c d", "a b"], False, "the merge that makes 'cd' is out of id order"),
        (["ab"], [], True, "do not both make the token 'ab'"),
        (["ab"], ["a b", "ab c"], True, "merge 'ab' 'c' is not of two tokens into a third"),
        (["ab", "aba"], ["a b", "ab x"], True, "merge 'ab' 'x' is not of two tokens"),
    ],
)
def test_other_ids_are_refused(tokens: list[str], merges: list[str], ignore_merges: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks_of_merges(vocabulary(*tokens), [tuple(merge.split()) for merge in merges], ignore_merges)


def test_tokens_that_no_merge_makes() -> None:
    vocab = vocabulary("ab", "dcba")
    assert ranks_of_merges(vocab, [("a", "b")], ignore_merges=True) == vocab  # a whole piece is looked up
    assert ranks_of_merges(vocab, [("a", "b")], ignore_merges=False) == vocabulary("ab")  # never given
    # the list does not lead to abc: ab is merged first
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    assert ranks_of_merges(vocabulary("ab", "bc", "abc"), merges, ignore_merges=False) == vocabulary("ab", "bc")


@st.composite
def _vocabularies(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokens, merges = list("abc"), []
    for _ in range(draw(st.integers(1, 7))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append((left, right))
        tokens += [left + right] * (left + right not in tokens)
    tokens += [
        token for token in draw(st.lists(st.text("abc", min_size=2, max_size=4), max_size=1)) if token not in tokens
    ]
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    ids = list(range(len(tokens)))
    if draw(st.booleans()):
        ids[3:] = draw(st.permutations(ids[3:]))
    vocab = dict(sorted(zip(tokens, ids, strict=True), key=lambda item: item[1]))
    return vocab, all_merges(vocab) if draw(st.booleans()) else merges


@settings(max_examples=300, deadline=None)
@given(_vocabularies(), st.booleans())
def test_what_is_accepted_gives_the_ids_of_tokenizers(
    found: tuple[dict[str, int], list[tuple[str, str]]], ignore_merges: bool
) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers")
    vocab, merges = found
    try:
        ranks = ranks_of_merges(vocab, merges, ignore_merges)
    except ValueError:
        assert not ignore_merges or merges != all_merges(vocab)  # what we save is always right
        return
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=ignore_merges))
    mergeable = {token.encode(): i for token, i in ranks.items()}
    ours = tiktoken.Encoding("x", pat_str=r"[\s\S]+", mergeable_ranks=mergeable, special_tokens={})
    for text in TEXTS:
        assert theirs.encode(text).ids == ours.encode_ordinary(text)
