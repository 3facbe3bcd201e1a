"""Batches: literal rows, a plain statement of every row form, and what must hold however a step is cut."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chattrain.batches
from chatdata.errors import PlanError
from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chattrain.attention import pack_sequences
from chattrain.batches import IGNORED, check_micro_batches, read_rows, read_step
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.reads import reads_of_sequences, reads_of_step
from chattrain.run.telemetry import digest_text

PAD = 9  # conftest's <|assistant_end|>
# a, b and c hold the padding id as a token of their own: what is padding is known by position
DOCUMENTS = [[10, 11, 12, 9], [20, 21, 9, 22, 23, 9], [30, 31, 9]]
MASKS = [[0, 0, 1, 1], [0, 0, 1, 0, 1, 1], [0, 1, 1]]
# ranks, device batch size: a step of 12 sequences as ranks × micro-batches 1×4, 2×2, 4×1, 3×4, 1×1, 12×1
CUTS = [(1, 3), (2, 3), (4, 3), (3, 1), (1, 12), (12, 1)]


def plan_of(split, layout="pack", mask="apply", seq_len=6, step_sequences=1, **more) -> TrainingPlan:
    return plan_epoch(split, layout=layout, mask=mask, seq_len=seq_len, step_sequences=step_sequences, **more)


def whole(plan: TrainingPlan, step: int, num_ranks: int = 1, batch: int | None = None):
    """The step of all ranks and micro-batches put together: inputs, targets, lengths, digest."""
    shares = [read_step(plan, step, rank, num_ranks, batch) for rank in range(num_ranks)]
    batches = [b for share in shares for b in share.batches]
    lengths = None if batches[0].lengths is None else sum((b.lengths for b in batches), ())
    inputs, targets = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    return inputs, targets, lengths, digest_text(sum(share.digest for share in shares))


# literal rows


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        ("ignore", [[11, 12, 9, 20, 21], [9, 22, 23, 9, 30]]),
        ("apply", [[-100, 12, 9, -100, -100], [9, -100, 23, 9, -100]]),
    ],
)
def test_stream_rows(make_split, mask, targets) -> None:
    plan = plan_of(make_split(DOCUMENTS, MASKS), layout="stream", mask=mask, seq_len=5, step_sequences=2)
    (batch,) = read_step(plan, 0).batches
    assert batch.inputs.tolist() == [[10, 11, 12, 9, 20], [21, 9, 22, 23, 9]]
    assert batch.targets.tolist() == targets
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.lengths is None


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        ("ignore", [[21, 9, 22, 23, 9, 31, 9], [11, 12, 9, -100, -100, -100, -100]]),
        ("apply", [[-100, 9, -100, 23, 9, 31, 9], [-100, 12, 9, -100, -100, -100, -100]]),
    ],
)
def test_pack_rows(make_split, mask, targets) -> None:
    """Best-fit decreasing into 7 positions: b (5) and c (2) fill one row, a (3) begins another."""
    plan = plan_of(make_split(DOCUMENTS, MASKS), mask=mask, seq_len=7, step_sequences=2, seed=1)
    (batch,) = read_step(plan, 0).batches
    assert batch.inputs.tolist() == [[20, 21, 9, 22, 23, 30, 31], [10, 11, 12, PAD, PAD, PAD, PAD]]
    assert batch.targets.tolist() == targets
    assert batch.lengths == ((5, 2), (3,))


@pytest.mark.parametrize(
    ("mask", "targets"),
    [
        ("ignore", {10: [11, 12, 9, -100, -100], 20: [21, 9, 22, 23, 9], 30: [31, 9, -100, -100, -100]}),
        ("apply", {10: [-100, 12, 9, -100, -100], 20: [-100, 9, -100, 23, 9], 30: [31, 9, -100, -100, -100]}),
    ],
)
def test_pad_rows(make_split, mask, targets) -> None:
    """Rows are as wide as the longest document of the step, not as T."""
    plan = plan_of(make_split(DOCUMENTS, MASKS), layout="pad", mask=mask, seq_len=100, step_sequences=3)
    (batch,) = read_step(plan, 0).batches
    inputs = {10: [10, 11, 12, PAD, PAD], 20: [20, 21, 9, 22, 23], 30: [30, 31, PAD, PAD, PAD]}
    assert sorted(batch.inputs.tolist()) == [inputs[first] for first in (10, 20, 30)]
    assert batch.targets.tolist() == [targets[first] for first in batch.inputs[:, 0].tolist()]
    assert batch.lengths is None


def test_a_cut_document_ends_with_its_last_target(make_split) -> None:
    plan = plan_of(make_split(DOCUMENTS, MASKS), mask="ignore", seq_len=3, step_sequences=3, long="truncate")
    (batch,) = read_step(plan, 0).batches
    assert sorted(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)) == [
        ([10, 11, 12], [11, 12, 9]),
        ([20, 21, 9], [21, 9, 22]),
        ([30, 31, 9], [31, 9, -100]),
    ]


def test_ids_of_a_large_vocabulary(make_split) -> None:
    split = make_split([[70_000, 80_000, 4_000_000_000 % 2**31, 5]], dtype="<u4")
    for layout, seq_len in (("stream", 3), ("pack", 3), ("pad", 9)):
        (batch,) = read_step(plan_of(split, layout=layout, seq_len=seq_len), 0).batches
        assert batch.inputs.tolist() == [[70_000, 80_000, 1_852_516_352]]
        assert batch.targets.tolist() == [[80_000, 1_852_516_352, 5]]


@pytest.mark.parametrize(("layout", "width"), [("stream", 5), ("pack", 5), ("pad", 0)])
def test_no_sequences_are_no_rows(make_split, layout, width) -> None:
    plan = plan_of(make_split(DOCUMENTS, MASKS), layout=layout, seq_len=5)
    none = read_rows(plan, 2, 2)
    assert none.inputs.shape == none.targets.shape == (0, width)
    assert none.lengths == (() if layout == "pack" else None)


# a plain statement of every row, and what must always hold


def plain_rows(plan: TrainingPlan, first: int, last: int) -> tuple[list[list[int]], list[list[int]]]:
    """The specification of `read_rows`, one token at a time."""
    split, all_inputs, all_targets = plan.split, [], []
    tokens, mask = split.tokens(0, split.num_tokens).tolist(), split.mask(0, split.num_tokens).tolist()
    for sequence in range(first, last):
        inputs, targets = [], []
        if plan.packing is None:
            positions = [*range(sequence * plan.seq_len, (sequence + 1) * plan.seq_len)]
        else:
            placed = range(*plan.packing.bounds[sequence : sequence + 2].tolist())
            starts = split.offsets[plan.packing.documents].tolist()
            positions = [starts[i] + k for i in placed for k in range(plan.packing.lengths[i] - 1)]
        for position in positions:
            inputs.append(tokens[position])
            is_target = plan.mask == "ignore" or mask[position + 1] == 1
            targets.append(tokens[position + 1] if is_target else IGNORED)
        all_inputs.append(inputs)
        all_targets.append(targets)
    width = max(map(len, all_inputs)) if plan.layout == "pad" else plan.seq_len
    for inputs, targets in zip(all_inputs, all_targets, strict=True):
        inputs.extend([PAD] * (width - len(inputs)))
        targets.extend([IGNORED] * (width - len(targets)))
    return all_inputs, all_targets


@st.composite
def splits_and_plans(draw: st.DrawFn, make_split, layout: str | None = None, shards: bool = True):
    """A split whose token ids are all different (id = place in the split + 100), and a plan of it."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    ids = iter(range(100, 100 + sum(lengths)))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    masks = [[0, *draw(st.lists(st.integers(0, 1), min_size=n - 1, max_size=n - 1))] for n in lengths]
    cut = draw(st.integers(1, len(lengths))) if shards else len(lengths)
    split = make_split(documents, masks, [c for c in (cut, len(lengths) - cut) if c])
    arguments = {
        "layout": layout or draw(st.sampled_from(["stream", "pack", "pad"])),
        "mask": draw(st.sampled_from(["ignore", "apply"])),
        "seq_len": draw(st.integers(1, 15)),
        "seed": draw(st.integers(0, 5)),
        "long": draw(st.sampled_from(["drop", "truncate"])),
        "step_sequences": 1,
    }
    try:
        plan = plan_epoch(split, **arguments)
    except PlanError:  # nothing to train on
        return None
    return replace_steps(plan, draw(st.integers(1, plan.num_steps)))


def replace_steps(plan: TrainingPlan, step_sequences: int) -> TrainingPlan:
    return plan_epoch(
        plan.split,
        layout=plan.layout,
        mask=plan.mask,
        seq_len=plan.seq_len,
        step_sequences=step_sequences,
        **({} if plan.packing is None else {"seed": plan.seed, "long": plan.long}),
    )


@given(st.data())
def test_rows_equal_the_plain_statement(make_split, data) -> None:
    plan = data.draw(splits_and_plans(make_split))
    if plan is None:
        return
    for step in range(plan.num_steps):
        first = step * plan.step_sequences
        rows = read_rows(plan, first, first + plan.step_sequences)
        inputs, targets = plain_rows(plan, first, first + plan.step_sequences)
        assert rows.inputs.tolist() == inputs and rows.targets.tolist() == targets
        assert rows.rows.tolist() == [i for i, target in enumerate(chain(*targets)) if target != IGNORED]
        assert (rows.lengths is None) == (plan.layout != "pack")
        if rows.lengths is not None:
            bounds = plan.packing.bounds[first : first + plan.step_sequences + 1].tolist()
            positions = (plan.packing.lengths - 1).tolist()
            assert rows.lengths == tuple(tuple(positions[a:b]) for a, b in pairwise(bounds))


def check_every_target_once(plan: TrainingPlan) -> None:
    """Over one epoch, against the split alone (ids are place + 100): which targets, after which input, how often."""
    split = plan.split
    offsets = split.offsets
    taken = np.minimum(np.diff(offsets), plan.seq_len + 1)
    supervised = split.mask(0, split.num_tokens).astype(bool) | (plan.mask == "ignore")
    if plan.layout == "stream":
        expected = np.arange(1, split.num_tokens - plan.left_out.tail_tokens)
    else:
        kept = [d for d in range(len(taken)) if plan.long == "truncate" or np.diff(offsets)[d] <= plan.seq_len + 1]
        expected = np.array([p for d in kept for p in range(offsets[d] + 1, offsets[d] + taken[d])], int)
    expected = Counter(expected[supervised[expected]].tolist())

    found: Counter[int] = Counter()
    num_sequences = plan.num_steps * plan.step_sequences + plan.left_out.sequences
    for step in range(plan.num_steps):
        targets = whole(plan, step)[1]
        assert int((targets != IGNORED).sum()) == plan.targets_per_step[step]
    for sequence in range(num_sequences):
        rows = read_rows(plan, sequence, sequence + 1)
        inputs, targets = rows.inputs.numpy(), rows.targets.numpy()
        at = targets != IGNORED
        assert (targets[at] == inputs[at] + 1).all()  # the token after its input
        found.update((targets[at] - 100).tolist())
        if plan.layout != "stream":
            document = np.searchsorted(offsets, inputs[at] - 100, side="right")
            assert (document == np.searchsorted(offsets, targets[at] - 100, side="right")).all()
    assert found == expected
    assert found.total() == plan.targets_per_step.sum() + plan.left_out.sequence_targets


@given(st.data())
def test_every_target_appears_exactly_once_in_an_epoch(make_split, data) -> None:
    plan = data.draw(splits_and_plans(make_split))
    if plan is not None:
        check_every_target_once(plan)


LESSONS = [[100, 101, 102, 103, 104], [105, 106, 107], [108, 109, 110, 111]]
LESSON_MASKS = [[0, 0, 1, 1, 0], [0, 1, 1], [0, 0, 0, 1]]


def check_against(monkeypatch, plan: TrainingPlan, broken: TrainingPlan) -> None:
    """Hold what is read by the `broken` plan to what the true one promises."""
    original = chattrain.batches.read_rows
    for module in (chattrain.batches, sys.modules[__name__]):
        monkeypatch.setattr(module, "read_rows", lambda _, *arguments: original(broken, *arguments))
    check_every_target_once(plan)


@pytest.mark.parametrize("layout", ["stream", "pack", "pad"])
@pytest.mark.parametrize(
    ("break_mask", "is_noticed"),
    [
        (lambda mask: mask, False),
        (lambda mask: np.roll(mask, 1), True),  # as if the mask were the input's
        (lambda mask: 1 - mask, True),
        (lambda mask: np.ones_like(mask), True),  # dropped by a refactor, for a month (nanochat 570, 582)
    ],
    ids=["whole", "shifted", "flipped", "dropped"],
)
def test_a_broken_mask_is_noticed(make_split, monkeypatch, layout, break_mask, is_noticed) -> None:
    plan = plan_of(make_split(LESSONS, LESSON_MASKS), layout=layout, seq_len=5, seed=0)
    arrays = {**plan.split.arrays[0], "mask": break_mask(plan.split.arrays[0]["mask"])}
    broken = replace(plan, split=replace(plan.split, arrays=(arrays,)))
    if not is_noticed:
        check_against(monkeypatch, plan, broken)
        return
    with pytest.raises(AssertionError):
        check_against(monkeypatch, plan, broken)


def test_a_target_across_documents_is_noticed(make_split, monkeypatch) -> None:
    plan = plan_of(make_split(LESSONS, LESSON_MASKS), mask="ignore", seq_len=7, seed=0)
    lengths = plan.packing.lengths + (plan.packing.documents == 1)  # document 1 with the first token of document 2
    broken = replace(plan, packing=replace(plan.packing, lengths=lengths))
    with pytest.raises(AssertionError):
        check_against(monkeypatch, plan, broken)


# how a step is cut


@pytest.fixture(scope="module", params=["stream", "pack", "pad"])
def plan_of_12(request, make_split) -> TrainingPlan:
    generator = np.random.default_rng(3)
    documents = [generator.integers(0, 60_000, generator.integers(2, 40)).tolist() for _ in range(400)]
    masks = [[0, *generator.integers(0, 2, len(d) - 2).tolist(), 1] for d in documents]
    return plan_of(make_split(documents, masks, [150, 250]), layout=request.param, seq_len=48, step_sequences=12)


@pytest.mark.parametrize(("num_ranks", "batch"), CUTS)
def test_a_step_is_the_same_however_it_is_cut(plan_of_12, num_ranks, batch) -> None:
    plan = plan_of_12
    assert plan.num_steps > 3
    for step in (0, 1, plan.num_steps - 1, plan.num_steps + 1):
        inputs, targets, lengths, digest = whole(plan, step, num_ranks, batch)
        expected = whole(plan, step)
        assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
        assert (lengths, digest) == expected[2:]
        assert len(inputs) == 12
        shares = [read_step(plan, step, rank, num_ranks, batch) for rank in range(num_ranks)]
        assert {len(share.batches) for share in shares} == {12 // num_ranks // batch}
        assert {len(b.inputs) for share in shares for b in share.batches} == {batch}
        position = step % plan.num_steps
        assert {(s.number, s.num_targets) for s in shares} == {(step, int(plan.targets_per_step[position]))}
        assert int((targets != IGNORED).sum()) == plan.targets_per_step[position]


def test_an_epoch_repeats_the_plan(plan_of_12) -> None:
    plan = plan_of_12
    digests = [whole(plan, step)[3] for step in range(plan.num_steps)]
    assert len(set(digests)) == plan.num_steps
    assert [whole(plan, plan.num_steps * 3 + step)[3] for step in range(plan.num_steps)] == digests


def test_tokens_of_a_step_are_its_inputs(plan_of_12) -> None:
    plan = plan_of_12
    for step in range(plan.num_steps):
        reads = reads_of_step(plan, step)
        num_inputs = (reads.stop - reads.start).sum() - (12 if plan.layout == "stream" else len(reads.document))
        read = read_step(plan, step)
        assert plan.tokens_per_step[step] == num_inputs == read.num_tokens
        longest = int((reads.stop - reads.start).max()) - 1
        assert {batch.inputs.shape[1] for batch in read.batches} == {longest if plan.layout == "pad" else plan.seq_len}
        assert {type(read.num_tokens), type(read.num_targets), type(read.digest)} == {int}  # they are logged as JSON


def test_the_digest_sees_every_difference(make_split) -> None:
    split = make_split(DOCUMENTS, MASKS)
    plan = plan_of(split, layout="pad", step_sequences=3)
    swapped = replace(plan, packing=replace(plan.packing, documents=plan.packing.documents[[1, 0, 2]]))
    swapped = replace(swapped, packing=replace(swapped.packing, lengths=plan.packing.lengths[[1, 0, 2]]))
    other_token = plan_of(make_split([[10, 11, 13, 9], *DOCUMENTS[1:]], MASKS), layout="pad", step_sequences=3)
    other_mask = plan_of(make_split(DOCUMENTS, [[0, 1, 1, 1], *MASKS[1:]]), layout="pad", step_sequences=3)
    digests = [read_step(p, 0).digest for p in (plan, swapped, other_token, other_mask)]
    assert len(set(digests)) == 4
    # the same tokens in one document or in two: attention differs, so the digest does
    one, two = make_split([[1, 2, 3, 4]]), make_split([[1, 2], [2, 3, 4]])
    one, two = (plan_of(s, mask="ignore", seq_len=3) for s in (one, two))
    assert read_step(one, 0).batches[0].inputs.tolist() == [[1, 2, 3]]
    assert read_step(two, 0).batches[0].inputs.tolist() == [[2, 3, 1]]
    assert len({read_step(p, 0).digest for p in (one, two)}) == 2


def test_the_digest_is_as_described(make_split) -> None:
    """A resumed run is compared with its log by these: they may change only with PLAN_VERSION."""
    plan = plan_of(make_split(DOCUMENTS, MASKS), seq_len=7, step_sequences=2, seed=1)
    rows = [  # inputs, targets, lengths
        ([20, 21, 9, 22, 23, 30, 31], [-100, 9, -100, 23, 9, 31, 9], [5, 2]),
        ([10, 11, 12, 9, 9, 9, 9], [-100, 12, 9, -100, -100, -100, -100], [3]),
    ]

    def mixed(word: int) -> int:
        word = (word + 1) * 0x9E3779B97F4A7C15 % 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    total = 0
    for place, row in enumerate(rows):
        products = (
            value * (mixed(3 * column + kind) | 1) for kind in range(3) for column, value in enumerate(row[kind])
        )
        total += mixed((mixed(place + 1) + sum(products)) % 2**64)
    assert digest_text(read_step(plan, 0).digest) == digest_text(total)
    digests = [read_step(plan, 0, rank, 2).digest for rank in (0, 1)]
    assert digest_text(sum(digests)) == digest_text(total)
    assert all(-(2**63) <= digest < 2**63 for digest in digests)


def test_digests_are_logged_as_16_hexadecimal_digits() -> None:
    assert digest_text(10) == digest_text(2**64 + 10) == "000000000000000a"
    assert digest_text(-1) == "f" * 16 and digest_text(-(2**63)) == "8000000000000000"


def test_digests_add_up_as_int64_tensors(plan_of_12) -> None:
    """As an all-reduce adds them: wrapping around."""
    digests = [read_step(plan_of_12, 1, rank, 4).digest for rank in range(4)]
    total = torch.tensor(digests, dtype=torch.int64).sum().item()
    assert digest_text(total) == whole(plan_of_12, 1)[3]


def test_steps_that_cannot_be_cut_are_refused(plan_of_12) -> None:
    with pytest.raises(PlanError, match=r"a step of 12 sequences cannot be cut for 5 ranks × device batch size 1"):
        read_step(plan_of_12, 0, 0, 5)
    with pytest.raises(PlanError, match=r"4: --total-batch-tokens must be a multiple of 8 × 48 = 384"):
        read_step(plan_of_12, 0, 0, 2, 4)
    with pytest.raises(PlanError, match="both must be at least 1"):
        read_step(plan_of_12, 0, 0, 0)


@pytest.mark.parametrize(("num_ranks", "batch"), [(1, 5), (5, 1), (2, 4), (8, 1), (0, 1), (1, 0), (1, -3), (24, 1)])
def test_steps_that_cannot_be_cut(make_split, num_ranks, batch) -> None:
    plan = replace(plan_of(make_split(DOCUMENTS, MASKS), layout="stream", seq_len=1), step_sequences=12)
    with pytest.raises(PlanError, match=r"must be (a multiple of|at least 1)") as error:
        check_micro_batches(plan, num_ranks, batch)
    assert "\n" not in str(error.value)
    for good in ((1, 12), (1, 3), (2, 3), (2, 2), (4, 3), (3, 4), (3, 1), (12, 1)):
        check_micro_batches(plan, *good)


# reads of targets


@given(st.data())
def test_targets_know_their_read(make_split, data) -> None:
    plan = data.draw(splits_and_plans(make_split))
    if plan is None:
        return
    first = data.draw(st.integers(0, plan.num_steps - 1)) * plan.step_sequences
    last = first + plan.step_sequences
    rows, reads = read_rows(plan, first, last), reads_of_sequences(plan, first, last)
    targets = rows.targets.numpy()
    assert rows.reads.shape == targets.shape
    at = targets != IGNORED
    read, document = rows.reads[at], reads.document[rows.reads[at]]
    assert (document == np.searchsorted(plan.split.offsets, targets[at] - 100, side="right") - 1).all()
    assert (reads.sequence[read] == first + np.nonzero(at)[0]).all()
    place = targets[at] - 100 - plan.split.offsets[document]
    assert ((reads.start[read] <= place) & (place < reads.stop[read])).all()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_targets_of_reads_are_counted_over_ranks_and_micro_batches(plan_of_12, num_ranks) -> None:
    shares = [read_step(plan_of_12, 1, rank, num_ranks, 2) for rank in range(num_ranks)]
    batches = [batch for share in shares for batch in share.batches]
    found = np.concatenate([batch.reads[batch.targets.numpy() != IGNORED] for batch in batches])
    counted = sum(share.read_targets for share in shares)
    assert (np.diff(found) >= 0).all() and len(counted) == len(reads_of_step(plan_of_12, 1).document)
    assert counted.tolist() == np.bincount(found, minlength=len(counted)).tolist()
    assert counted.sum() == shares[0].num_targets
    assert found.tolist() == np.concatenate([share.target_reads for share in shares]).tolist()


@pytest.mark.parametrize("plan_of_12", ["pack"], indirect=True)
def test_pack_lengths_suit_the_model(plan_of_12) -> None:
    step = read_step(plan_of_12, 0, 0, 1, 3)
    for batch in step.batches:
        documents = pack_sequences(batch.lengths, 48)
        assert documents.positions.shape == batch.inputs.shape
        assert sum(documents.lengths) == batch.inputs.numel()
    assert sum(sum(row) for batch in step.batches for row in batch.lengths) == step.num_tokens


def test_for_a_gpu_pad_has_widths_of_64(make_split, monkeypatch) -> None:
    """Positions behind the step's longest document: padding without a target. The digest does not count them."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    lengths = [[3, 65], [66, 4], [129, 130], [5, 6]]  # of the documents of each step, one after another
    documents = [[1, *range(10, 9 + length)] for step in lengths for length in step]
    plan = plan_of(make_split(documents), layout="pad", seq_len=200, step_sequences=2)
    widths = set()
    for number in range(plan.num_steps):
        exact, wide = read_step(plan, number), read_step(plan, number, pin=True)
        assert (wide.digest, wide.num_targets, wide.num_tokens) == (exact.digest, exact.num_targets, exact.num_tokens)
        (narrow,), (wider,) = exact.batches, wide.batches
        width = narrow.inputs.shape[1]
        widths.add((width, wider.inputs.shape[1]))
        assert torch.equal(wider.inputs[:, :width], narrow.inputs)
        assert torch.equal(wider.targets[:, :width], narrow.targets)
        assert (wider.inputs[:, width:] == PAD).all() and (wider.targets[:, width:] == IGNORED).all()
    assert all(wider == -(-width // 64) * 64 for width, wider in widths) and len({w for _, w in widths}) > 1
    for layout in ("stream", "pack"):
        plan = plan_of(make_split(documents), layout=layout, seq_len=150, step_sequences=1)
        assert read_step(plan, 0, pin=True).batches[0].inputs.shape == (1, 150)


def test_nanochat_order_ends_with_its_first_epoch(make_split) -> None:
    plan = make_nanochat_plan(make_split(LESSONS), mask="apply", seq_len=5, num_ranks=1, device_batch_size=1)
    with pytest.raises(PlanError, match="order nanochat has 3 steps, its first epoch: there is no step 3"):
        read_step(plan, 3)


def test_reading_needs_neither_polars_nor_pyarrow() -> None:
    code = """
import sys
sys.modules.update(polars=None, pyarrow=None, datasets=None, tiktoken=None)
import chatdata.shards.read, chattrain.batches, chattrain.nanochat.order
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# real conversations


def test_golden_sft_packed(golden_sft) -> None:
    """Every supervised token of 22,139 documents is a target of the plan, and of the batches of any number of ranks."""
    plan = plan_of(golden_sft["train"], seq_len=2048, step_sequences=12)
    (shard,) = golden_sft.manifest["splits"]["train"]["shards"]
    assert plan.targets_per_step.sum() + plan.left_out.sequence_targets == shard["supervised"] == 3_349_984
    assert plan.packing.fill > 0.99
    assert plan.left_out.documents_without_targets == 1 and plan.left_out.sequences < 12
    for step in (0, 100, plan.num_steps - 1):
        inputs, targets, lengths, digest = whole(plan, step)
        assert inputs.shape == (12, 2048)
        assert int((targets != IGNORED).sum()) == plan.targets_per_step[step]
        _, expected_targets = plain_rows(plan, step * 12, step * 12 + 2)
        assert targets[:2].tolist() == expected_targets
        assert sum(map(sum, lengths)) == plan.tokens_per_step[step]
        for num_ranks, batch in ((2, 3), (3, 1), (1, 6)):
            assert whole(plan, step, num_ranks, batch)[3] == digest


def test_golden_mid_stream(golden_mid) -> None:
    """12,376,420 tokens in 6,043 sequences of 2,048 targets, the first token and 355 at the end left over."""
    plan = plan_of(golden_mid["train"], layout="stream", mask="ignore", seq_len=2048, step_sequences=12)
    split = golden_mid["train"]
    assert plan.num_steps == 503 and plan.left_out.sequences == 7 and plan.left_out.tail_tokens == 355
    assert plan.targets_per_step.sum() + 7 * 2048 + 355 + 1 == split.num_tokens == 12_376_420
    inputs, targets, _, _ = whole(plan, 502)
    first = 502 * 12 * 2048
    assert inputs.flatten().tolist() == split.tokens(first, first + 12 * 2048).tolist()
    assert targets.flatten().tolist() == split.tokens(first + 1, first + 12 * 2048 + 1).tolist()
