"""Plans of an epoch: literal counts, what must always hold, and every refusal."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

import chatdata.packing.epoch
from chatdata.errors import PackingError, PlanError
from chatdata.packing.epoch import document_targets, plan_epoch

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
    assert document_targets(split, "apply", 4)[0].tolist() == [0, 0, 1]
    assert plan_of(split, step_sequences=1).targets_per_step.tolist() == [1]
    assert plan_of(split, layout="stream", seq_len=6, step_sequences=1).targets_per_step.tolist() == [3]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 1000])
def test_targets_are_counted_alike_in_chunks_of_any_size(split, monkeypatch, chunk_tokens) -> None:
    monkeypatch.setattr(chatdata.packing.epoch, "CHUNK_TOKENS", chunk_tokens)
    assert document_targets(split, "apply", 6)[0].tolist() == [2, 4, 0, 3, 0, 1]
    assert document_targets(split, "apply", 2)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert document_targets(split, "ignore", 2)[0].tolist() == [2, 2, 2, 2, 0, 1]
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
