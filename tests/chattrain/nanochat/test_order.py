"""Order nanochat: the golden hashes of that commit's loaders, and plain statements of both loaders on small splits."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatdata.errors import PlanError
from chatdata.packing.epoch import TrainingPlan
from chattrain.batches import IGNORED, check_micro_batches, read_step
from chattrain.nanochat.order import line_tokens, make_nanochat_plan, wrap_micro_batch

Rows = list[list[int]]


def queue_loader(split, rank: int, num_ranks: int, batch: int, seq_len: int) -> Iterator[tuple[Rows, Rows, bool]]:
    """The specification of mask="ignore": a queue of tokens, as scripts/mid_train.py fills and empties it.

    Yields inputs, targets, and whether the rank's documents have run out by now.
    """
    lengths = np.diff(split.offsets).tolist()
    tokens, offsets = split.tokens(0, split.num_tokens).tolist(), split.offsets.tolist()
    queue: deque[int] = deque()
    document, ran_out = rank, False
    while True:
        while len(queue) < batch * seq_len + 1:
            queue.extend(tokens[offsets[document] : offsets[document + 1]])
            document += num_ranks
            if document >= len(lengths):
                document -= len(lengths)
                ran_out = True
        taken = [queue.popleft() for _ in range(batch * seq_len + 1)]
        inputs, targets = taken[:-1], taken[1:]
        cut = [slice(row * seq_len, (row + 1) * seq_len) for row in range(batch)]
        yield [inputs[c] for c in cut], [targets[c] for c in cut], ran_out


def padding_loader(split, rank: int, num_ranks: int, batch: int, padding: int) -> Iterator[tuple[Rows, Rows]]:
    """The specification of mask="apply": as scripts/chat_sft.py pads `batch` documents; the first epoch."""
    tokens, offsets = split.tokens(0, split.num_tokens).tolist(), split.offsets.tolist()
    mask = split.mask(0, split.num_tokens).tolist()
    mine = range(rank, len(split), num_ranks)
    for first in range(0, len(mine) - batch + 1, batch):
        reads = [(offsets[d], offsets[d + 1]) for d in mine[first : first + batch]]
        width = max(b - a for a, b in reads) - 1
        inputs, targets = [], []
        for a, b in reads:
            free = width - (b - a - 1)
            inputs.append(tokens[a : b - 1] + [padding] * free)
            targets.append([tokens[i] if mask[i] else IGNORED for i in range(a + 1, b)] + [IGNORED] * free)
        yield inputs, targets


def micro_batch(plan: TrainingPlan, step: int, rank: int) -> tuple[Rows, Rows]:
    (batch,) = read_step(plan, step, rank, plan.num_ranks, plan.device_batch_size).batches
    return batch.inputs.tolist(), batch.targets.tolist()


# golden


def first_batches_sha256(plan: TrainingPlan, rank: int, num_steps: int) -> tuple[str, int]:
    """Hash over inputs then targets of each step (int64, little endian, ignored = -1), and the number of targets."""
    digest, num_targets = hashlib.sha256(), 0
    for step in range(num_steps):
        (batch,) = read_step(plan, step, rank, plan.num_ranks).batches
        targets = torch.where(batch.targets == IGNORED, -1, batch.targets)
        num_targets += int((targets != -1).sum())
        digest.update(batch.inputs.numpy().astype("<i8").tobytes())
        digest.update(targets.numpy().astype("<i8").tobytes())
    return digest.hexdigest(), num_targets


def test_golden_mid_loader(golden_mid, shared) -> None:
    cases = json.loads((shared / "golden" / "streams.json").read_text())["mid_loader"]
    assert [case["world_size"] for case in cases] == [1, 2]
    for case in cases:
        num_ranks, batch, seq_len = case["world_size"], case["B"], case["T"]
        plan = make_nanochat_plan(
            golden_mid["train"], mask="ignore", seq_len=seq_len, num_ranks=num_ranks, device_batch_size=batch
        )
        for expected in case["ranks"]:
            rank = expected["rank"]
            assert first_batches_sha256(plan, rank, case["n"])[0] == expected["first_n_batches_sha256"]
            wrap = wrap_micro_batch(plan.rank_offsets[rank], line_tokens(plan))
            assert wrap == expected["wraps_while_filling_batch"]
        assert plan.num_steps == min(expected["wraps_while_filling_batch"] for expected in case["ranks"])


def test_golden_sft_loader(golden_sft, shared) -> None:
    cases = json.loads((shared / "golden" / "streams.json").read_text())["sft_loader"]
    assert [case["world_size"] for case in cases] == [1, 2]
    for case in cases:
        num_ranks, num_steps = case["world_size"], case["n"]
        plan = make_nanochat_plan(
            golden_sft["train"], mask="apply", seq_len=2048, num_ranks=num_ranks, device_batch_size=case["B"]
        )
        for expected in case["ranks"]:
            found = first_batches_sha256(plan, expected["rank"], num_steps)
            assert found == (expected["first_n_batches_sha256"], expected["targets"])
        assert plan.targets_per_step[:num_steps].sum() == sum(expected["targets"] for expected in case["ranks"])


# literal


def test_queue_by_hand(make_split) -> None:
    """The drawing in nanochat/order.py."""
    split = make_split([[10, 11, 12, 13, 14], [20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36], [40, 41, 42]])
    plan = make_nanochat_plan(split, mask="ignore", seq_len=3, num_ranks=1, device_batch_size=2)
    assert plan.num_steps == 2 and plan.left_out.tail_tokens == 5
    assert micro_batch(plan, 0, 0) == ([[10, 11, 12], [13, 14, 20]], [[11, 12, 13], [14, 20, 21]])
    assert micro_batch(plan, 1, 0) == ([[22, 23, 30], [31, 32, 33]], [[23, 30, 31], [32, 33, 34]])
    assert plan.targets_per_step.tolist() == plan.tokens_per_step.tolist() == [6, 6]


def test_padding_by_hand(make_split) -> None:
    """Two ranks: 0 and 2 go to rank 0, 1 and 3 to rank 1; a document without targets stays, 4 is left over."""
    documents = [[10, 11, 12, 13], [20, 21, 22], [30, 31], [40, 41, 42, 43, 44], [50, 51]]
    masks = [[0, 0, 1, 1], [0, 0, 0], [0, 1], [0, 1, 0, 1, 1], [0, 1]]
    plan = make_nanochat_plan(make_split(documents, masks), mask="apply", seq_len=4, num_ranks=2, device_batch_size=2)
    assert micro_batch(plan, 0, 0) == ([[10, 11, 12], [30, 9, 9]], [[-100, 12, 13], [31, -100, -100]])
    rank_1 = [[20, 21, 9, 9], [40, 41, 42, 43]], [[-100, -100, -100, -100], [41, -100, 43, 44]]
    assert micro_batch(plan, 0, 1) == rank_1
    assert plan.targets_per_step.tolist() == [6] and plan.tokens_per_step.tolist() == [10]
    assert (plan.left_out.sequences, plan.left_out.sequence_targets) == (1, 1)


# against the plain statements


@st.composite
def split_and_cut(draw: st.DrawFn, make_split):
    num_ranks, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(2, 12), min_size=num_ranks * batch, max_size=60))
    ids = iter(range(100, 100 + sum(lengths)))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    masks = [[0, *draw(st.lists(st.integers(0, 1), min_size=n - 1, max_size=n - 1))] for n in lengths]
    cut = draw(st.integers(1, len(lengths)))
    return make_split(documents, masks, [c for c in (cut, len(lengths) - cut) if c]), num_ranks, batch


@given(st.data(), st.integers(1, 9))
def test_queue_equals_the_plain_loader(make_split, data, seq_len) -> None:
    split, num_ranks, batch = data.draw(split_and_cut(make_split))
    loaders = [queue_loader(split, rank, num_ranks, batch, seq_len) for rank in range(num_ranks)]
    try:
        plan = make_nanochat_plan(split, mask="ignore", seq_len=seq_len, num_ranks=num_ranks, device_batch_size=batch)
    except PlanError:
        assert any(next(loader)[2] for loader in loaders)  # a rank's documents do not fill one micro-batch
        return
    for rank, loader in enumerate(loaders):
        batches = [*islice(loader, plan.num_steps + 1)]
        assert [(inputs, targets) for inputs, targets, _ in batches[:-1]] == [
            micro_batch(plan, step, rank) for step in range(plan.num_steps)
        ]
        assert not any(ran_out for *_, ran_out in batches[:-1])
    # the next micro-batch is the first during whose filling some rank runs out
    loaders = [queue_loader(split, rank, num_ranks, batch, seq_len) for rank in range(num_ranks)]
    assert any([*islice(loader, plan.num_steps + 1)][-1][2] for loader in loaders)


@given(st.data())
def test_padding_equals_the_plain_loader(make_split, data) -> None:
    split, num_ranks, batch = data.draw(split_and_cut(make_split))
    plan = make_nanochat_plan(split, mask="apply", seq_len=11, num_ranks=num_ranks, device_batch_size=batch)
    num_targets = np.zeros(plan.num_steps, np.int64)
    for rank in range(num_ranks):
        batches = [*islice(padding_loader(split, rank, num_ranks, batch, 9), plan.num_steps)]
        assert batches == [micro_batch(plan, step, rank) for step in range(plan.num_steps)]
        num_targets += [sum(t != IGNORED for row in targets for t in row) for _, targets in batches]
    assert plan.targets_per_step.tolist() == num_targets.tolist()


# refusals


def test_what_order_nanochat_refuses(make_split) -> None:
    split = make_split([[*range(9)]] * 4)
    with pytest.raises(PlanError, match=r"document 0 of train has 9 tokens, more than sequence length 7 \+ 1"):
        make_nanochat_plan(split, mask="apply", seq_len=7, num_ranks=1, device_batch_size=1)
    with pytest.raises(PlanError, match=r"4 sequences of 8 positions, but one step takes 6"):
        make_nanochat_plan(split, mask="apply", seq_len=8, num_ranks=2, device_batch_size=3)
    for num_ranks, batch in ((1, 5), (2, 3), (5, 1)):
        with pytest.raises(PlanError, match="but one step takes"):
            make_nanochat_plan(split, mask="ignore", seq_len=8, num_ranks=num_ranks, device_batch_size=batch)
    for size in (0, -1, 10**9):
        with pytest.raises(PlanError, match="sequence length is"):
            make_nanochat_plan(split, mask="ignore", seq_len=size, num_ranks=1, device_batch_size=1)
    plan = make_nanochat_plan(split, mask="apply", seq_len=8, num_ranks=2, device_batch_size=1)
    check_micro_batches(plan, 2, 1)
    check_micro_batches(plan, 1, 1)  # one rank reads the micro-batches of both, to do their steps again
    for cut in ((1, 2), (2, 2), (3, 1)):
        with pytest.raises(PlanError, match=r"order nanochat was planned for 2 ranks × device batch size 1"):
            check_micro_batches(plan, *cut)
