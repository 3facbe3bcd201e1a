"""Steps are read one ahead of the model. Whole runs: test_run.py."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import chattrain.batches
import chattrain.loop
from chatdata.errors import PlanError
from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chattrain.batches import read_step
from chattrain.checkpoint import Recipe
from chattrain.loop import read_ahead, train_step
from chattrain.model import load_model
from chattrain.optim import make_optimizers
from chattrain.run.start import Learner, Ranks


@pytest.fixture(scope="module", params=["stream", "pack", "pad"])
def plan_of_12(request, make_split) -> TrainingPlan:
    generator = np.random.default_rng(3)
    documents = [generator.integers(0, 60_000, generator.integers(2, 40)).tolist() for _ in range(400)]
    split = make_split(documents, shards=[150, 250])
    return plan_epoch(split, layout=request.param, mask="apply", seq_len=48, step_sequences=12)


def batch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_read_ahead_yields_the_steps_in_order(plan_of_12) -> None:
    steps = [*read_ahead(plan_of_12, range(2, 9), 1, 2, 3)]
    assert [step.number for step in steps] == [*range(2, 9)]
    for step in steps:
        expected = read_step(plan_of_12, step.number, 1, 2, 3)
        assert step.digest == expected.digest and len(step.batches) == 2
        for batch, other in zip(step.batches, expected.batches, strict=True):
            assert torch.equal(batch.inputs, other.inputs) and torch.equal(batch.targets, other.targets)
    assert [*read_ahead(plan_of_12, [])] == []
    assert batch_threads() == []


def test_the_next_step_is_read_while_the_caller_works(plan_of_12, monkeypatch) -> None:
    began: list[int] = []
    original = chattrain.loop.read_step
    monkeypatch.setattr(
        chattrain.loop, "read_step", lambda plan, step, *a: began.append(step) or original(plan, step, *a)
    )
    steps = read_ahead(plan_of_12, range(10))
    assert next(steps).number == 0
    deadline = time.monotonic() + 10
    while len(began) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert began == [0, 1]  # one ahead, no further
    assert next(steps).number == 1
    steps.close()


def test_the_thread_ends_when_the_caller_stops_early(plan_of_12) -> None:
    steps = read_ahead(plan_of_12, range(10**9))
    assert next(steps).number == 0
    assert len(batch_threads()) == 1
    steps.close()
    assert batch_threads() == []

    def fails() -> None:
        for step in read_ahead(plan_of_12, range(10)):
            raise RuntimeError(f"the model broke at step {step.number}")

    with pytest.raises(RuntimeError, match="at step 0"):
        fails()
    assert batch_threads() == []


def test_errors_of_the_thread_are_raised_in_the_caller(plan_of_12, monkeypatch) -> None:
    original = chattrain.batches.read_rows

    def breaks(plan, first, *rest):
        if first == 24:
            raise OSError("the disk went away")
        return original(plan, first, *rest)

    monkeypatch.setattr(chattrain.batches, "read_rows", breaks)
    steps = read_ahead(plan_of_12, range(5))
    assert [next(steps).number, next(steps).number] == [0, 1]
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)
    assert batch_threads() == []
    with pytest.raises(PlanError, match="must be a multiple of"):
        next(read_ahead(plan_of_12, range(5), 0, 5))


def test_for_a_gpu_memory_is_pinned_in_the_thread(plan_of_12, monkeypatch) -> None:
    """Stands in for a GPU: the thread must choose its own device, and pin inputs, targets and each batch's rows."""
    calls: list[tuple[str, str]] = []
    pinned: set[int] = set()

    def note(name: str):
        return lambda *_: calls.append((name, threading.current_thread().name.split("_")[0]))

    monkeypatch.setattr(torch.cuda, "set_device", note("device"))

    def pin_memory(tensor):
        note("pin")()
        pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.untyped_storage().data_ptr() in pinned)
    (step,) = read_ahead(plan_of_12, [4], 0, 1, 6, device="cuda:1")
    assert calls == [("device", "batches"), *[("pin", "batches")] * 4]
    assert len(step.batches) == 2 and all(t.is_pinned() for b in step.batches for t in (b.inputs, b.targets, b.rows))
    (on_cpu,) = read_ahead(plan_of_12, [4])
    assert on_cpu.digest == step.digest and len(calls) == 5


@pytest.mark.parametrize("batch", [12, 3])
@pytest.mark.parametrize("sabotage", [None, "item", "nonzero"])
def test_a_step_waits_for_the_device_once(
    plan_of_12, small_config, small_weights, monkeypatch, batch, sabotage
) -> None:
    """On fake tensors whatever needs a value raises, as it would wait on a GPU: item, nonzero, boolean indexing …"""
    reads: list[int] = []
    monkeypatch.setattr(Ranks, "sum", lambda self, values: 1)  # of the CPU's own numbers

    def copied(tensor):
        reads.append(len(tensor))
        return SimpleNamespace(numpy=lambda: np.ones(len(tensor), np.float32))

    monkeypatch.setattr(FakeTensor, "cpu", copied)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: pytest.fail("a copy to the host"))
    original, pack = chattrain.loop.chunked_loss, chattrain.loop.pack_sequences

    def from_lengths(*arguments):
        with fake_tensor.unset_fake_temporarily():  # on the CPU, where the lengths are
            return pack(*arguments)

    def waiting(hidden, weight, targets, *arguments, rows, **more):
        if sabotage == "item":
            hidden.detach().sum().item()
        return original(hidden, weight, targets, *arguments, rows=None if sabotage == "nonzero" else rows, **more)

    monkeypatch.setattr(chattrain.loop, "chunked_loss", waiting)
    monkeypatch.setattr(chattrain.loop, "pack_sequences", from_lengths)
    step = read_step(plan_of_12, 0, device_batch_size=batch)
    recipe = Recipe("", "sft", 10, 1.0, "float32", "raise", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = load_model(small_config, small_weights)
        learner = Learner(model, model, make_optimizers(model), Ranks(0, 1, torch.device("cpu")), False, False)
        if sabotage:
            with pytest.raises((fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)):
                train_step(learner, recipe, plan_of_12, step)
            return
        train_step(learner, recipe, plan_of_12, step)
    # the losses of all micro-batches, the norm, and the loss of every target
    assert reads == [12 // batch + 1 + step.num_targets]
