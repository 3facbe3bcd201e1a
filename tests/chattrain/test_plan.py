"""Plans: literal counts, what must always hold, and every refusal."""

from __future__ import annotations

from dataclasses import asdict, replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chatdata.packing.epoch
from chatdata.errors import PackingError, PlanError
from chatdata.packing.epoch import document_targets, plan_epoch
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.plan import check_cut, name_documents, plan_record, reads_of_sequences, reads_of_step, require_same_plan

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


# counts


@pytest.mark.parametrize(
    ("mask", "targets", "over"),
    [("ignore", [8, 8], 4), ("apply", [4, 3], 2)],  # masks of tokens 1 … 8, 9 … 16, 17 … 20
)
def test_stream_counts(split, mask, targets, over) -> None:
    plan = plan_of(split, layout="stream", mask=mask, seq_len=4)
    assert plan.num_steps == 2
    assert plan.tokens_per_step.tolist() == [8, 8]
    assert plan.targets_per_step.tolist() == targets
    assert left_out(plan) == {"tail_tokens": 3, "sequences": 1, "sequence_targets": over}
    assert plan.packing is None and plan.seed is None and plan.long is None


def test_pack_counts(split) -> None:
    """With the mask applied c has no target and e is one token: b, d + f and a make the bins, shuffled by seed 0."""
    plan = plan_of(split, step_sequences=1, seed=0)
    assert plan.packing.documents.tolist() == [0, 1, 3, 5] and plan.packing.bounds.tolist() == [0, 1, 2, 4]
    assert plan.tokens_per_step.tolist() == [4, 6, 6]
    assert plan.targets_per_step.tolist() == [2, 4, 4]
    assert left_out(plan) == {"one_token_documents": 1, "documents_without_targets": 1}
    ignoring = plan_of(split, mask="ignore", step_sequences=1, seed=0)
    assert sorted(ignoring.packing.documents.tolist()) == [0, 1, 2, 3, 5]
    assert (ignoring.targets_per_step == ignoring.tokens_per_step).all() and ignoring.targets_per_step.sum() == 18
    assert left_out(ignoring) == {"one_token_documents": 1}


def test_pad_counts(split) -> None:
    plan = plan_of(split, layout="pad", mask="ignore", seed=0)
    order = np.array([0, 1, 2, 3, 5])[np.random.default_rng(0).permutation(5)]
    lengths = np.diff(split.offsets)[order]
    assert plan.packing.documents.tolist() == order.tolist()
    assert plan.tokens_per_step.tolist() == [lengths[:2].sum() - 2, lengths[2:4].sum() - 2]
    assert left_out(plan) == {"one_token_documents": 1, "sequences": 1, "sequence_targets": lengths[4] - 1}


def test_long_documents(split) -> None:
    with pytest.raises(PackingError, match=r"document 0 has 5 tokens, .*--long drop or --long truncate"):
        plan_of(split, seq_len=3, step_sequences=1)
    drop = plan_of(split, mask="ignore", seq_len=4, step_sequences=1, long="drop")
    assert sorted(drop.packing.documents.tolist()) == [0, 2, 5]
    assert left_out(drop) == {"long_documents_dropped": 2, "long_tokens": 13, "one_token_documents": 1}
    cut = plan_of(split, seq_len=2, step_sequences=1, long="truncate")
    # cut to 3 tokens: a loses its targets, b keeps one (its third token), d keeps one, f is whole
    assert sorted(cut.packing.documents.tolist()) == [1, 3, 5]
    assert cut.targets_per_step.sum() == 3
    assert left_out(cut) == {
        "long_documents_cut": 2,
        "long_tokens": 7,
        "one_token_documents": 1,
        "documents_without_targets": 2,
    }


def test_counts_are_plain_integers(split) -> None:
    counts = plan_of(split, layout="stream", seq_len=4).counts()
    assert {
        name: counts[name] for name in ("documents", "tokens", "steps", "sequences", "input_tokens", "targets")
    } == {"documents": 6, "tokens": 24, "steps": 2, "sequences": 4, "input_tokens": 16, "targets": 7}
    lost = counts.pop("left_out")
    assert {type(value) for value in (*counts.values(), *lost.values())} == {int}


def test_steps_without_targets_are_counted(make_split) -> None:
    """Only stream rows with the mask applied can have them: a step over the user's words alone."""
    split = make_split([list(range(10)), list(range(10))], [[0] * 10, [0] + [1] * 9])
    plan = plan_of(split, layout="stream", seq_len=3, step_sequences=2)
    assert plan.targets_per_step.tolist() == [0, 2, 6]
    assert plan.counts()["steps_without_targets"] == 1


def test_the_first_token_of_a_document_is_never_its_target(make_split) -> None:
    """Even where its mask is 1, it has no input before it; in stream rows it follows the document before."""
    split = make_split([[1, 2, 3], [4], [5, 6, 7]], [[1, 0, 0], [1], [1, 1, 0]])
    assert document_targets(split, "apply", 4).tolist() == [0, 0, 1]
    assert plan_of(split, step_sequences=1).targets_per_step.tolist() == [1]
    assert plan_of(split, layout="stream", seq_len=6, step_sequences=1).targets_per_step.tolist() == [3]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_targets_are_counted_alike_in_chunks_of_any_size(split, monkeypatch, chunk_tokens) -> None:
    monkeypatch.setattr(chatdata.packing.epoch, "CHUNK_TOKENS", chunk_tokens)
    assert document_targets(split, "apply", 6).tolist() == [2, 4, 0, 3, 0, 1]
    assert document_targets(split, "apply", 2).tolist() == [0, 1, 0, 1, 0, 1]
    assert document_targets(split, "ignore", 2).tolist() == [2, 2, 2, 2, 0, 1]
    assert plan_of(split, layout="stream", seq_len=4).targets_per_step.tolist() == [4, 3]


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, r"sequence length is 0: it must lie in 1 … 1,048,576"),
        ({"seq_len": -5, "layout": "stream"}, r"sequence length is -5"),
        ({"seq_len": 10**12}, r"sequence length is 1000000000000: it must lie in 1 … 1,048,576"),
        ({"step_sequences": 0}, r"a step has 0 sequences"),
        ({"layout": "bins"}, r"layout is 'bins': it must be one of stream, pack, pad"),
        ({"mask": "use"}, r"unknown mask policy 'use'"),
        ({"layout": "stream", "long": "cut"}, r"long is 'cut': it must be one of error, drop, truncate"),
        (
            {"layout": "stream", "seq_len": 2048},
            r"train has 6 documents with 24 tokens: 0 sequences of 2048 positions, but one step takes 2",
        ),
        ({"step_sequences": 5}, r"3 sequences of 6 positions, but one step takes 5; use a smaller batch"),
    ],
)
def test_plans_that_cannot_be_made(split, arguments, message) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(split, **arguments)


def test_an_empty_split_is_refused(make_split) -> None:
    for layout in ("stream", "pack", "pad"):
        with pytest.raises(PlanError, match=r"0 documents with 0 tokens: 0 sequences"):
            plan_of(make_split([]), layout=layout)


@pytest.mark.parametrize(("num_ranks", "batch"), [(1, 5), (5, 1), (2, 4), (8, 1), (0, 1), (1, 0), (1, -3), (24, 1)])
def test_steps_that_cannot_be_cut(split, num_ranks, batch) -> None:
    plan = replace(plan_of(split, layout="stream", seq_len=1), step_sequences=12)
    with pytest.raises(PlanError, match=r"must be (a multiple of|at least 1)") as error:
        check_cut(plan, num_ranks, batch)
    assert "\n" not in str(error.value)
    for good in ((1, 12), (1, 3), (2, 3), (2, 2), (4, 3), (3, 4), (3, 1), (12, 1)):
        check_cut(plan, *good)


# hash


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
    require_same_plan(record, plan_record(plan_of(split, step_sequences=1)))
    for change, message in [
        ({"seq_len": 7}, "the plan changed: seq_len was 6 and is now 7"),
        ({"mask": "ignore"}, "the plan changed: mask was 'apply' and is now 'ignore'"),
        ({"seed": 1}, "the plan changed: seed was 42 and is now 1"),
    ]:
        with pytest.raises(PlanError, match=message):
            require_same_plan(record, plan_record(plan_of(split, **{"step_sequences": 1, **change})))
    with pytest.raises(PlanError, match="build_id was 'other' and is now 'memory'"):
        require_same_plan({**record, "build_id": "other"}, current)
    with pytest.raises(PlanError, match="hash was"):
        require_same_plan({**record, "hash": "0"}, current)


# reads


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
