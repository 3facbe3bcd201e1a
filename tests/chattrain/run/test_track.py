"""Trackers hold the numbers of log.jsonl, each line once, also after a kill."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from chattrain.cli import main
from chattrain.run.track import ID_NAME, open_tracker

ROOT = Path(__file__).parents[3]
UV = os.environ.get("UV") or shutil.which("uv")  # `uv run` sets UV
RUN = {"data": "out/sft", "recipe": {"seed": 42}}


def train(step: int, loss: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss, "multiplier": 0.5, "tokens_per_s": 1e4, "mfu": "unknown"}


def val(step: int, bits: float) -> dict:
    tasks = {"gsm8k": bits, "my chats": bits / 2}
    return {"kind": "val", "step": step, "bits_per_byte": bits, "tasks": tasks}


FIRST = [val(0, 8.0), train(0, 5.5), train(1, 5.25), val(2, 6.0), train(2, 5.0)]  # and then it is killed
KEPT, SECOND = FIRST[:4], [train(2, 5.0), train(3, 4.75), val(4, 4.0)]  # the last checkpoint was at step 2


def numbers(line: dict) -> dict[str, float]:
    """As a tracker gets them."""
    kind, values = line["kind"], line | {f"tasks/{name}": bits for name, bits in line.get("tasks", {}).items()}
    return {f"{kind}/{key}": value for key, value in values.items() if key not in ("kind", "tasks", "mfu")}


def track(tracker: str, out: Path, past: list[dict], lines: Iterable[dict]) -> None:
    out.mkdir(exist_ok=True)
    with open_tracker(tracker, out, RUN, past) as send:
        for line in lines:
            send(line)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_old_option_names_the_new_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["chattrain", "run", "--tensorboard"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "Error: --tensorboard is now --track tensorboard\n" in capsys.readouterr().err


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "mid"
    track("tensorboard", out, [], FIRST)
    track("tensorboard", out, KEPT, SECOND)
    events = reader.EventAccumulator(str(out / "tensorboard")).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(0, 5.5), (1, 5.25), (2, 5.0), (3, 4.75)]
    assert found["val/bits_per_byte"] == [(0, 8.0), (2, 6.0), (4, 4.0)]
    assert found["val/tasks/my chats"] == [(0, 4.0), (2, 3.0), (4, 2.0)]
    assert found.keys() == {*numbers(train(0, 0.0)), *numbers(val(0, 0.0))}


TRACKIO = """
import json, sys
from pathlib import Path
from chattrain.run.track import open_tracker

for out, run, past, lines in json.loads(sys.argv[1]):
    Path(out).mkdir(parents=True, exist_ok=True)
    with open_tracker("trackio", Path(out), run, past) as send:
        for line in lines:
            send(line)
"""


@pytest.mark.skipif(UV is None, reason="uv is not installed")
def test_trackio(tmp_path: Path) -> None:
    """In an environment of its own, with the pillow that it asks for: the lock has a newer one."""
    a, b = tmp_path / "a/mid", tmp_path / "b/mid"  # two runs of one name
    calls = [[str(a), RUN, [], FIRST], [str(b), RUN, [], FIRST], [str(a), RUN, KEPT, SECOND]]
    command = [str(UV), "run", "-q", "--no-project", "--python", sys.executable, "--with", "trackio>=0.43"]
    variables = {"PYTHONPATH": str(ROOT / "packages/chattrain/src"), "TRACKIO_DIR": str(tmp_path / "store")}
    for offline in (["--offline"], []):  # a warm cache is enough
        words = [*command, *offline, "python", "-c", TRACKIO, json.dumps(calls)]
        result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **variables}, timeout=300)
        if result.returncode == 0:
            break
    assert (result.returncode, result.stdout) == (0, ""), result.stderr  # what it prints is in the way of --json
    with sqlite3.connect(tmp_path / "store" / "chattrain.db") as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        configs = store.execute("SELECT config FROM configs").fetchall()
    for out, lines in ((a, KEPT + SECOND), (b, FIRST)):
        name = f"mid-{(out / ID_NAME).read_text()}"
        found = [(step, json.loads(metrics)) for run, step, metrics in rows if run == name]
        assert found == [(line["step"], numbers(line)) for line in lines]
    assert len(rows) == len(KEPT + SECOND + FIRST) and {json.loads(c)["data"] for (c,) in configs} == {"out/sft"}


def test_wandb(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "mid"
    track("wandb", out, [], FIRST)
    track("wandb", out, KEPT, SECOND)
    run_id = (out / ID_NAME).read_text()
    files = sorted(out.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 30
    while min(file.stat().st_size for file in files) < 500 and time.monotonic() < deadline:
        time.sleep(0.05)  # a process of its own writes
    data = files[-1].read_bytes()
    assert all(name.encode() in data for line in KEPT + SECOND for name in numbers(line))
    assert capfd.readouterr().out == "", "it would be in the way of --json"
