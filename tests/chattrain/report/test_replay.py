"""Replayed losses: equal to the record, to the byte on CPU, and at the right tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatdata.errors import PlanError
from chatdata.progress import no_progress
from chatdata.shards.read import open_build
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chattrain.batches import read_step
from chattrain.errors import CheckpointError
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.report import replay as replays
from chattrain.run.telemetry import read_run
from chattrain.run.trace import plan_again, step_documents

CASES = {
    "stream": ["--layout", "stream"],
    "pack, last turn": ["--mask", "last-turn"],
    "pad": ["--layout", "pad"],
    "nanochat": ["--order", "nanochat"],
    "bfloat16": ["--dtype", "bfloat16"],
}


def replay(run: Path, wanted: list[tuple[int, int, str]]) -> dict[str, Any]:
    record = read_run(run)
    return replays.replay(run, record, plan_again(record), wanted, no_progress)


@pytest.mark.parametrize("case", CASES)
def test_every_token_has_its_loss(build: Path, tmp_path: Path, chattrain: Callable[..., str], case: str) -> None:
    run = tmp_path / "run"
    sizes = ["--init", "random:d1", "--seq-len", 64, "--device-batch-size", 4, "--device", "cpu"]
    chattrain("run", "--data", build, *sizes, "--steps", 5, "--save-every", 2, *CASES[case], "--out", run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    plan = plan_again(read_run(run))
    wanted = [(4, number, "all") for number in range(len(step_documents(run, plan, 4)))]
    found = replay(run, wanted)
    assert (found["steps"], found["unequal"], found["largest"]) == (1, 0, 0.0)  # from the checkpoint of step 4
    assert found["reads"] == len(wanted) == len(found["shown"])
    for read in found["shown"]:
        losses = [cell["loss"] for cell in read["cells"] if cell["loss"] is not None]
        assert len(losses) == read["targets"] and sum(losses) == pytest.approx(read["loss"], rel=1e-5)
        assert "".join(cell["text"] for cell in read["cells"]) == read["text"]
        if case != "stream" and case != "nanochat":  # whole documents: what the assistant says, and its end
            said = "".join(cell["text"] for cell in read["cells"] if cell["loss"] is not None)
            assert said.endswith("<|assistant_end|>") and "<|user_start|>" not in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_from_the_start_and_over_several_steps(run: Path) -> None:
    found = replay(run, [(3, 0, "a"), (18, 1, "b"), (20, 0, "c"), (20, 2, "d")])
    assert (found["steps"], found["unequal"]) == (4 + 5, 0) and found["reads"] > 9
    assert [(read["step"], read["why"]) for read in found["shown"]] == [(3, "a"), (18, "b"), (20, "c"), (20, "d")]


def test_what_is_not_replayed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MAX_STEPS", 5)
    assert replays.within_reach(run, 20) == {s: s - s % 8 for s in (*range(5), *range(8, 13), *range(16, 20))}
    found = replay(run, [(14, 0, ""), (6, 0, ""), (9, 0, "")])
    assert (found["far"], found["late"], [read["step"] for read in found["shown"]]) == ([6, 14], [], [9])
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="step-00000007: no such checkpoint"):
        patch.setattr(replays, "within_reach", lambda *_: {9: 7})  # pruned meanwhile, by a run that goes on
        replay(run, [(9, 0, "")])
    monkeypatch.setattr(replays, "MAX_S", -1.0)
    found = replay(run, [(9, 0, ""), (0, 0, "")])
    assert (found["far"], found["late"], found["shown"], found["steps"]) == ([], [0, 9], [], 0)


def test_one_rank_reads_the_micro_batches_of_all(build: Path, run: Path) -> None:
    split, sizes = open_build(build)["train"], {"seq_len": 64, "num_ranks": 2, "device_batch_size": 4}
    plans = [make_nanochat_plan(split, mask=mask, **sizes) for mask in ("ignore", "apply")]
    for plan in (plan_again(read_run(run)), *plans):
        size = plan.device_batch_size or 2
        ranks = [read_step(plan, 1, rank, 2, size) for rank in range(2)]
        alone = read_step(plan, 1, 0, 1, size)
        assert len(alone.batches) == sum(len(rank.batches) for rank in ranks) > 1
        for mine, theirs in zip(alone.batches, [batch for rank in ranks for batch in rank.batches], strict=True):
            width = theirs.inputs.shape[1]  # of pad, as wide as the rank needs
            assert mine.inputs[:, :width].equal(theirs.inputs) and mine.targets[:, :width].equal(theirs.targets)
        assert alone.read_targets.tolist() == np.sum([rank.read_targets for rank in ranks], axis=0).tolist()
    with pytest.raises(PlanError, match="order nanochat was planned for 2 ranks × device batch size 4, not 1 × 2"):
        read_step(plans[1], 0, 0, 1, 2)


def test_tokens_that_share_a_character() -> None:
    byte = {bytes([value]): value for value in range(256)}
    tokenizer = Tokenizer(byte, SPLIT_PATTERN, append_special_tokens(byte), "bytes")
    tokens = [256, *"é\n\x07".encode(), 0xFF, 97]
    found = cells = replays.cells(tokens, [float("nan"), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], tokenizer)
    assert [cell["text"] for cell in cells] == ["<|bos|>", "", "é", "\n", "␇", "\\xff", "a"]
    assert [cell["loss"] for cell in found] == [None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [cell["special"] for cell in found] == [True] + [False] * 6
