"""What a checkpoint records of its plan, and damage to it. Saving and resuming: test_run.py."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from chatdata.packing.epoch import plan_epoch
from chattrain.checkpoint import plan_record, read_checkpoint, require_finite, require_same, save_checkpoint
from chattrain.errors import CheckpointError, ConfigError, NonFiniteError, ResumeError
from chattrain.model import ModelConfig

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


@pytest.fixture
def saved(tmp_path: Path, small_config: ModelConfig, small_weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint after 5 of 9 steps, as a run writes it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "tokenizer.json").write_text("{}")
    (tmp_path / "home" / "notes.txt").symlink_to("/etc/hostname")  # not the tokenizer's: left behind
    state = {f"lm_head.weight/{key}": torch.tensor(float(5)) for key in ("step", "exp_avg")}
    recipe = {"num_steps": 9, "non_finite": "raise"}
    return save_checkpoint(tmp_path, 5, small_config, small_weights, state, {}, recipe, tmp_path / "home")


def edit(path: Path, sign: bool = True, **changes: Any) -> None:
    """Change state.json; `sign` makes its own hash fit, so that only the rule itself finds the change."""
    state = json.loads((path / "state.json").read_text()) | changes
    rest = {key: value for key, value in state.items() if key != "sha256"}
    if sign and "sha256" not in changes:
        state["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))


def test_state_json_has_the_hash_of_every_file(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    names = ["model.safetensors", "optimizer.safetensors", "tokenizer/tokenizer.json"]
    assert state["files"] == {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in names}
    assert sorted(str(path.relative_to(saved)) for path in saved.rglob("*.*")) == [*names[:2], "state.json", names[2]]
    edit(saved)
    assert json.loads((saved / "state.json").read_text()) == state  # `edit` hashes as the package does
    found = read_checkpoint(saved)
    assert (found.step, len(found.optimizer_tensors())) == (5, 2)
    assert set(found.weights()) == set(load_file(saved / names[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "five"}, 'state.json, key "step": must be an integer of at least 0 and at most 99,999,999, not "fi'),
        ({"step": 10**9}, 'state.json, key "step": must be an integer of at least 0 and at most 99,999,999, not 10000'),
        ({"step": -1}, 'state.json, key "step": must be an integer of at least 0'),
        ({"recipe": []}, 'state.json, key "recipe": must be a table, not []'),
        ({"plan": None}, 'state.json, key "plan": must be a table, not null'),
        ({"files": {"model.safetensors": "x"}}, 'key "files[\\"model.safetensors\\"]": must be 64 hexadecimal digits'),
        ({"version": 1}, "chattrain-checkpoint version 1; this chattrain reads chattrain-checkpoint version 2: "),
        ({"step": 6}, "state.json: step 6, but the folder is step-00000005: it was renamed"),
        ({"sha256": "0" * 64}, "state.json: does not match its sha256: it was changed after the run"),
        ({"config": {}}, "state.json"),
    ],
)
def test_an_edited_state(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit(saved, **changes)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_checkpoint(saved)
    assert message in str(caught.value) and str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_any_value_of_the_state_counts(saved: Path) -> None:
    """Other sizes may fit the same tensors: n_head 4 → 2 is another model."""
    config = json.loads((saved / "state.json").read_text())["config"]
    edit(saved, sign=False, config=config | {"n_head": 2, "n_kv_head": 1})
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        read_checkpoint(saved)


def test_the_optimizer_of_another_step(saved: Path, small_config: ModelConfig, tmp_path: Path) -> None:
    tokenizer, weights = tmp_path / "home", load_file(saved / "model.safetensors")
    for updates, non_finite, fits in [
        ({"a": 5.0, "b": 5.0}, "raise", True),
        ({"a": 4.0}, "raise", False),
        ({"a": 6.0}, "raise", False),
        ({"a": 5.0, "b": 4.0}, "raise", False),
        ({"a": math.nan}, "raise", False),
        ({}, "raise", False),
        ({"a": 4.0}, "skip", True),  # one step was skipped
        ({}, "skip", True),
        ({"a": 6.0}, "skip", False),
    ]:
        state = {f"{name}/step": torch.tensor(value) for name, value in updates.items()}
        recipe = {"non_finite": non_finite}
        path = save_checkpoint(tmp_path / "x", 5, small_config, weights, state, {}, recipe, tokenizer)
        refused = pytest.raises(CheckpointError, match=r"step 5, but its optimizer did (\d|nan) updates$")
        with nullcontext() if fits else refused:
            read_checkpoint(path).optimizer_tensors()
    other = save_checkpoint(tmp_path / "y", 4, small_config, weights, {"a/step": torch.tensor(4.0)}, {}, {}, tokenizer)
    shutil.copy(other / "optimizer.safetensors", saved)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: SHA-256 differs .*: damaged, or of another"):
        read_checkpoint(saved).optimizer_tensors()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer/tokenizer.json"])
def test_a_file_is_damaged_or_missing(saved: Path, name: str) -> None:
    file = saved / name
    data = file.read_bytes()
    for damage in (lambda: file.write_bytes(data[:-1] + bytes([data[-1] ^ 1])), file.unlink):
        damage()
        with pytest.raises(CheckpointError, match=rf"{saved}/{name}: (missing|SHA-256|not readable: .*No such)"):
            found = read_checkpoint(saved)
            found.weights()
            found.optimizer_tensors()


def test_a_copy_under_another_name_is_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    assert read_checkpoint(shutil.copytree(saved, tmp_path / "best")).step == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.zeros(0),
        "b": torch.full((40, 33), torch.finfo(dtype).max, dtype=dtype),
        "c/step": torch.tensor(3.0),
    }
    require_finite(tensors, 7)
    tensors["b"][17, 5] = value
    with pytest.raises(NonFiniteError, match=r"^after 7 steps b is not finite: no checkpoint is written, earlier"):
        require_finite(tensors, 7)
