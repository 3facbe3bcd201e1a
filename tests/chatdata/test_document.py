from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatdata.document import blocks_of, check_ids
from chatdata.errors import FormatError


def test_a_block_closes_before_the_document_that_would_pass() -> None:
    assert blocks_of(np.array([4, 4, 2, 1, 9, 20, 1]), 10) == [(0, 3), (3, 5), (5, 6), (6, 7)]
    assert blocks_of(np.array([10, 10]), 10) == [(0, 1), (1, 2)]
    assert blocks_of(np.array([], dtype=np.int64), 10) == []


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(5, 40))
def test_blocks_always(lengths: list[int], limit: int) -> None:
    blocks = blocks_of(np.array(lengths, dtype=np.int64), limit)
    assert [i for first, last in blocks for i in range(first, last)] == list(range(len(lengths)))
    for first, last in blocks:
        assert sum(lengths[first:last]) <= limit or last == first + 1
        assert last == len(lengths) or sum(lengths[first : last + 1]) > limit


@pytest.mark.parametrize(("ids", "bad"), [([3, 70_000], 70_000), ([265], 265), ([-1, 3], -1)])
def test_an_id_outside_the_vocabulary_is_refused(ids: list[int], bad: int) -> None:
    with pytest.raises(FormatError, match=f"token id {bad} is outside 0 … 264: it does not fit the vocabulary"):
        check_ids(np.array(ids), 265)
    check_ids(np.array([0, 264]), 265)
    check_ids(np.array([], dtype=np.uint32), 265)
