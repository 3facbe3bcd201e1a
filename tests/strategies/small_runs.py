"""A small build to train on, and what must hold for the loss record of any run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.recipe import load_recipe
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, append_special_tokens
from chattrain.run.telemetry import TrainEntry, read_log

BYTES = {bytes([byte]): byte for byte in range(256)}


def write_build(folder: Path, stage: str, num: int = 90, seed: int = 0) -> Path:
    """Short conversations of two tasks under a byte tokenizer (265 entries), with a val split."""
    draw = random.Random(seed)

    def chat() -> list[dict]:
        user, answer = ("".join(draw.choices("abcdef ", k=draw.randint(1, 20))) for _ in range(2))
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    folder.mkdir(parents=True)
    for name in ("c", "i"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat()) + "\n" for _ in range(num)))
    entries = "".join(
        f'[[{split}]]\ntask = "{task}"\npath = "{path}"\n{key} = {num - 20}\n'
        for split, key in (("train", "stop"), ("val", "start"))
        for task, path in (("conversations", "c.jsonl"), ("identity", "i.jsonl"))
    )
    (folder / "r.toml").write_text(f'stage = "{stage}"\n{entries}')
    tasks = load_tasks()
    recipe = load_recipe(str(folder / "r.toml"), tasks)
    tokenizer = Tokenizer(BYTES, SPLIT_PATTERN, append_special_tokens(BYTES), "bytes")
    build(make_build_plan(recipe, tasks, tokenizer, Locations(folder)), folder / "build", decontaminate="off")
    return folder / "build"


def record_of(out: Path) -> list[bytes]:
    return [(out / "losses" / name).read_bytes() for name in ("reads.bin", "steps.bin")]


def check_record(out: Path) -> None:
    """The record's sums and counts of every step are the log's loss · targets and targets."""
    reads = np.fromfile(out / "losses/reads.bin", [("loss", "<f4"), ("targets", "<u4")])
    steps = np.split(reads, np.fromfile(out / "losses/steps.bin", "<i8"))
    assert not len(steps.pop())
    logged = [entry for entry in read_log(out) if isinstance(entry, TrainEntry)]
    assert [int(step["targets"].sum()) for step in steps] == [entry.targets for entry in logged]
    sums = [step["loss"].sum(dtype=float) for step in steps]
    assert sums == pytest.approx([entry.loss * entry.targets for entry in logged], rel=1e-6)
