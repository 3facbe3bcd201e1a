"""Which documents the sequences of a plan read."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.packing.epoch import plan_epoch
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.reads import name_documents, reads_of_sequences, reads_of_step

# six documents a … f with 5, 7, 3, 6, 1, 2 tokens: 24 tokens in all
DOCUMENTS = [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [40, 41, 42, 43, 44, 45], [50], [60, 61]]
MASKS = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1], [0, 0, 0], [0, 1, 0, 0, 1, 1], [0], [0, 1]]


@pytest.fixture(scope="module")
def split(make_split):
    return make_split(DOCUMENTS, MASKS)


def plan_of(split, layout="pack", mask="apply", seq_len=6, step_sequences=2, **more):
    return plan_epoch(split, layout=layout, mask=mask, seq_len=seq_len, step_sequences=step_sequences, **more)


def left_out(plan) -> dict[str, int]:
    return {name: count for name, count in asdict(plan.left_out).items() if count}


def triples(reads) -> list[tuple[int, int, int, int]]:
    """(sequence, document, start, stop) of every read."""
    return [*map(tuple, np.stack([reads.sequence, reads.document, reads.start, reads.stop], axis=1).tolist())]


def test_reads_of_stream(split) -> None:
    plan = plan_of(split, layout="stream", mask="ignore", seq_len=4)
    assert triples(reads_of_step(plan, 0)) == [(0, 0, 0, 5), (1, 0, 4, 5), (1, 1, 0, 4)]
    step_1 = [(2, 1, 3, 7), (2, 2, 0, 1), (3, 2, 0, 3), (3, 3, 0, 2)]
    assert triples(reads_of_step(plan, 1)) == step_1
    assert triples(reads_of_step(plan, 3)) == step_1  # the second epoch
    assert triples(reads_of_sequences(plan, 4, 5)) == [(4, 3, 1, 6)]


def test_reads_of_pack(split) -> None:
    plan = plan_of(split, step_sequences=1, seed=0)
    assert triples(reads_of_step(plan, 2)) == [(2, 3, 0, 6), (2, 5, 0, 2)]
    cut = plan_of(split, seq_len=2, step_sequences=3, long="truncate")
    assert sorted(t[1:] for t in triples(reads_of_step(cut, 0))) == [(1, 0, 3), (3, 0, 3), (5, 0, 2)]


def test_reads_of_nanochat_order(split) -> None:
    """Rank 0 reads a, c, e = 9 tokens, rank 1 reads b, d, f = 15: two rows of 2 positions take 5 of them."""
    plan = make_nanochat_plan(split, mask="ignore", seq_len=2, num_ranks=2, device_batch_size=2)
    assert plan.num_steps == 1 and left_out(plan) == {"tail_tokens": 14}
    assert triples(reads_of_step(plan, 0)) == [(0, 0, 0, 3), (1, 0, 2, 5), (2, 1, 0, 3), (3, 1, 2, 5)]
    one_row = make_nanochat_plan(split, mask="ignore", seq_len=2, num_ranks=2, device_batch_size=1)
    assert triples(reads_of_step(one_row, 1)) == [(2, 0, 3, 5), (2, 2, 0, 1), (3, 1, 3, 6)]
    both = [*triples(reads_of_step(one_row, 0)), *triples(reads_of_step(one_row, 1))]
    assert triples(reads_of_sequences(one_row, 0, 4)) == both


def test_documents_are_named_in_one_line(split) -> None:
    plan = plan_of(split, layout="stream", mask="ignore", seq_len=4)
    assert name_documents(reads_of_step(plan, 0)) == "documents 0, 1"
    assert name_documents(reads_of_step(plan, 1), most=2) == "documents 1, 2 and 1 more"
    assert name_documents(reads_of_sequences(plan, 4, 5)) == "document 3"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 8), st.data())
def test_reads_are_the_tokens_of_their_sequences(make_split, lengths, seq_len, data) -> None:
    numbers = iter(range(sum(lengths)))
    split = make_split([[next(numbers) for _ in range(n)] for n in lengths])
    num_sequences = (sum(lengths) - 1) // seq_len
    if not num_sequences:
        return
    plan = plan_of(split, layout="stream", mask="ignore", seq_len=seq_len, step_sequences=1)
    first = data.draw(st.integers(0, num_sequences - 1))
    last = data.draw(st.integers(first + 1, num_sequences))
    read: dict[int, list[int]] = {}
    for sequence, document, start, stop in triples(reads_of_sequences(plan, first, last)):
        assert 0 <= start < stop <= lengths[document]
        read.setdefault(sequence, []).extend(range(*(split.offsets[document] + np.array([start, stop])).tolist()))
    assert read == {k: [*range(k * seq_len, (k + 1) * seq_len + 1)] for k in range(first, last)}
