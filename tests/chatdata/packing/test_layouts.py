"""Plans of documents into sequences: literal ones, and what must always hold."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.errors import ChatdataError, PackingError
from chatdata.packing.layouts import Packing, best_fit_decreasing, pack, pad, stream

DRAWN = np.array([5, 7, 3, 6, 3, 2])  # tokens of documents a .. f in the module's drawing


def all_targets(lengths: np.ndarray) -> np.ndarray:
    """What mask=ignore passes when nothing is cut."""
    return np.asarray(lengths) - 1


def sequences(plan: Packing) -> list[list[int]]:
    return [plan.documents[a:b].tolist() for a, b in zip(plan.bounds[:-1], plan.bounds[1:], strict=True)]


def contents(bins: np.ndarray) -> list[list[int]]:
    """Documents of each bin, bins in the order they were opened."""
    return [np.flatnonzero(bins == b).tolist() for b in range(bins.max(initial=-1) + 1)]


def best_fit_decreasing_slowly(sizes: list[int], capacity: int) -> list[int]:
    """The specification of best_fit_decreasing: look at every bin for every document."""
    rooms: list[int] = []
    last_put: list[int] = []  # at which turn each bin was filled last
    bin_of_document = [-1] * len(sizes)
    for turn, document in enumerate(sorted(range(len(sizes)), key=lambda d: (-sizes[d], d))):
        fitting = [b for b in range(len(rooms)) if rooms[b] >= sizes[document]]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(capacity)
            last_put.append(turn)
        best = min(fitting, key=lambda b: (rooms[b], -last_put[b]))
        rooms[best] -= sizes[document]
        last_put[best] = turn
        bin_of_document[document] = best
    return bin_of_document


@st.composite
def sizes_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    """Few sizes and many documents of each make long runs of bins; wide ranges make many stacks."""
    capacity = draw(st.integers(1, 60))
    sizes = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=8))
    counted = st.lists(st.tuples(st.sampled_from(sizes), st.integers(1, 12)), max_size=30)
    documents = [size for size, count in draw(counted) for _ in range(count)]
    return draw(st.permutations(documents)), capacity


@st.composite
def documents_and_arguments(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int, str]:
    """Lengths from 0 upwards, some too long, with target counts as they are after any cut."""
    seq_len = draw(st.integers(1, 20))
    long = draw(st.sampled_from(["drop", "truncate"]))
    lengths = draw(st.lists(st.integers(0, 30), max_size=60))
    most = [max(min(n, seq_len + 1) - 1, 0) if long == "truncate" else max(n - 1, 0) for n in lengths]
    targets = [draw(st.integers(0, n)) for n in most]
    return np.array(lengths, np.int64), np.array(targets, np.int64), seq_len, draw(st.integers(0, 9)), long


# stream


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "expected"),
    [
        (26, 6, (4, 1)),  # the module's drawing
        (25, 6, (4, 0)),
        (7, 6, (1, 0)),  # T + 1 tokens are one sequence
        (6, 6, (0, 5)),
        (1, 6, (0, 0)),  # one token has no target
        (0, 6, (0, 0)),
        (4, 1, (3, 0)),
    ],
)
def test_stream_counts(num_tokens: int, seq_len: int, expected: tuple[int, int]) -> None:
    assert stream(num_tokens, seq_len) == expected


@given(st.integers(0, 300), st.integers(1, 40))
def test_stream_reads_every_target_once(num_tokens: int, seq_len: int) -> None:
    num_sequences, num_tail_targets = stream(num_tokens, seq_len)
    tokens = np.arange(num_tokens)
    read = [tokens[k * seq_len : k * seq_len + seq_len + 1] for k in range(num_sequences)]
    assert all(len(sequence) == seq_len + 1 for sequence in read)
    targets = [token for sequence in read for token in sequence[1:].tolist()]
    assert targets == list(range(1, num_tokens - num_tail_targets if num_tokens else 1))
    assert 0 <= num_tail_targets < seq_len


# best_fit_decreasing


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([4, 6, 2, 5, 2, 1], 6, [[1], [3, 5], [0, 2], [4]]),  # the module's drawing
        ([], 6, []),
        ([6], 6, [[0]]),
        ([6, 6, 6], 6, [[0], [1], [2]]),
        ([1, 1, 1, 1, 1], 2, [[0, 1], [2, 3], [4]]),
        ([1, 1, 1], 1, [[0], [1], [2]]),
        ([3, 3, 3, 3], 5, [[0], [1], [2], [3]]),
        ([1, 2, 3], 6, [[0, 1, 2]]),
        ([4, 4, 3, 3, 2, 2], 9, [[0, 1], [2, 3, 4], [5]]),  # 4 + 4 leaves 1; 3 + 3 leaves 3, which takes one 2
        ([5, 5, 5, 1], 6, [[0], [1], [2, 3]]),  # equal rooms: the bin filled last
        ([4, 4, 4, 1, 1, 1], 6, [[0], [1, 5], [2, 3, 4]]),  # it is then the fullest, and is filled up first
        ([4, 3, 2, 2], 7, [[0, 1], [2, 3]]),
    ],
)
def test_best_fit_decreasing(sizes: list[int], capacity: int, expected: list[list[int]]) -> None:
    assert contents(best_fit_decreasing(np.array(sizes, np.int64), capacity)) == expected


@given(sizes_and_capacity())
def test_best_fit_decreasing_equals_its_specification(case: tuple[list[int], int]) -> None:
    sizes, capacity = case
    bins = best_fit_decreasing(np.array(sizes, np.int64), capacity)
    assert bins.dtype == np.int64
    assert bins.tolist() == best_fit_decreasing_slowly(sizes, capacity)
    assert (np.bincount(bins, weights=sizes) <= capacity).all()


def test_best_fit_decreasing_equals_its_specification_at_2048() -> None:
    sizes = np.clip(np.random.default_rng(1).lognormal(5, 1, 2000), 1, 2048).astype(np.int64)
    assert best_fit_decreasing(sizes, 2048).tolist() == best_fit_decreasing_slowly(sizes.tolist(), 2048)


@pytest.mark.parametrize("sizes", [[0, 3], [-1], [7, 2]])
def test_best_fit_decreasing_refuses_sizes_out_of_range(sizes: list[int]) -> None:
    with pytest.raises(PackingError, match=r"they must lie in 1\.\.6"):
        best_fit_decreasing(np.array(sizes), 6)


# pack and pad


def test_pack_draws_as_documented() -> None:
    plan = pack(DRAWN, all_targets(DRAWN), 6, seed=0)
    # default_rng(0).permutation(4) = [2, 0, 1, 3]: sequence 0 is bin 2, sequence 1 is bin 0, ...
    assert sequences(plan) == [[0, 2], [1], [3, 5], [4]]
    assert plan.lengths.tolist() == [5, 3, 7, 6, 2, 3]
    assert plan.bounds.tolist() == [0, 2, 3, 5, 6]
    assert plan.fill == 20 / 24
    assert {array.dtype for array in (plan.documents, plan.bounds, plan.lengths)} == {np.dtype(np.int64)}


def test_pad_draws_as_documented() -> None:
    plan = pad(DRAWN, all_targets(DRAWN), 6, seed=1)
    assert sequences(plan) == [[4], [0], [2], [1], [5], [3]]
    assert plan.lengths.tolist() == [3, 5, 3, 7, 2, 6]
    assert plan.fill == 20 / 36
    assert {array.dtype for array in (plan.documents, plan.bounds, plan.lengths)} == {np.dtype(np.int64)}


def test_documents_in_a_sequence_stand_longest_first_then_by_number() -> None:
    lengths = np.array([2, 4, 3, 4, 2])
    assert sequences(pack(lengths, all_targets(lengths), 10, seed=0)) == [[1, 3, 2, 0, 4]]


@given(documents_and_arguments())
def test_every_document_is_placed_once_or_counted(case: tuple[np.ndarray, np.ndarray, int, int, str]) -> None:
    lengths, num_targets, seq_len, seed, long = case
    is_long = lengths > seq_len + 1
    dropped = is_long & (long == "drop")
    kept = np.flatnonzero(~dropped & (num_targets > 0))
    for form in (pack, pad):
        plan = form(lengths, num_targets, seq_len, seed, long)
        assert sorted(plan.documents.tolist()) == kept.tolist()
        assert plan.bounds[0] == 0 and plan.bounds[-1] == len(plan.documents)
        assert (np.diff(plan.bounds) > 0).all()  # no empty sequence
        assert (plan.lengths == np.minimum(lengths[plan.documents], seq_len + 1)).all()
        for a, b in zip(plan.bounds[:-1], plan.bounds[1:], strict=True):
            assert (plan.lengths[a:b] - 1).sum() <= seq_len
            assert form is pack or b - a == 1
        assert plan.num_dropped == dropped.sum()
        assert plan.num_truncated == (lengths[plan.documents] > plan.lengths).sum()
        assert len(plan.documents) + plan.num_dropped + plan.num_without_targets == len(lengths)
        lost = lengths[dropped].sum() + (lengths[plan.documents] - plan.lengths).sum()
        assert plan.num_tokens_lost == lost
        assert 0 <= plan.fill <= 1


@given(sizes_and_capacity(), st.integers(0, 3))
def test_pack_only_shuffles_and_orders_the_bins(case: tuple[list[int], int], seed: int) -> None:
    lengths, seq_len = np.array(case[0], np.int64) + 1, case[1]
    plan = pack(lengths, all_targets(lengths), seq_len, seed)
    bins = contents(best_fit_decreasing(lengths - 1, seq_len))
    order = np.random.default_rng(seed).permutation(len(bins))
    expected = [sorted(bins[b], key=lambda d: (-lengths[d], d)) for b in order]
    assert sequences(plan) == expected


@pytest.mark.parametrize("form", [pack, pad])
def test_seq_len_plus_one_tokens_fit_and_one_more_do_not(form) -> None:
    assert sequences(form(np.array([7]), np.array([6]), 6, seed=0)) == [[0]]
    with pytest.raises(PackingError) as error:
        form(np.array([7, 8, 2, 12]), np.array([6, 7, 1, 11]), 6, seed=0)
    assert str(error.value) == (
        "document 1 has 8 tokens, more than sequence length 6 + 1; 2 of 4 documents are too long: "
        "pass --long drop or --long truncate, or a sequence length of at least 11"
    )
    assert isinstance(error.value, ChatdataError) and isinstance(error.value, ValueError)
    assert form(np.array([7, 8, 2, 12]), np.array([6, 7, 1, 11]), 11, seed=0).num_dropped == 0  # the advice holds


@pytest.mark.parametrize("form", [pack, pad])
def test_the_smallest_plan_is_full(form) -> None:
    plan = form(np.array([2]), np.array([1]), 1, seed=0)
    assert sequences(plan) == [[0]] and plan.fill == 1.0


@pytest.mark.parametrize("form", [pack, pad])
def test_long_documents_dropped_or_truncated_are_counted(form) -> None:
    lengths = np.array([7, 8, 2, 12])
    drop = form(lengths, np.array([6, 7, 1, 11]), 6, seed=0, long="drop")
    assert sorted(drop.documents.tolist()) == [0, 2]
    assert (drop.num_dropped, drop.num_truncated, drop.num_tokens_lost) == (2, 0, 20)
    truncate = form(lengths, np.array([6, 6, 1, 6]), 6, seed=0, long="truncate")
    assert dict(zip(truncate.documents.tolist(), truncate.lengths.tolist(), strict=True)) == {0: 7, 1: 7, 2: 2, 3: 7}
    assert (truncate.num_dropped, truncate.num_truncated, truncate.num_tokens_lost) == (0, 2, 6)
    counts = (truncate.num_dropped, truncate.num_truncated, truncate.num_tokens_lost, truncate.num_without_targets)
    assert {type(count) for count in counts} == {int}  # JSON knows no numpy numbers
    # Document 3 has lost its answer to the cut: left out, and counted as that only.
    answer_cut = form(lengths, np.array([6, 6, 1, 0]), 6, seed=0, long="truncate")
    assert (answer_cut.num_truncated, answer_cut.num_tokens_lost, answer_cut.num_without_targets) == (1, 1, 1)


@pytest.mark.parametrize("form", [pack, pad])
def test_documents_without_targets_are_left_out_and_counted(form) -> None:
    lengths = np.array([1, 5, 4, 0, 3])  # one token or none has no target; document 2 has no supervised token
    plan = form(lengths, np.array([0, 2, 0, 0, 1]), 8, seed=0)
    assert sorted(plan.documents.tolist()) == [1, 4]
    assert plan.num_without_targets == 3


@pytest.mark.parametrize("form", [pack, pad])
@pytest.mark.parametrize("lengths", [[], [1, 1]])
def test_nothing_to_place_is_an_empty_plan(form, lengths: list[int]) -> None:
    plan = form(np.array(lengths, np.int64), np.zeros(len(lengths), np.int64), 6, seed=0)
    assert sequences(plan) == [] and plan.num_sequences == 0 and plan.bounds.tolist() == [0] and plan.fill == 0.0
    assert plan.num_without_targets == len(lengths)


@pytest.mark.parametrize("form", [pack, pad])
def test_the_seed_decides_the_order_and_only_the_order(form) -> None:
    lengths = np.random.default_rng(2).integers(2, 50, 500)
    plans = [form(lengths, all_targets(lengths), 64, seed) for seed in (7, 7, 8)]
    first, again = map(dataclasses.astuple, plans[:2])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert sequences(plans[0]) != sequences(plans[2])
    assert sorted(sequences(plans[0])) == sorted(sequences(plans[2]))


def test_pack_takes_small_unsigned_lengths() -> None:
    """Lengths read back from an index are int32, or narrower: nothing may wrap on the way."""
    lengths = np.array([200, 250, 100, 2], np.uint8)
    plan = pack(lengths, lengths - 1, 255, seed=0)
    assert sorted(map(sorted, sequences(plan))) == [[0], [1, 3], [2]]


def test_pack_is_full_on_chat_like_lengths() -> None:
    """Real sft lengths fill 99.92 % at 2048 (benchmarks); these have their mean and spread of log length."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.28, 0.73, 20_000), 2, 2048).astype(np.int64)
    assert pack(lengths, all_targets(lengths), 2048, seed=42).fill > 0.99


@pytest.mark.parametrize("form", [pack, pad])
def test_arguments_out_of_range_are_refused(form) -> None:
    with pytest.raises(PackingError, match="seq_len is 0: it must be at least 1"):
        form(DRAWN, all_targets(DRAWN), 0, seed=0)
    with pytest.raises(PackingError, match="seq_len is 0"):
        stream(10, 0)
    with pytest.raises(PackingError, match="long is 'cut': it must be one of error, drop, truncate"):
        form(DRAWN, all_targets(DRAWN), 6, seed=0, long="cut")


@pytest.mark.parametrize("form", [pack, pad])
def test_targets_counted_before_the_cut_are_noticed(form) -> None:
    with pytest.raises(AssertionError, match="after the cut"):
        form(np.array([12]), np.array([11]), 6, seed=0, long="truncate")
    with pytest.raises(AssertionError, match="without position 0"):  # 7 tokens have 6 targets at most
        form(np.array([7]), np.array([7]), 6, seed=0)
