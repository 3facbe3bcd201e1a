"""Runs end to end on a small build: exact resume, exact loss, safe stops."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from small_runs import check_record, record_of, write_build
from torch._dynamo.testing import CompileCounter

from chatdata.packing.epoch import TrainingPlan
from chatdata.shards.read import open_build
from chattrain import evaluate
from chattrain.batches import IGNORED, Batch, Step, read_step
from chattrain.checkpoint import Recipe, keep_last, last_checkpoint, save_checkpoint
from chattrain.cli import cli
from chattrain.errors import ChattrainError, CheckpointError, NonFiniteError, ResumeError, RunError
from chattrain.loop import StepResult, _evaluate, backward, train, train_step
from chattrain.loss import chunked_loss
from chattrain.model import random_config
from chattrain.run.settings import RunSettings
from chattrain.run.start import Learner, Ranks, Run, StopRequest, prepare
from chattrain.run.telemetry import RunRecord, draw_curve, flops_per_token, lock_run, mfu, read_log, write_run
from chattrain.run.trace import trace_step

# training needs none of them: `chattrain run` is run so, and every module imported
WITHOUT_POLARS = """import sys
sys.modules |= dict.fromkeys(["polars", "datasets", "rich", "transformers", "huggingface_hub", "rustbpe"])"""
HAS_MATPLOTLIB = find_spec("matplotlib") is not None
ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("builds")
    return {stage: write_build(folder / stage, stage) for stage in ("mid", "sft")}


def settings_for(builds: dict[str, Path], stage: str, out: Path, **changes: object) -> RunSettings:
    base = RunSettings(data=builds[stage], out=out, init="random:d1", seq_len=64, device_batch_size=4, steps=20)
    return replace(base, **changes)  # type: ignore[arg-type]


def prepared(settings: RunSettings) -> Run:
    return prepare(settings, open_build(settings.data), ONE)


def run(settings: RunSettings, stop: StopRequest | None = None) -> list[dict]:
    """What `chattrain run` does, in this process; returns the log."""
    ready = prepared(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    write_run(settings.out, RunRecord(str(settings.data.resolve()), ready.plan_record, ready.recipe))
    train(ready, settings, stop or StopRequest())
    return log_of(settings.out)


def log_of(out: Path) -> list[dict]:
    """The log, checked, as plain data."""
    return [msgspec.to_builtins(entry) for entry in read_log(out)]


def steps_of(log: list[dict], *keys: str) -> list[tuple]:
    return [tuple(entry[key] for key in ("step", *keys)) for entry in log if entry["kind"] == "train"]


def tensors_of(out: Path) -> dict[str, bytes]:
    last = last_checkpoint(out)
    assert last is not None
    return {name: (last.path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_ten_and_ten_steps_are_twenty(builds: dict[str, Path], tmp_path: Path, stage: str) -> None:
    whole = settings_for(builds, stage, tmp_path / "whole", epochs=1)
    log = run(whole)
    assert len(log) == 20
    assert prepared(replace(whole, out=tmp_path / "x")).plan.num_steps < 20, "the steps must cross an epoch's end"
    halves = replace(whole, out=tmp_path / "halves", stop_at=10)
    run(halves)
    assert last_checkpoint(halves.out).step == 10
    resumed = run(replace(halves, stop_at=None, resume=True))
    keys = ("loss", "multiplier", "batch", "gradient_norm", "targets")
    assert steps_of(resumed, *keys) == steps_of(log, *keys)
    assert tensors_of(halves.out) == tensors_of(whole.out)
    assert record_of(halves.out) == record_of(whole.out)
    check_record(whole.out)
    assert log[0]["loss"] > log[-1]["loss"]


def test_schedules_are_logged(builds: dict[str, Path], tmp_path: Path) -> None:
    mid = steps_of(run(settings_for(builds, "mid", tmp_path / "mid", steps=10)), "multiplier")
    assert [m for _, m in mid] == pytest.approx([1.0] * 8 + [1.0, 0.5])
    sft = steps_of(run(settings_for(builds, "sft", tmp_path / "sft", steps=4)), "multiplier")
    assert sft == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]


def test_resume_refuses_what_changed(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "sft", tmp_path / "run", stop_at=2)
    run(settings)
    other = write_build(tmp_path / "other", "sft", seed=1)
    resumed = replace(settings, resume=True, stop_at=4)
    for changes, error, message in [
        ({"data": other}, ResumeError, "build_id was "),
        ({"seq_len": 48}, ResumeError, "seq_len was 64 and is now 48"),
        ({"device_batch_size": 2}, ResumeError, "step_sequences was 4 and is now 2"),
        ({"layout": "pad"}, ResumeError, "layout was 'pack' and is now 'pad'"),
        ({"mask": "ignore"}, ResumeError, "mask was 'apply' and is now 'ignore'"),
        ({"seed": 1}, ResumeError, "seed was 42 and is now 1"),
        ({"steps": 30}, ResumeError, "num_steps was 20 and is now 30"),
        ({"lr_scale": 0.5}, ResumeError, "lr_scale was 1.0 and is now 0.5"),
        ({"stage": "mid", "layout": "pack", "mask": "apply"}, ResumeError, "stage was 'sft' and is now 'mid'"),
        ({"dtype": "bfloat16"}, ResumeError, "dtype was 'float32' and is now 'bfloat16'"),
    ]:
        with pytest.raises(error, match=message):
            prepared(replace(resumed, **changes))
    assert len(run(replace(resumed, total_batch_tokens=256, device_batch_size=2))) == 4  # only divided differently


def randomised(learner: Learner) -> None:
    """Weights at which no two logits are equal, in float64: a fresh model's head is zero and hides every mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    learner.model.double()


def gradients(learner: Learner, batches: list[Batch], num_targets: int) -> torch.Tensor:
    learner.model.zero_grad()
    for batch in batches:
        backward(learner, batch, num_targets)
    return torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])


def test_gradients_do_not_depend_on_micro_batches_and_sabotage_shows(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "sft", tmp_path / "x", device_batch_size=12)
    ready = prepared(settings)
    plan, learner = ready.plan, ready.learner
    randomised(learner)
    step = read_step(plan, 0)
    assert step.num_targets == sum(int((batch.targets != IGNORED).sum()) for batch in step.batches)
    whole = gradients(learner, list(step.batches), step.num_targets)
    for size in (1, 3, 6):
        parts = list(read_step(plan, 0, device_batch_size=size).batches)
        assert torch.allclose(
            gradients(learner, parts, step.num_targets), whole, rtol=1e-12, atol=1e-12 * whole.abs().max()
        )
        # sabotage: a mean of means weighs the targets of short rows more
        learner.model.zero_grad()
        for part in parts:
            backward(learner, part, int((part.targets != IGNORED).sum()) * len(parts))
        means = torch.cat([parameter.grad.flatten() for parameter in learner.model.parameters()])
        assert (means - whole).abs().max() > 1e-4 * whole.abs().max()
    batch = step.batches[0]
    dropped, flipped = batch.targets.clone(), batch.inputs.roll(-1, 1)
    dropped[dropped != IGNORED] = torch.where(
        torch.arange(int((dropped != IGNORED).sum())) % 7 == 0, IGNORED, dropped[dropped != IGNORED]
    )
    flipped[batch.targets != IGNORED] = IGNORED
    for sabotaged in (dropped, flipped, batch.targets.roll(1, 1)):
        wrong = gradients(learner, [replace(batch, targets=sabotaged)], step.num_targets)
        assert (wrong - whole).abs().max() > 1e-4 * whole.abs().max()
    across = gradients(learner, [replace(batch, lengths=None)], step.num_targets)
    assert (across - whole).abs().max() > 1e-4 * whole.abs().max()


RANK_SCRIPT = """
import contextlib, hashlib, json, os, sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from chattrain.batches import read_step
from chatdata.shards.read import open_build
from chattrain.loop import backward, train_step
from chattrain.optim import all_optimizer_tensors, optimizer_tensors, owners
from chattrain.run.start import prepare
from chattrain.run.start import join_ranks
from chattrain.run.settings import RunSettings

build, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for num_ranks, size, port in cases:
    if int(os.environ["RANK"]) >= num_ranks:
        continue
    os.environ |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_ranks("cpu") as ranks:
        settings = RunSettings(data=build, out=folder, init="random:d1", seq_len=64, device_batch_size=size,
                               total_batch_tokens=12 * 64, steps=20)
        ready = prepare(settings, open_build(build), ranks)
        learner = ready.learner
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in learner.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        learner.model.double()
        if ranks.num_ranks > 1:
            assert learner.called.gradient_as_bucket_view  # gradients are held once
            # buckets of the float64 model
            called = DistributedDataParallel(learner.model, gradient_as_bucket_view=True)
            learner = replace(learner, called=called)
        step = read_step(ready.plan, 0, ranks.rank, ranks.num_ranks, size)
        for number, batch in enumerate(step.batches):
            last = number + 1 == len(step.batches)
            with contextlib.nullcontext() if last or ranks.num_ranks == 1 else learner.called.no_sync():
                backward(learner, batch, step.num_targets)
        if ranks.is_first:
            torch.save(torch.cat([p.grad.flatten() for p in learner.model.parameters()]), folder / f"{num_ranks}.pt")

        # 20 steps: work and state shared, all of it on every rank, and (sabotaged) shared, but nothing sent
        unsent = SimpleNamespace(broadcast=lambda *_, **__: SimpleNamespace(wait=lambda: None))
        ways = {
            "shared": contextlib.nullcontext(),
            "alone": patch("chattrain.loop.update", lambda optimizers, *_: [each.step() for each in optimizers]),
            "unsent": patch("chattrain.optim.dist", unsent),
        }
        for way, patched in ways.items() if num_ranks < 4 else ():
            ready = prepare(settings, open_build(build), ranks)
            model, optimizers = ready.learner.model, ready.learner.optimizers
            mine = (ranks.rank, num_ranks)
            with patched:
                assert not [*all_optimizer_tensors(model, optimizers, *mine)] or way == "unsent"
                for number in range(20):
                    train_step(ready.learner, ready.recipe, ready.plan, read_step(ready.plan, number, *mine, size))
            own = optimizer_tensors(model, optimizers)
            if way == "shared":
                names = {parameter: name for name, parameter in model.named_parameters()}
                kept = {names[p] for p, owner in owners(optimizers, num_ranks).items() if owner == ranks.rank}
                assert {name.rpartition("/")[0] for name in own} == kept
                own = dict(all_optimizer_tensors(model, optimizers, *mine))
            digest = {}
            for kind, tensors in (("weights", model.state_dict()), ("optimizer", own)):
                data = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
                digest[kind] = hashlib.sha256(data).hexdigest()
            (folder / f"{way}-{num_ranks}-{ranks.rank}.json").write_text(json.dumps(digest))
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def from_ranks(builds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What RANK_SCRIPT leaves. Four processes take part in as many groups as they are in, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [(*case, port) for case, port in zip([(1, 3), (2, 3), (4, 3), (3, 1)], free_ports(4), strict=True)]
    command = [sys.executable, "-c", RANK_SCRIPT, str(builds["sft"]), str(folder), json.dumps(cases)]
    processes = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()  # those that wait for one that failed
    return folder


def test_gradients_do_not_depend_on_ranks(from_ranks: Path) -> None:
    """Ranks × micro-batches 1×4, 2×2, 4×1, 3×4 of a step of 12 sequences, float64: equal to 1e-12."""
    found = {number: torch.load(from_ranks / f"{number}.pt", weights_only=True) for number in (1, 2, 3, 4)}
    for num_ranks in (2, 3, 4):
        difference = (found[num_ranks] - found[1]).abs().max() / found[1].abs().max()
        assert difference <= 1e-12, (num_ranks, difference)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_shared_optimizer_gives_the_same_bytes(from_ranks: Path, num_ranks: int) -> None:
    """Weights and optimizer state after 20 steps, on every rank, against ranks that each update everything."""
    found = {
        way: [json.loads((from_ranks / f"{way}-{num_ranks}-{rank}.json").read_text()) for rank in range(num_ranks)]
        for way in ("shared", "alone", "unsent")
    }
    assert found["shared"] == found["alone"] == [found["shared"][0]] * num_ranks
    assert (found["unsent"] == found["alone"]) == (num_ranks == 1)


def torchrun(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_ranks_may_change_on_resume(builds: dict[str, Path], tmp_path: Path) -> None:
    """2 → 1 → 3 ranks: the same batches, the same losses but for rounding."""
    arguments = ["run", "--data", builds["mid"], "--init", "random:d1", "--seq-len", 64, "--device-batch-size", 2]
    arguments += ["--total-batch-tokens", 12 * 64, "--steps", 12, "--out", tmp_path / "changing", "--device", "cpu"]
    for num_ranks, stop_at in ((2, 4), (1, 8), (3, 12)):
        if num_ranks == 1:
            chattrain(*arguments, "--stop-at", stop_at, "--resume")
            continue
        result = torchrun(num_ranks, "-m", "chattrain", *arguments, "--stop-at", stop_at, "--resume")
        assert result.returncode == 0, result.stderr[-3000:]
    whole = settings_for(builds, "mid", tmp_path / "whole", steps=12, device_batch_size=2, total_batch_tokens=12 * 64)
    expected, found = (steps_of(log, "batch", "loss") for log in (run(whole), log_of(tmp_path / "changing")))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    check_record(tmp_path / "changing")
    # fp32: sums in another order; Muon's orthogonalisation keeps the difference small over 12 steps
    assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in expected], rel=2e-4)


def test_non_finite_is_named_before_the_step(
    builds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = settings_for(builds, "sft", tmp_path / "first", steps=1)
    run(first)
    weights = last_checkpoint(first.out).weights()
    monkeypatch.setattr("chattrain.loop.chunked_loss", lambda *a, **more: chunked_loss(*a, **more) * math.nan)
    poisoned = replace(first, init=str(first.out), steps=3, out=tmp_path / "poisoned")
    with pytest.raises(
        NonFiniteError, match=r"^step 0: loss nan, gradient norm nan, from documents \d+, .* of train; "
    ):
        run(poisoned)
    assert last_checkpoint(poisoned.out) is None
    log = run(replace(poisoned, out=tmp_path / "skipped", non_finite="skip"))
    assert [entry["skipped"] for entry in log] == [True] * 3
    after = last_checkpoint(tmp_path / "skipped").weights()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    # the optimizer made no update: that is a whole checkpoint, too
    assert prepared(replace(poisoned, out=tmp_path / "skipped", non_finite="skip", resume=True)).start == 3


@pytest.mark.parametrize("non_finite", ["raise", "skip"])
@pytest.mark.parametrize("place", ["weight", "optimizer state"])
def test_what_is_not_finite_replaces_no_checkpoint(
    builds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, non_finite: str
) -> None:
    """Loss and gradient are checked before an update, weights and optimizer before they are saved."""
    settings = settings_for(builds, "mid", tmp_path / "run", steps=6, save_every=1, keep_last=1, non_finite=non_finite)
    run(replace(settings, stop_at=3))
    good, before = tensors_of(settings.out), train_step

    def overflowing(learner: Learner, recipe: Recipe, plan: TrainingPlan, step: Step) -> StepResult:
        result = before(learner, recipe, plan, step)
        with torch.no_grad():
            head = learner.model.lm_head.weight
            (head if place == "weight" else learner.optimizers[1].state[head]["exp_avg_sq"])[3, 5] = math.inf
        return result

    monkeypatch.setattr("chattrain.loop.train_step", overflowing)
    name = "lm_head.weight" if place == "weight" else "lm_head.weight/exp_avg_sq"
    with pytest.raises(NonFiniteError, match=rf"^after 4 steps {name} is not finite: no checkpoint is written, "):
        run(replace(settings, resume=True))
    assert os.listdir(settings.out / "checkpoints") == ["step-00000003"] and tensors_of(settings.out) == good
    monkeypatch.undo()
    assert len(run(replace(settings, resume=True))) == 6  # and the run goes on from the last good one


def test_the_first_checkpoint_and_the_last_one_are_looked_at_too(builds: dict[str, Path], tmp_path: Path) -> None:
    huge = ["--lr-scale", "1e39", "--steps", 1]
    with pytest.raises(NonFiniteError, match=r"^after 1 steps transformer.wte.weight is not finite: no checkpoint is"):
        chattrain(*small_run(builds, "mid", tmp_path / "run", *huge))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_not_finite_are_not_taken_for_bad_documents(builds: dict[str, Path], tmp_path: Path) -> None:
    first = settings_for(builds, "sft", tmp_path / "first", steps=1)
    run(first)
    saved = last_checkpoint(first.out)
    weights = saved.weights()
    weights["transformer.wte.weight"][ord("f")] = math.nan
    home = builds["sft"] / "tokenizer"
    poisoned = save_checkpoint(tmp_path, 1, saved.config, weights, {}, {}, {}, home)
    for non_finite in ("raise", "skip"):
        with pytest.raises(NonFiniteError, match=r"^after 0 steps transformer.wte.weight is not finite: "):
            run(replace(first, init=str(poisoned), out=tmp_path / non_finite, non_finite=non_finite))


def test_bits_per_byte_is_what_one_document_at_a_time_gives(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "sft", tmp_path / "run", steps=6, eval_every=3)
    entries = [entry for entry in run(settings) if entry["kind"] == "val"]
    assert [entry["step"] for entry in entries] == [0, 3, 6]
    model = prepared(replace(settings, resume=True)).learner.model
    val = open_build(builds["sft"])["val"]
    names = val.index_table()["task"].to_pylist()
    nats: dict[str, list[float]] = {name: [] for name in names}
    for document, name in zip(val, names, strict=True):
        ids = torch.from_numpy(document.tokens.astype(np.int64))
        with torch.no_grad():
            log_probabilities = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
        for i in range(1, len(ids)):
            if document.mask[i] and ids[i] < 256:  # a special token has no bytes
                nats[name].append(-float(log_probabilities[i - 1, ids[i]]))
    everything = [value for values in nats.values() for value in values]
    last = entries[-1]
    assert last["bits_per_byte"] == pytest.approx(sum(everything) / math.log(2) / len(everything), rel=1e-5)
    assert last["tasks"] == pytest.approx({n: sum(v) / math.log(2) / len(v) for n, v in nats.items()}, rel=1e-5)
    assert last["bytes"] == len(everything)
    assert last["bits_per_byte"] < entries[0]["bits_per_byte"]


def chattrain_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "chattrain", *map(str, arguments)]


def chattrain(*arguments: object) -> str:
    """What `chattrain` prints, in this process, where torch is loaded already."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main([*map(str, arguments)], standalone_mode=False)
    return printed.getvalue()


def small_run(builds: dict[str, Path], stage: str, out: Path, *arguments: object) -> list[object]:
    common = ["run", "--data", builds[stage], "--init", "random:d1", "--seq-len", 64, "--device-batch-size", 4]
    return [*common, "--device", "cpu", "--out", out, *arguments]


def test_command_line_run_trace_and_dry_run(builds: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = small_run(builds, "sft", out, "--steps", 3, "--eval-every", 2)
    dry = json.loads(chattrain(*arguments, "--dry-run", "--json"))
    assert (dry["steps"], dry["stage"], dry["device"], out.exists()) == (3, "sft", "cpu", False)
    assert dry["parameters"] == sum(
        p.numel() for p in prepared(settings_for(builds, "sft", out)).learner.model.parameters()
    )
    command = [sys.executable, "-c", f"{WITHOUT_POLARS}\nfrom chattrain.cli import main; main()", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 steps done; checkpoint " in result.stdout
    assert (out / "loss.png").is_file() == HAS_MATPLOTLIB
    assert ("no loss curve: `uv sync --extra plot` installs matplotlib" in result.stdout) != HAS_MATPLOTLIB
    assert not list(Path(tmp_path).rglob("*.partial"))
    log = log_of(out)
    assert [(e["kind"], e["step"]) for e in log] == [
        ("val", 0),
        ("train", 0),
        ("train", 1),
        ("val", 2),
        ("train", 2),
        ("val", 3),
    ]
    keys = {"loss", "multiplier", "tokens", "targets", "tokens_per_s", "mfu", "memory_bytes", "data_wait_share"}
    assert keys | {"gradient_norm", "batch"} <= set(log[1]) and log[1]["mfu"] == "unknown"
    traced = json.loads(chattrain("trace", out, "--step", 1, "--json"))
    assert traced["log"] == log[2]
    assert json.loads(chattrain("trace", out, "--step", 1, "--data", f"file://{builds['sft']}", "--json")) == traced
    plan = prepared(settings_for(builds, "sft", out)).plan
    expected = [
        plan.packing.documents[a:b].tolist()
        for a, b in zip(plan.packing.bounds[4:8], plan.packing.bounds[5:9], strict=True)
    ]
    assert [d["doc"] for d in traced["documents"]] == [document for row in expected for document in row]
    assert {d["name"] for d in traced["documents"]} == {"conversations", "identity"}
    assert "identity" in chattrain("trace", out, "--step", 1)
    for step in (-1, 3):
        with pytest.raises(RunError, match=rf"--step {step}: .*run has steps 0 … 2$"):
            trace_step(out, step)


def test_trace_of_a_second_epoch_and_of_a_log_that_was_cut(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "sft", tmp_path / "run", steps=None, epochs=2, stop_at=2)
    log = run(settings)
    path = settings.out / "log.jsonl"
    path.write_text(path.read_text() + '{"kind": "tr')
    traced = trace_step(settings.out, 1)
    assert traced["log"] == log[1]
    num_steps = prepared(settings).plan.num_steps
    again = trace_step(settings.out, 1 + num_steps)  # the second epoch repeats the plan
    read, unread = traced["documents"][0], again["documents"][0]
    assert {key: unread.get(key) for key in read} == {**read, "loss": None, "targets": None}  # not done, not recorded
    assert len(again["documents"]) == len(traced["documents"]) and again["log"] is None
    path.write_text("{\n" + path.read_text())
    with pytest.raises(RunError, match=r"log.jsonl line 1: damaged, remove the line: not valid JSON: Expecting"):
        trace_step(settings.out, 1)
    with pytest.raises(RunError, match=r"not a run folder: no readable run.json; give the --out of a chattrain run"):
        trace_step(tmp_path, 1)


def test_only_the_start_is_saved(builds: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = chattrain(*small_run(builds, "sft", out, "--steps", 3, "--stop-at", 0))
    assert f"0 of 3 steps done; checkpoint {out}/checkpoints/step-00000000" in printed and "loss curve" not in printed


def test_command_line_errors(builds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd/wandb").mkdir(parents=True)  # wandb's files, where no wandb is installed
    monkeypatch.setattr("chattrain.run.start.find_spec", lambda name: ModuleSpec(name, None))
    out = tmp_path / "run"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    bad = [
        (
            ["--steps", 1, "--out", tmp_path / "full"],
            f"{tmp_path}/full: already exists; choose another --out, or --resume",
        ),
        (["--init", tmp_path / "nothing"], f"{tmp_path}/nothing: no such checkpoint or run folder"),
        (["--init", "random:x4"], "model size 'x4': must be 'd' and the number of layers, such as 'd4'"),
        (["--total-batch-tokens", 100], "--total-batch-tokens 100 must be a multiple of 256: 1 × 4 × 64"),
        (["--total-batch-tokens", 192], "192 must be a multiple of 256: 1 × 4 × 64 (ranks × device batch size"),
        (["--device", "cuda"], "device 'cuda' is not available: torch"),
        (["--seq-len", 16], "documents"),
        (["--data", tmp_path / "absent"], f"{tmp_path}/absent: no such folder (no manifest.json)"),
        (["--order", "nanochat", "--layout", "pad"], "--order nanochat fixes layout and batch"),
        (["--track", "wandb"], "--track wandb: not installed: `uv sync --extra wandb` installs it"),
    ]
    if torch.cuda.is_available():
        bad = [row for row in bad if row[0][0] != "--device"]
    for arguments, message in bad:
        with pytest.raises((ValueError, OSError)) as caught:  # in this process: torch takes seconds to start
            cli.main([str(a) for a in small_run(builds, "sft", out, *arguments)], standalone_mode=False)
        assert message in str(caught.value) and "\n" not in str(caught.value), arguments
        assert caught.value.exit_code == 1  # type: ignore[attr-defined]
        assert not out.exists()
    command = chattrain_command(*small_run(builds, "sft", out, *bad[0][0]))
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stderr.startswith(f"Error: {bad[0][1]}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "(--total-batch-tokens keeps the steps as they are), or --recompute"),
        (["--recompute"], "(--total-batch-tokens keeps the steps as they are)"),
        (["--dry-run"], "(--total-batch-tokens keeps the steps as they are), or --recompute"),
    ],
)
def test_too_little_memory_says_what_needs_less(
    builds: dict[str, Path], tmp_path: Path, monkeypatch, arguments: list[str], remedy: str
) -> None:
    """On a GPU it is torch.OutOfMemoryError, on the CPU a RuntimeError; other RuntimeErrors are not taken for it."""

    def on_a_gpu(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nGPU 0 has …")

    def on_the_cpu(*_) -> None:
        torch.empty(2**50)

    def otherwise(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    message = f"out of memory with --device-batch-size 4 at --seq-len 64: try a smaller one {remedy}"
    for number, (broken, expected) in enumerate(((on_a_gpu, message), (on_the_cpu, message), (otherwise, None))):
        monkeypatch.setattr("chattrain.loop.backward", broken)
        command = [str(a) for a in small_run(builds, "sft", tmp_path / str(number), *arguments)]
        with pytest.raises(ChattrainError if expected else RuntimeError) as caught:
            cli.main(command, standalone_mode=False)
        assert expected is None or str(caught.value) == expected


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, f"ended before {what}"
        time.sleep(0.05)
    raise AssertionError(f"never {what}")


def log_kinds(out: Path) -> list[str]:
    path = out / "log.jsonl"
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_long_validation_says_how_far_it_is(
    builds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(builds, "sft", tmp_path / "quick", steps=1, eval_every=1)
    run(settings)
    lines = capsys.readouterr().err.splitlines()
    quick = [line.split(" seq")[0] for line in lines if line.startswith("validation: ")]
    assert quick == ["validation: 16 of 16"] * 2
    clock = itertools.count(0, 20)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    run(replace(settings, out=tmp_path / "slow"))
    lines = capsys.readouterr().err.splitlines()
    slow = [line.split(" seq")[0] for line in lines if line.startswith("validation: ")]
    assert slow == [f"validation: {done} of 16" for done in (4, 8, 12, 16)] * 2


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_sigterm_saves_and_ends_well(builds: dict[str, Path], tmp_path: Path, moment: str) -> None:
    out = tmp_path / "run"
    arguments = small_run(builds, "mid", out, "--steps", 5000)
    if moment == "validation":
        arguments += ["--eval-every", 1]  # most of the time is validation
    process = subprocess.Popen(chattrain_command(*arguments), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: log_kinds(out).count("train") >= 3, process, "three steps")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    done = len(steps_of(log_of(out)))
    assert last_checkpoint(out).step == done and f"{done} of 5000 steps done" in output
    assert (out / "loss.png").is_file() == HAS_MATPLOTLIB


def test_the_loss_curve(builds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the curve needs matplotlib: uv sync --extra plot")
    run(settings_for(builds, "sft", tmp_path, steps=2, eval_every=1))
    assert draw_curve(tmp_path) == tmp_path / "loss.png" and (tmp_path / "loss.png").stat().st_size > 5_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curve(tmp_path) is None


FLIPPED = {"model.safetensors": 20_000, "optimizer.safetensors": 20_000, "tokenizer/tokenizer.json": 900}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_bit_of_a_checkpoint(builds: dict[str, Path], tmp_path: Path, name: str) -> None:
    """No command trains, starts or exports from it."""
    settings = settings_for(builds, "mid", tmp_path / "run", stop_at=2)
    run(settings)
    file = settings.out / "checkpoints/step-00000002" / name
    data = bytearray(file.read_bytes())
    data[FLIPPED[name]] ^= 0x40
    file.write_bytes(data)
    resume = small_run(builds, "mid", settings.out, "--steps", 20, "--resume")
    init = small_run(builds, "mid", tmp_path / "next", "--init", settings.out)
    export = ["export", settings.out, "--out", tmp_path / "exported"]
    for arguments in (resume, *((init, export) if name != "optimizer.safetensors" else ())):
        with pytest.raises(CheckpointError, match=rf"step-00000002/{name}: .*SHA-256 differs from state.json's"):
            chattrain(*arguments)
    assert not (tmp_path / "next").exists() and not (tmp_path / "exported").exists()


def test_a_second_run_of_one_folder_is_refused_before_any_work(builds: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(chattrain_command(*small_run(builds, "mid", out, "--steps", 5000)))
    try:
        wait_for(lambda: len(log_kinds(out)) >= 1, process, "one step")
        busy = "another run is writing there; wait for it, or choose another --out"
        for more in (["--resume"], ["--resume", "--init", "no such checkpoint"]):
            with pytest.raises(RunError, match=rf"^{out}: {busy}$"):
                chattrain(*small_run(builds, "mid", out, *more))
    finally:
        process.kill()
        process.wait()
    chattrain(*small_run(builds, "mid", out, "--steps", 5000, "--stop-at", 1, "--resume"))  # the dead hold no lock


def test_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with lock_run(out):
        for resume in (False, True):
            with pytest.raises(RunError, match="another run is writing there"), lock_run(out, resume):
                raise AssertionError("a second run")
    assert not out.exists()  # nothing was written
    with pytest.raises(ZeroDivisionError), lock_run(out):
        (out / "x").write_text("x")
        1 / 0  # noqa: B018
    assert sorted(os.listdir(out)) == [".lock", "x"]
    taken = rf"^{out}: already exists; choose another --out, or --resume to continue the run$"
    with pytest.raises(RunError, match=taken), lock_run(out):
        raise AssertionError("over another run")
    with lock_run(out, resume=True):
        pass
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "notes").write_text("x")
    with pytest.raises(RunError, match="already exists"), lock_run(ours):
        raise AssertionError("over other files")
    assert os.listdir(ours) == ["notes"]


def test_kill_9_then_resume(builds: dict[str, Path], tmp_path: Path) -> None:
    """Killed at three moments while it steps and saves all the time; the losses are those of a run left alone."""
    out = tmp_path / "run"
    arguments = small_run(builds, "mid", out, "--steps", 60, "--save-every", 1, "--resume")
    for seen in (3, 12, 25):
        process = subprocess.Popen(chattrain_command(*arguments), stdout=subprocess.DEVNULL)
        wait_for(lambda seen=seen: len(log_kinds(out)) >= seen, process, f"{seen} steps")
        process.kill()
        process.wait()
        assert last_checkpoint(out) is None or last_checkpoint(out).weights()
    assert "60 of 60 steps done" in chattrain(*arguments)
    alone = run(settings_for(builds, "mid", tmp_path / "alone", steps=60))
    assert steps_of(log_of(out), "batch", "loss") == steps_of(alone, "batch", "loss")
    assert tensors_of(out) == tensors_of(tmp_path / "alone") and record_of(out) == record_of(tmp_path / "alone")


def test_a_torn_log_line_is_left_out(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "mid", tmp_path / "run", stop_at=3)
    log = run(settings)
    path = settings.out / "log.jsonl"
    path.write_text(path.read_text() + json.dumps({**log[2], "step": 3, "loss": 9.0}) + '\n{"kind": "tr')
    resumed = run(replace(settings, stop_at=5, resume=True))
    assert [entry["step"] for entry in resumed] == [0, 1, 2, 3, 4] and resumed[:3] == log


def test_checkpoints_are_whole_or_not_there(builds: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_for(builds, "sft", tmp_path / "run", steps=5, save_every=1)
    run(settings)
    folder = settings.out / "checkpoints"
    assert sorted(os.listdir(folder)) == ["step-00000004", "step-00000005"]  # keep_last = 2
    last = folder / "step-00000005"
    assert sorted(os.listdir(last)) == ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer"]
    assert {path.stat().st_mode for path in last.glob("*.*")} == {(last / "state.json").stat().st_mode}
    # a partial one is never read, and is removed by the next save; what else is in the folder is not ours
    shutil.copytree(last, folder / ".step-00000009.partial")
    for name in ("step-best", "step-4.bak", "step-000000099", "step-0000000x", ".step-best.partial"):
        shutil.copytree(last, folder / name)
    (folder / "step-zz").write_text("x")
    (folder / "step-00000008").write_text("x")
    others = {path.name for path in folder.iterdir()} - {".step-00000009.partial", "step-00000004", "step-00000005"}
    assert len(others) == 7 and last_checkpoint(settings.out).step == 5
    keep_last(settings.out, 1)
    assert {path.name for path in folder.iterdir()} == others | {"step-00000005"}


def test_an_error_of_the_system_without_a_text(builds: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("chattrain.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match=r"step-00000000: cannot be written: OSError$"):
        run(settings_for(builds, "sft", tmp_path / "run", stop_at=0))
    assert os.listdir(tmp_path / "run" / "checkpoints") == []


def test_sft_goes_on_from_mid_and_exports(builds: dict[str, Path], tmp_path: Path) -> None:
    mid = settings_for(builds, "mid", tmp_path / "mid", steps=8)
    run(mid)
    sft = settings_for(builds, "sft", tmp_path / "sft", init=str(mid.out), steps=4)
    losses = [loss for _, loss in steps_of(run(sft), "loss")]
    assert losses[0] < 4.5  # a fresh model starts at ln 265 = 5.58
    other = write_build(tmp_path / "wide", "sft")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["canary_sha256"] = "0" * 64
    from chatdata.disk import write_json
    from chatdata.shards.manifest import build_id_of

    manifest["build_id"] = build_id_of(manifest)
    write_json(other / "manifest.json", manifest)
    with pytest.raises(RunError, match="was trained with another tokenizer"):
        prepared(replace(sft, data=other, out=tmp_path / "x"))
    verify = ["--verify"] if find_spec("transformers") else []
    chattrain("export", sft.out, "--out", tmp_path / "exported", *verify)
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "exported")) == [*names, "tokenizer.json", "tokenizer_config.json"]
    modes = {path.stat().st_mode for path in (tmp_path / "exported").iterdir()}
    assert modes == {(tmp_path / "exported" / "config.json").stat().st_mode}


@pytest.mark.parametrize("layout", ["stream", "pad"])
def test_a_compiled_model_is_one_graph_for_all_steps(
    builds: dict[str, Path], tmp_path: Path, monkeypatch, layout
) -> None:
    """Steps of pad differ in width; torch compiles 8 graphs of a fixed width at most."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    settings = settings_for(builds, "sft", tmp_path / "x", layout=layout, compile=True)
    ready = prepared(settings)
    widths = set()
    for number in range(9):
        (batch,) = read_step(ready.plan, number).batches
        widths.add(batch.inputs.shape[1])
        backward(ready.learner, batch, 1)
    assert counter.frame_count == 1 and (len(widths) > 3) == (layout == "pad")


@pytest.mark.parametrize("layout", ["stream", "pad"])
def test_validation_is_compiled_and_read_ahead(builds: dict[str, Path], tmp_path: Path, monkeypatch, layout) -> None:
    """One graph for all batches but the last, which is smaller; the numbers are those of the model without a graph."""
    torch._dynamo.reset()
    counter, threads, found = CompileCounter(), set(), []
    original = evaluate.read_rows

    def read(*arguments):
        threads.add(threading.current_thread().name.split("_")[0])
        return original(*arguments)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(evaluate, "read_rows", read)
    for compiled in (True, False):
        settings = settings_for(builds, "sft", tmp_path / "x", layout=layout, compile=compiled, eval_every=1)
        ready = prepared(settings)
        assert ready.val_plan.num_steps > 8 and ready.val_plan.num_steps % 3
        randomised(ready.learner)
        _evaluate(ready, replace(settings, device_batch_size=3), 0, found.append, lambda *_, **__: None, StopRequest())
        assert counter.frame_count == 1
    assert found[0].bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=1e-12) and found[0].bits_per_byte > 1
    assert threads == {"batches"}


def test_mfu_on_an_h100_is_the_known_one(monkeypatch) -> None:
    """d20 at 130 K tokens/s is about 46 %: 6 · 477,102,080 + 12 · 20 · 1280 · 2048."""
    config = random_config("d20", vocab_size=65_536, sequence_len=2048)
    assert flops_per_token(config, 2048) == 3_491_758_080
    for name, share in (("NVIDIA H100 80GB HBM3", 0.459), ("NVIDIA H100 PCIe", 0.6004), ("Quadro 4000", "unknown")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert mfu(config, 2048, 130_000, torch.device("cuda")) == share
    assert mfu(config, 2048, 130_000, torch.device("cpu")) == "unknown"


def test_chattrain_needs_no_polars(tmp_path: Path) -> None:
    folder = Path(sys.modules["chattrain"].__file__).parent
    modules = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    names = [".".join(["chattrain", *path.parts]) for path in modules if not path.name.startswith("__")]
    code = f"{WITHOUT_POLARS}\nimport importlib\nfor name in {names}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_chattrain_errors_are_value_errors() -> None:
    assert issubclass(ChattrainError, ValueError) and issubclass(NonFiniteError, ChattrainError)
