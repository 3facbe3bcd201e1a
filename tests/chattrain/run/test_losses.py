"""The loss record: true for every layout, mended after a kill, and what `chattrain losses` makes of it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import tempfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import check_record, write_build
from torch.nn.functional import cross_entropy

from chatdata.errors import UsageError
from chatdata.packing.epoch import TrainingPlan
from chatdata.shards.read import open_build
from chattrain.batches import read_step
from chattrain.cli import cli
from chattrain.errors import RunError
from chattrain.loop import train_step
from chattrain.model import GPT
from chattrain.reads import reads_of_step
from chattrain.run import losses as record
from chattrain.run.losses import open_losses, recorded_steps, sum_losses, summarise
from chattrain.run.settings import RunSettings
from chattrain.run.start import Ranks, prepare

CASES = {
    "stream": {"layout": "stream"},
    "stream, all tokens": {"layout": "stream", "mask": "ignore"},
    "pack": {"layout": "pack"},
    "pack, last turn": {"layout": "pack", "mask": "last-turn"},
    "pad": {"layout": "pad"},
    "nanochat, mid": {"order": "nanochat", "stage": "mid"},
    "nanochat, sft": {"order": "nanochat"},
}
STEPS = [[[1.5, 2.0], [3, 4]], [[0.25], [7]], [[8.0, 0.0, 1.0], [2, 0, 5]]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("build") / "sft", "sft")


def chattrain(*arguments: object) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main([*map(str, arguments)], standalone_mode=False)
    return printed.getvalue()


@pytest.fixture(scope="module")
def run(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of an epoch and a half."""
    out = tmp_path_factory.mktemp("runs") / "run"
    sizes = ["--init", "random:d1", "--seq-len", 64, "--device-batch-size", 16, "--device", "cpu"]
    chattrain("run", "--data", build, *sizes, "--steps", 4, "--out", out)
    return out


def costs(model: GPT, plan: TrainingPlan, step: int) -> np.ndarray:
    """Losses and targets of every read, [2, reads], from each sequence or document by itself, with all logits."""
    reads = reads_of_step(plan, step)
    numbers, found = range(len(reads.document)), np.zeros((2, len(reads.document)))
    together = (lambda i: reads.sequence[i]) if plan.layout == "stream" else (lambda i: i)
    for _, row in groupby(numbers, together):
        parts = [(i, plan.split[int(reads.document[i])], slice(reads.start[i], reads.stop[i])) for i in row]
        tokens = torch.from_numpy(np.concatenate([doc.tokens[part] for _, doc, part in parts]).astype(np.int64))
        mask = np.concatenate([doc.mask[part] for _, doc, part in parts])[1:]
        read = np.concatenate([np.full(part.stop - part.start, i) for i, _, part in parts])[1:]
        with torch.no_grad():
            losses = cross_entropy(model.logits(model(tokens[None, :-1]))[0], tokens[1:], reduction="none").numpy()
        used = mask > (-1 if plan.mask == "ignore" else 0)
        found += [np.bincount(read[used], values[used], len(numbers)) for values in (losses, np.ones_like(losses))]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_read_is_what_its_tokens_cost(build: Path, tmp_path: Path, case: str) -> None:
    base = RunSettings(data=build, out=tmp_path, init="random:d1", seq_len=64, device_batch_size=4, steps=3)
    settings = replace(base, **CASES[case])  # type: ignore[arg-type]
    if settings.order == "plan":
        settings = replace(settings, device_batch_size=2, total_batch_tokens=6 * 64)
    ready = prepare(settings, open_build(build), Ranks(0, 1, torch.device("cpu")))
    model, generator = ready.learner.model, torch.Generator().manual_seed(7)
    with torch.no_grad():  # a fresh model's head is zero: every token would cost the same
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for number in range(2):
        expected = costs(model, ready.plan, number)
        step = read_step(ready.plan, number, device_batch_size=settings.device_batch_size)
        result = train_step(ready.learner, ready.recipe, ready.plan, step)
        assert result.reads[1].tolist() == expected[1].tolist()
        assert result.reads[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        assert len({*result.reads[0]}) > 3


@pytest.mark.parametrize("case", CASES)
def test_sums_are_the_logs(build: Path, tmp_path: Path, case: str) -> None:
    layout = [text for key, value in CASES[case].items() for text in (f"--{key}", value)]
    sizes = ["--init", "random:d1", "--seq-len", 64, "--device-batch-size", 4, "--device", "cpu"]
    chattrain("run", "--data", build, *sizes, "--steps", 5, "--out", tmp_path / "run", *layout)
    check_record(tmp_path / "run")


def written(out: Path, steps: list, start: int = 0) -> list[bytes]:
    """The files after these steps, the first of which is number `start`."""
    with open_losses(out, start) as write:
        for step in steps:
            write(np.array(step))
    return [(out / "losses" / name).read_bytes() for name in ("reads.bin", "steps.bin")]


def test_the_files(tmp_path: Path) -> None:
    reads, steps = written(tmp_path, STEPS)
    dtype = [("loss", "<f4"), ("targets", "<u4")]
    assert np.frombuffer(reads, dtype).tolist() == [(1.5, 3), (2.0, 4), (0.25, 7), (8.0, 2), (0.0, 0), (1.0, 5)]
    assert np.frombuffer(steps, "<u8").tolist() == [2, 3, 6] == recorded_steps(tmp_path).tolist()


@given(st.data())
def test_what_a_kill_leaves_is_mended(data) -> None:
    """Whatever was written of steps after a checkpoint, and however much of it, resuming leaves no trace of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        whole = written(out, STEPS)
        start = data.draw(st.integers(0, len(STEPS)))
        least = 8 * sum(len(losses) for losses, _ in STEPS[:start]), 8 * start
        for name, content, kept in zip(("reads.bin", "steps.bin"), whole, least, strict=True):
            cut = data.draw(st.integers(kept, len(content)))
            (out / "losses" / name).write_bytes(content[:cut] + data.draw(st.binary(max_size=20 * (cut > kept))))
        assert written(out, STEPS[start:], start) == whole


def test_steps_of_an_earlier_chattrain_count_no_reads(tmp_path: Path) -> None:
    written(tmp_path, STEPS[:1], start=3)
    assert recorded_steps(tmp_path).tolist() == [0, 0, 0, 2]
    shutil.rmtree(tmp_path / "losses")
    assert recorded_steps(tmp_path).tolist() == []


def test_losses_of_a_run(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "losses.parquet"
    assert chattrain("losses", run, "--out", file).startswith(f"{file}: ")
    table = pq.read_table(file)
    assert table.schema.names == ["step", "doc", "task", "name", "row", "loss", "targets"]
    assert [str(table.schema.field(name).type) for name in ("loss", "targets")] == ["float", "uint32"]
    for step in range(4):
        traced = json.loads(chattrain("trace", run, "--step", step, "--json"))["documents"]
        rows = [row for row in table.to_pylist() if row["step"] == step]
        assert [{"step": step, **{key: read[key] for key in rows[0] if key != "step"}} for read in traced] == rows
        assert all(read["text"].startswith("<|bos|><|user_start|>") for read in traced)
    found = json.loads(chattrain("losses", run, "--json"))
    assert found["steps"] == [0, 3] and found["not_finite"] == 0 and len(found["hardest"]) == 10
    assert {*found["tasks"]} == {"conversations", "identity"}
    rows = [row for row in table.to_pylist() if row["step"] < 2 and row["name"] == "identity"]
    mean = sum(row["loss"] for row in rows) / sum(row["targets"] for row in rows)
    assert found["tasks"]["identity"]["first"] == pytest.approx(mean)
    printed = chattrain("losses", run)
    assert "nats per target in each third of steps 0 … 3, 0 losses" in printed
    assert f"{found['hardest'][0]['mean']:.4f}" in printed
    line = next(line for line in chattrain("trace", run, "--step", 0).splitlines() if "<|bos|>" in line)
    assert line.strip() == json.loads(chattrain("trace", run, "--step", 0, "--json"))["documents"][0]["text"]


def test_what_is_not_recorded_is_said(run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / "old")
    shutil.rmtree(old / "losses")
    with pytest.raises(RunError, match=rf"^{old}: no losses are recorded: an earlier chattrain did the steps, or none"):
        chattrain("losses", old)
    assert "not recorded" in chattrain("trace", old, "--step", 0)
    with pytest.raises(UsageError, match=r"names? a file"):
        chattrain("losses", run, "--out", tmp_path)
    (run / "losses/steps.bin").rename(tmp_path / "steps.bin")
    steps = np.fromfile(tmp_path / "steps.bin", "<u8")
    for wrong in (steps[1:], steps[[1, 0, 2, 3]], np.array([1])):
        (run / "losses/steps.bin").write_bytes(wrong.astype("<u8").tobytes())
        with pytest.raises(RunError, match=r"run/losses: has other reads than the run's plan: it is damaged, or of "):
            chattrain("losses", run)
    (tmp_path / "steps.bin").rename(run / "losses/steps.bin")


def test_a_record_and_a_log_that_disagree(run: Path, tmp_path: Path) -> None:
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    lines = [number for number, line in enumerate(log) if json.loads(line).get("kind") != "val"]
    reads, steps = (np.fromfile(run / "losses" / name, "<u4") for name in ("reads.bin", "steps.bin"))
    loss = reads.copy()
    loss[:1].view("<f4")[0] += 1
    targets = reads.copy()
    targets[1] += 1

    def message(name: str, content: bytes) -> str:
        damaged = shutil.copytree(run, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / name).write_bytes(content)
        with pytest.raises(RunError) as caught:
            chattrain("losses", damaged)
        return str(caught.value).removeprefix(f"{damaged}: ")

    for changed in (loss, targets):
        found = message("losses/reads.bin", changed.tobytes())
        assert re.fullmatch(
            r"step 0: the loss record has \S+ nats of \S+ targets, the log \S+ of \S+; one is damaged", found
        )
    found = message("losses/steps.bin", steps.tobytes()[:-3])
    assert found == "the loss record lacks 1 steps of the log, the first is 3"
    shorter = "".join(line for number, line in enumerate(log) if number != lines[1])
    assert message("log.jsonl", shorter.encode()) == "the log lacks 1 of its steps, the first is 1"
    assert message("log.jsonl", b"").startswith("the log lacks ")
    assert message("log.jsonl", "".join([*log, log[lines[1]]]).encode()) == "the log has step 1 twice"
    not_finite = "".join(re.sub('"loss": [^,]+', '"loss": NaN', line) for line in log)
    assert message("log.jsonl", not_finite.encode()).startswith("step 0: the loss record has ")
    with pytest.raises(UsageError, match=r"log.jsonl is a file that is not Parquet"):
        chattrain("losses", run, "--out", run / "log.jsonl")


def test_the_record_of_a_run_at_work_grows(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two steps are done after the log was read: they are in the record, not in the log."""
    early = shutil.copytree(run, tmp_path / "early")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    ends = np.fromfile(run / "losses/steps.bin", "<u8")
    train = [number for number, line in enumerate(lines) if json.loads(line).get("kind") != "val"]
    (early / "log.jsonl").write_text("".join(lines[: train[2]]))
    ends[:2].tofile(early / "losses/steps.bin")

    def then(out: Path, plan: TrainingPlan) -> Any:
        ends.tofile(out / "losses/steps.bin")
        return sum_losses(out, plan)

    monkeypatch.setattr(record, "sum_losses", then)
    assert json.loads(chattrain("losses", early, "--json"))["steps"] == [0, 3]


@pytest.mark.parametrize("at_once", [1, 1024])
def test_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Document 1 costs 3 nats per target where its step costs (12 + 2) / 8; NaN is counted, no target is no loss."""
    steps = {10: [(1, 12.0, 4), (2, 2.0, 4)], 11: [(3, math.nan, 9), (4, 0.0, 0)], 12: [(1, 3.0, 1), (2, 1.0, 1)]}
    written(tmp_path, [[losses, targets] for _, losses, targets in (zip(*s, strict=True) for s in steps.values())], 10)
    documents = {number: np.array([document for document, *_ in step]) for number, step in steps.items()}
    monkeypatch.setattr(record, "reads_of_step", lambda plan, step: SimpleNamespace(document=documents[step]))
    monkeypatch.setattr(record, "tasks_of_documents", lambda plan: (["b", "a"], np.array([0, 1, 0, 0, 1])))
    monkeypatch.setattr(record, "STEPS_AT_ONCE", at_once)
    split = SimpleNamespace(index_table=lambda: pa.table({"row": [0, 4, 0, 1, 5]}))
    sums = sum_losses(tmp_path, SimpleNamespace(split=split))  # type: ignore[arg-type]
    assert sums.by_task[:, 10].tolist() == [[2.0, 12.0], [4.0, 4.0]]
    found = summarise(sums)
    assert found == {
        "steps": [10, 12],
        "not_finite": 1,
        "tasks": {"a": {"first": 3.0, "middle": None, "last": 3.0}, "b": {"first": 0.5, "middle": None, "last": 1.0}},
        "hardest": [
            *({"doc": 1, "name": "a", "row": 4, "reads": 2, "loss": 15.0, "targets": 5, "above": 1.125, "mean": 3.0},),
            *({"doc": 2, "name": "b", "row": 0, "reads": 2, "loss": 3.0, "targets": 5, "above": -1.125, "mean": 0.6},),
        ],
    }
