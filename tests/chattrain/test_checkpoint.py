"""What a checkpoint records of its plan. Saving and resuming: test_run.py."""

from __future__ import annotations

import msgspec
import pytest

from chatdata.packing.epoch import plan_epoch
from chattrain.checkpoint import plan_record, require_same
from chattrain.errors import ResumeError

# six documents a … f with 5, 7, 3, 6, 1, 2 tokens: 24 tokens in all
DOCUMENTS = [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [40, 41, 42, 43, 44, 45], [50], [60, 61]]
MASKS = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1], [0, 0, 0], [0, 1, 0, 0, 1, 1], [0], [0, 1]]


@pytest.fixture(scope="module")
def split(make_split):
    return make_split(DOCUMENTS, MASKS)


def plan_of(split, layout="pack", mask="apply", seq_len=6, step_sequences=2, **more):
    return plan_epoch(split, layout=layout, mask=mask, seq_len=seq_len, step_sequences=step_sequences, **more)


def test_the_hash_changes_with_everything_that_decides_the_order(split, make_split) -> None:
    changes = [
        {"layout": "pad"},
        {"mask": "ignore"},
        {"seq_len": 7},
        {"step_sequences": 3},
        {"seed": 43},
        {"long": "drop"},
    ]
    plans = [plan_of(split, **{"step_sequences": 1, **change}) for change in ({}, *changes)]
    plans.append(plan_of(make_split(DOCUMENTS[::-1], MASKS[::-1]), step_sequences=1))
    hashes = [plan_record(plan).hash for plan in plans]
    assert len(set(hashes)) == len(hashes)
    assert plan_record(plan_of(split, step_sequences=1)).hash == hashes[0]
    # the order of stream rows is the build's: neither a seed nor a length rule decides anything
    stream = plan_of(split, layout="stream", seq_len=4, seed=1, long="drop")
    assert plan_record(stream) == plan_record(plan_of(split, layout="stream", seq_len=4))


def test_the_hash_is_fixed(split) -> None:
    """A resumed run compares it with one made by an earlier version: it may change only with PLAN_VERSION."""
    assert plan_record(plan_of(split, step_sequences=1)).hash[:16] == "400efcff4c9d62df"


def test_what_changed_is_named(split) -> None:
    current = plan_record(plan_of(split, step_sequences=1))
    record = msgspec.structs.asdict(current)
    require_same(record, plan_record(plan_of(split, step_sequences=1)))
    for change, message in [
        ({"seq_len": 7}, "the plan changed: seq_len was 6 and is now 7"),
        ({"mask": "ignore"}, "the plan changed: mask was 'apply' and is now 'ignore'"),
        ({"seed": 1}, "the plan changed: seed was 42 and is now 1"),
    ]:
        with pytest.raises(ResumeError, match=message):
            require_same(record, plan_record(plan_of(split, **{"step_sequences": 1, **change})))
    with pytest.raises(ResumeError, match="build_id was 'other' and is now 'memory'"):
        require_same({**record, "build_id": "other"}, current)
    with pytest.raises(ResumeError, match="hash was"):
        require_same({**record, "hash": "0"}, current)
