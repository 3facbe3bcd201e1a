"""`chatdata plan`: literal numbers, the same as chattrain's own plan, and what cannot be planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from chatdata.cli.app import cli
from chatdata.errors import PlanError
from chatdata.look.what_if import plan_numbers, what_if
from chatdata.packing.epoch import Layout, document_targets
from chatdata.shards.read import open_build
from chattrain.loop import dry_run
from chattrain.run.settings import RunSettings
from chattrain.run.start import Ranks, prepare

# six documents a … f with 5, 7, 3, 6, 1, 2 tokens: 24 in all
MASKS = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 1], [0, 0, 0], [0, 1, 0, 0, 1, 1], [0], [0, 1]]


@dataclass
class MaskSplit:
    """As much of a split as planning reads: lengths and the stored mask."""

    masks: list[list[int]]
    name: str = "train"

    def __post_init__(self) -> None:
        self.offsets = np.cumsum([0, *map(len, self.masks)])
        self.num_tokens = int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.masks)

    def mask(self, start: int, stop: int, policy: str = "apply") -> np.ndarray:
        assert policy == "apply" and 0 <= start <= stop <= self.num_tokens
        return np.array([bit for mask in self.masks for bit in mask], np.uint8)[start:stop]


def table(masks: list[list[int]], seq_len: int, mask: str = "apply", batch_size: int = 4) -> dict[str, dict]:
    records = what_if(MaskSplit(masks), mask, batch_size, 42, (seq_len,))  # type: ignore[arg-type]
    assert [record.pop("seq_len") for record in records] == [seq_len] * 3
    return {record.pop("rows"): record for record in records}


def test_what_if_by_hand() -> None:
    """T = 4. stream: 5 sequences and a tail of 3; b and d cross a border; f's one target is in the tail.

    pack, pad: b is cut by 2 tokens, d by 1; they lose 2 and 1 supervised ones, dropped they would lose all 4 and 3.
    c and e have no target. Left are 4, 4, 4 and 1 positions, for which pack needs 4 sequences.
    """
    found = table(MASKS, 4)
    assert found["stream"] == {
        "sequences": 5,
        "documents_cut": 2,
        "supervised_lost": 1,
        "supervised_lost_if_dropped": 1,
        "positions": 20,
        "padding": 0,
        "targets": 9,
        "filled": 1.0,
        "efficiency": 0.45,
    }
    assert found["pack"] == {
        "sequences": 4,
        "documents_cut": 2,
        "supervised_lost": 3,
        "supervised_lost_if_dropped": 7,
        "positions": 16,
        "padding": 3,
        "targets": 7,
        "filled": 0.8125,
        "efficiency": 0.4375,
    }
    assert found["pad"] == found["pack"]  # one batch as wide as its longest
    one_by_one = table(MASKS, 4, batch_size=1)["pad"]
    assert (one_by_one["positions"], one_by_one["padding"]) == (13, 0)


def test_what_if_where_the_mask_is_ignored() -> None:
    """Every token is a target; the supervised ones lost are those of the stored mask all the same."""
    found = table(MASKS, 4, mask="ignore", batch_size=5)
    assert {rows: (row["targets"], row["supervised_lost"], row["efficiency"]) for rows, row in found.items()} == {
        "stream": (20, 1, 1.0),
        "pack": (15, 3, 0.9375),  # 4 + 4 + 2 + 4 + 1 positions in 4 sequences: c and f share one
        "pad": (15, 3, 0.75),  # in five rows, 4 wide
    }


def test_a_length_beyond_the_split_makes_no_stream() -> None:
    found = table(MASKS, 8192)
    assert (found["stream"]["sequences"], found["stream"]["efficiency"], found["stream"]["supervised_lost"]) == (
        0,
        0,
        10,
    )
    assert (found["pack"]["sequences"], found["pack"]["supervised_lost"]) == (1, 0)


masks_of_documents = st.lists(
    st.lists(st.integers(0, 1), max_size=12).map(lambda bits: [0, *bits]), min_size=1, max_size=20
)


@given(masks_of_documents, st.integers(1, 10))
def test_every_supervised_token_is_a_target_or_counted_as_lost(masks: list[list[int]], seq_len: int) -> None:
    supervised = sum(map(sum, masks))
    for row in table(masks, seq_len).values():
        assert row["targets"] + row["supervised_lost"] == supervised
        assert row["padding"] >= 0 and row["supervised_lost"] <= row["supervised_lost_if_dropped"] <= supervised


@given(masks_of_documents, st.integers(1, 10))
def test_documents_split_by_a_stream_are_those_with_targets_in_two_sequences(
    masks: list[list[int]], seq_len: int
) -> None:
    start, num_split = 0, 0
    for mask in masks:
        sequences = {(token - 1) // seq_len for token in range(start + 1, start + len(mask))}
        num_split += len(sequences) > 1
        start += len(mask)
    assert table(masks, seq_len)["stream"]["documents_cut"] == num_split


@given(masks_of_documents, st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_targets_of_several_lengths_are_those_of_each(masks: list[list[int]], seq_lens: list[int]) -> None:
    split = MaskSplit(masks)
    for use in ("apply", "ignore"):
        together = document_targets(split, use, *seq_lens)
        assert together.tolist() == [document_targets(split, use, t)[0].tolist() for t in seq_lens]


# against chattrain


@pytest.fixture(scope="module")
def demo_sft(build_once: Callable[..., Path], chatdata: Callable) -> Path:
    def make(out: Path) -> None:
        result = chatdata("build", "--stage", "sft", "--demo", "--limit", 60, "--out", out)
        assert result.returncode == 0, result.stderr

    return build_once("demo-sft-plan", make)


@pytest.mark.parametrize(("long", "mask"), [("truncate", None), ("drop", "ignore"), ("truncate", "no-tools")])
def test_numbers_are_those_of_a_dry_run(demo_sft: Path, tmp_path: Path, long: str, mask: str | None) -> None:
    numbers = plan_numbers(open_build(demo_sft), 96, batch_size=3, mask=mask, long=long)
    for layout in get_args(Layout):
        settings = RunSettings(
            demo_sft,
            tmp_path / "no",
            "random:1x32x1",
            seq_len=96,
            device_batch_size=3,
            layout=layout,
            mask=mask,
            long=long,
        )
        run = prepare(settings, open_build(demo_sft), Ranks(0, 1, torch.device("cpu")))
        plan = {name: value for name, value in numbers["plans"][layout].items() if name in run.plan.counts()}
        assert plan == dry_run(run, 3)["plan"] and plan["steps"] > 1
        per_step = numbers["plans"][layout]["targets_per_step"]
        assert (per_step["min"], per_step["max"]) == (run.plan.targets_per_step.min(), run.plan.targets_per_step.max())
    assert numbers["plans"]["pack"]["left_out"]["long_tokens"] > 0


def test_padding_is_what_the_batches_have(demo_sft: Path, tmp_path: Path) -> None:
    from chattrain.batches import read_step

    numbers = plan_numbers(open_build(demo_sft), 96, batch_size=3, long="truncate")
    for layout in get_args(Layout):
        settings = RunSettings(
            demo_sft, tmp_path, "random:1x32x1", seq_len=96, device_batch_size=3, layout=layout, long="truncate"
        )
        plan = prepare(settings, open_build(demo_sft), Ranks(0, 1, torch.device("cpu"))).plan
        positions = sum(batch.inputs.numel() for s in range(plan.num_steps) for batch in read_step(plan, s).batches)
        found = numbers["plans"][layout]
        assert found["positions"] == positions and found["padding"] == positions - plan.tokens_per_step.sum()


# the command


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command(demo_sft: Path) -> None:
    shown = invoke(demo_sft, "--seq-len", 1024, "--batch-size", 2)
    numbers = json.loads(invoke(demo_sft, "--seq-len", 1024, "--batch-size", 2, "--json"))
    assert [(row["seq_len"], row["rows"]) for row in numbers["what_if"]] == [
        (t, rows) for t in (512, 1024, 2048, 4096, 8192) for rows in ("stream", "pack", "pad")
    ]
    for value in (numbers["plans"]["pack"]["targets"], numbers["what_if"][1]["padding"], numbers["documents"]):
        assert f"{value:,}" in shown
    assert numbers["stage_rows"] == "pack" and "mask apply" in shown


def test_documents_that_do_not_fit_are_refused_in_words(demo_sft: Path) -> None:
    """The case in which nanochat's loader would cut in silence: the others are planned, this one says what to do."""
    numbers = json.loads(invoke(demo_sft, "--seq-len", 64, "--json"))
    for layout in ("pack", "pad"):
        refused = numbers["plans"][layout]["refused"]
        assert "more than sequence length 64 + 1" in refused and "--long drop or --long truncate" in refused
    assert numbers["plans"]["stream"]["steps"] > 1
    assert "pack: document 0 has" in invoke(demo_sft, "--seq-len", 64)


def test_a_split_that_is_not_there_is_named(demo_sft: Path) -> None:
    with pytest.raises(PlanError, match=r"has no split 'test'; it has train"):
        plan_numbers(open_build(demo_sft), 64, split="test")
