"""`--mask last-turn | tools-only | no-tools`: plans, batches, and what a run keeps of them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import asdict

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.cli.app import cli as chatdata_cli
from chatdata.errors import PlanError
from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chatdata.recipe import load_recipe
from chatdata.shards.masks import MaskPolicy
from chatdata.shards.read import Split, open_build
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chattrain.batches import IGNORED, read_rows, read_step
from chattrain.checkpoint import plan_record, require_same
from chattrain.cli import cli
from chattrain.errors import ResumeError
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.optim import SCHEDULES

BYTES = {bytes([byte]): byte for byte in range(256)}
POLICIES = ("apply", "last-turn", "tools-only", "no-tools", "ignore")
TOOL = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]


def conversations() -> list[list[dict]]:
    """Of one and two turns, with and without a tool call; every fourth ends on the user."""
    made = []
    for i in range(40):
        text = [{"type": "text", "text": "ab" * (i % 3 + 1)}]
        first = text + TOOL * (i % 2) + text
        turns = [{"role": "user", "content": "q" * (i % 5 + 1)}, {"role": "assistant", "content": first}]
        if i % 3:
            turns += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "c" * (i % 7)}]
        if i % 4 == 0:
            turns += [{"role": "user", "content": "bye"}]
        made.append(turns)
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the above, 20 documents with a python part, in several shards; a token a byte."""
    folder = tmp_path_factory.mktemp("policies")
    (folder / "c.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations()))
    (folder / "r.toml").write_text('stage = "sft"\n[[train]]\ntask = "conversations"\npath = "c.jsonl"\n')
    tasks = load_tasks()
    tokenizer = Tokenizer(BYTES, SPLIT_PATTERN, append_special_tokens(BYTES), "bytes")
    planned = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatdata.shards.write.MAX_SHARD_TOKENS", 400)
        build(planned, folder / "build", workers=1, decontaminate="off")
    return folder / "build"


@pytest.fixture(scope="module")
def split(path: Path) -> Split:
    split = open_build(path)["train"]
    assert len(split) == 40 and len(split.shards) > 2
    return split


def plan_of(split: Split, mask: str, layout: str = "pack", **more: object) -> TrainingPlan:
    settings = {"seq_len": 48, "step_sequences": 2, "long": "truncate", **more}
    return plan_epoch(split, layout=layout, mask=mask, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", POLICIES)
@pytest.mark.parametrize("layout", ["stream", "pack", "pad"])
def test_batches_learn_what_the_policy_says(split: Split, layout: str, mask: str) -> None:
    """Target by target, against the mask of the whole split; the plan's numbers are those of the batches."""
    plan = plan_of(split, mask, layout)
    tokens, kept = split.tokens(0, split.num_tokens), split.mask(0, split.num_tokens, mask)
    wanted = np.where(kept == 1, tokens.astype(np.int64), IGNORED)
    for step in range(plan.num_steps):
        batch = read_step(plan, step).batches[0]
        assert int((batch.targets != IGNORED).sum()) == plan.targets_per_step[step]
    found = read_rows(plan, 0, plan.num_steps * plan.step_sequences)
    for number, row in enumerate(found.targets):
        if plan.packing is None:
            expected = wanted[number * 48 + 1 : (number + 1) * 48 + 1]
        else:
            placed = slice(*plan.packing.bounds[number : number + 2])
            documents = zip(plan.packing.documents[placed], plan.packing.lengths[placed], strict=True)
            expected = np.concatenate([wanted[(o := split.offsets[d]) + 1 : o + n] for d, n in documents])
        assert row[: len(expected)].tolist() == expected.tolist()
        assert (row[len(expected) :] == IGNORED).all()


def test_targets_add_up(split: Split) -> None:
    """What tools-only and no-tools learn is together what apply learns."""
    for layout in ("stream", "pack", "pad"):
        total = {mask: plan_of(split, mask, layout, step_sequences=1).counts()["targets"] for mask in POLICIES}
        assert total["tools-only"] + total["no-tools"] == total["apply"]
        assert 0 < total["last-turn"] < total["apply"] < total["ignore"]


def test_documents_without_a_target_are_left_out_and_counted(split: Split) -> None:
    plan = plan_of(split, "tools-only", seq_len=64, step_sequences=1)
    calls = split.index_table()["num_tool_calls"].to_numpy()
    assert sorted(plan.packing.documents.tolist()) == np.flatnonzero(calls).tolist()
    assert plan.left_out.documents_without_targets == 20
    assert plan.counts()["targets"] == 20 * 5  # python_start 1 + 1 python_end


def test_a_cut_of_the_trainer_comes_after_the_policy(split: Split) -> None:
    """A document cut before its last assistant message has no target; the one before it does not move up."""
    plan = plan_of(split, "last-turn", seq_len=16, step_sequences=1)
    for document in plan.packing.documents.tolist():
        assert split.mask(split.offsets[document], split.offsets[document] + 17, "last-turn").any()
    assert plan.left_out.documents_without_targets > 5


# identity


def test_names_and_hashes(split: Split) -> None:
    """Every mask policy makes another plan."""
    for layout in ("stream", "pack"):
        assert len({plan_record(plan_of(split, mask, layout)).hash for mask in POLICIES}) == 5
    assert plan_record(plan_of(split, "apply")).mask == "apply"


def test_what_changed_is_named(split: Split) -> None:
    saved = plan_record(plan_of(split, "last-turn", "stream"))
    require_same(asdict(saved), plan_record(plan_of(split, "last-turn", "stream")))
    with pytest.raises(ResumeError, match="the plan changed: mask was 'last-turn' and is now 'apply'"):
        require_same(asdict(saved), plan_record(plan_of(split, "apply", "stream")))


def test_order_nanochat_has_its_two_masks(split: Split) -> None:
    sizes = {"seq_len": 64, "num_ranks": 1, "device_batch_size": 2}
    with pytest.raises(PlanError, match="order nanochat has the masks ignore and apply, not last-turn"):
        make_nanochat_plan(split, mask="last-turn", **sizes)
    assert make_nanochat_plan(split, mask="apply", **sizes).mask == "apply"


@pytest.mark.parametrize("layout", ["stream", "pack"])
def test_a_split_without_a_target_is_refused(make_split, layout: str) -> None:
    split = make_split([[1, 2, 3], [4, 5, 6, 7]], [[0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(PlanError, match="train has 2 documents, but not one target with mask apply"):
        plan_of(split, "apply", layout, seq_len=4, step_sequences=1)


# the command


def chattrain(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_both_commands_take_every_mask_and_run_every_stage() -> None:
    """Their lists are written out: reading them from chatdata.shards.masks would load numpy for --help."""
    for command in (cli.commands["run"], chatdata_cli.commands["plan"]):
        (option,) = [option for option in command.params if option.name == "mask"]
        assert tuple(option.type.choices) == get_args(MaskPolicy)  # type: ignore[attr-defined]
    (option,) = [option for option in cli.commands["run"].params if option.name == "stage"]
    assert list(option.type.choices) == list(SCHEDULES)  # type: ignore[attr-defined]


def test_run_resume_and_trace(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["run", "--data", path, "--init", "random:1x32x1", "--seq-len", 64, "--device-batch-size", 2]
    arguments += ["--device", "cpu", "--out", out, "--steps", 4, "--mask"]
    chattrain(*arguments, "last-turn", "--stop-at", 2)
    with pytest.raises(ResumeError, match="mask was 'last-turn' and is now 'tools-only'"):
        chattrain(*arguments, "tools-only", "--resume")
    assert json.loads(chattrain(*arguments, "last-turn", "--resume", "--json").splitlines()[-1])["steps"] == 4
    traced = json.loads(chattrain("trace", out, "--step", 3, "--json"))
    split = open_build(path)["train"]
    bounds = [split.offsets[d["doc"] : d["doc"] + 2] for d in traced["documents"]]
    assert traced["log"]["targets"] == sum(int(split.mask(a, b, "last-turn").sum()) for a, b in bounds)


def test_too_short_a_sequence_is_refused_at_once(path: Path, tmp_path: Path) -> None:
    """nanochat's failure case: documents that do not fit would stall its loader or be cut in silence."""
    command = [sys.executable, "-m", "chattrain", "run", "--data", str(path), "--init", "random:1x32x1"]
    command += ["--layout", "pack", "--seq-len", "24", "--device", "cpu", "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lengths = [b - a for a, b in pairwise(open_build(path)["train"].offsets.tolist())]
    too_long = sum(n > 25 for n in lengths)
    first = next(i for i, n in enumerate(lengths) if n > 25)
    assert result.returncode == 1 and not (tmp_path / "run").exists()
    assert result.stderr == (
        f"Error: document {first} has {lengths[first]} tokens, more than sequence length 24 + 1; {too_long} of 40 "
        f"documents are too long: pass --long drop or --long truncate, or a sequence length of at least "
        f"{max(lengths) - 1}\n"
    )


def test_policies_need_no_polars(path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('polars', 'datasets', 'pandas', 'rich', 'transformers'): sys.modules[name] = None\n"
        "from chatdata.shards.read import open_build\n"
        "from chatdata.packing.epoch import plan_epoch\n"
        f"split = open_build({str(path)!r})['train']\n"
        "plan = plan_epoch(split, layout='pack', mask='tools-only', seq_len=64, step_sequences=1)\n"
        "print(plan.counts()['targets'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "100\n", result.stderr


def test_rows_are_tensors_of_the_usual_kind(split: Split) -> None:
    batch = read_step(plan_of(split, "no-tools"), 0).batches[0]
    assert batch.targets.dtype == torch.int64 and batch.targets.shape == (2, 48)
