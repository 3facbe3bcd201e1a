"""The page of a run: its numbers, what is said where something is missing, and what it does in a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import vl_convert

from chatdata.errors import ChatdataError, UsageError
from chatdata.progress import no_progress
from chattrain.errors import RunError
from chattrain.report.page import jumps_of, parts_of, write_report
from chattrain.run.losses import READ
from chattrain.run.telemetry import TrainEntry


def entry(step: int, loss: float, **values: Any) -> TrainEntry:
    counts = {"tokens": 10, "targets": 4, "memory_bytes": 1, "batch": ""}
    figures = {"multiplier": 1.0, "gradient_norm": 2.0, "tokens_per_s": 5.0, "mfu": "unknown", "data_wait_share": 0.5}
    return TrainEntry(**{**counts, **figures, **values}, step=step, loss=loss)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures and Vega, which take seconds."""
    monkeypatch.setattr(vl_convert, "vegalite_to_svg", lambda *_, **__: "<svg></svg>")
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *_, **__: "")


def text_of(page: Path) -> str:
    body = page.read_text().partition("<body>")[2].partition('<script type="application/json"')[0]
    return " ".join(html.unescape(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", body, flags=re.DOTALL)).split())


def report(run: Path, out: Path, data: str | None = None) -> tuple[dict[str, Any], str]:
    return write_report(run, out, data, no_progress), text_of(out)


def test_parts_of_a_log() -> None:
    train = [
        entry(0, 3.0),
        entry(1, math.nan, skipped=True, gradient_norm=math.inf),
        entry(2, 1.0, targets=12, mfu=0.5),
    ]
    means = {"multiplier": 1.0, "gradient_norm": 2.0, "tokens_per_s": 5.0, "data_wait_share": 0.5}
    (whole,) = parts_of(train, None, 1)
    assert whole == {"step": 0, "last": 2, "loss": 24 / 16, "low": 1.0, "high": 3.0, "tasks": [], "mfu": 0.5, **means}
    parts = parts_of(train, None, 200)
    assert [(part["step"], part["last"], part["loss"]) for part in parts] == [(0, 0, 3.0), (1, 1, None), (2, 2, 1.0)]
    assert (parts[1]["low"], parts[1]["gradient_norm"], parts[1]["mfu"]) == (None, None, None)
    assert parts_of([], None, 200) == []


def test_jumps() -> None:
    """Around a median of 2.0 the MAD is 0.1: a deviation is 0.14826, six are 0.89."""
    losses = [2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.85, 2.0, 3.0, math.inf, 2.0]
    found = jumps_of([entry(step, loss) for step, loss in enumerate(losses)])
    assert [(jump["step"], jump["loss"], jump["expected"]) for jump in found] == [(11, None, None), (10, 3.0, 2.0)]
    assert found[1]["deviations"] == pytest.approx(1 / 0.14826)
    assert jumps_of([entry(0, 9.0), *[entry(step, 1.0) for step in range(1, 8)], entry(8, 2.0)]) != []
    assert jumps_of([entry(step, 1.0) for step in range(7)] + [entry(7, 9.0)]) == []  # too few to tell
    assert jumps_of([entry(step, 10 / (step + 1)) for step in range(60)]) == []
    assert [jump["step"] for jump in jumps_of([entry(0, math.nan)])] == [0]


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("reports") / "run.html"
    return report(run, out)[0], out


def test_what_the_page_says(made: tuple[dict[str, Any], Path], build: Path) -> None:
    facts, page = made
    text = text_of(page)
    (damage,) = facts["missing"]  # the fixture doubled a loss in the log, to make a jump
    assert damage.startswith("step 20: the loss record has ") and damage.endswith("; one is damaged")
    assert facts["bytes"] == len(page.read_bytes())
    for words in (
        "<i>run&lt; Stage sft from random:d1 : finished, 24 steps.",
        "90,112 parameters, 1 layers of width 64, float32, from random:d1",
        "device cpu, 1 rank, 4 sequences at a time layout pack, mask apply, 8 sequences of 64 positions a step",
        f"after steps 8, 16, 24 build {facts['run']['plan']['build_id'][:12]} train, {build}",
        "targets of 140 documents left out of an epoch",
        "mixture, by tokens identity 5",
        "Entries of the build: 2",
        "task step 0 step 12 step 24 all ",
        "Each step is drawn.",
        "1 step of 24. Step 20: loss",
        "Replayed losses equal the record: the sums of all",
        "Model FLOPs utilisation is unknown on this device",
    ):
        assert words in text
    (jump,) = facts["jumps"]
    assert jump["step"] == 20 and len(jump["documents"]) == 4
    above = [read["above"] for read in jump["documents"]]
    assert above == sorted(above, reverse=True)
    first, *others = facts["replays"]["shown"]
    assert {read["why"] for read in (first, *others)} == {"its step's loss jumped", "one of the hardest documents"}
    hardest = [found["above"] for found in facts["summary"]["hardest"]]
    assert hardest == sorted(hardest, reverse=True)


@pytest.mark.usefixtures("quick")
def test_what_is_missing_is_said(run: Path, build: Path, tmp_path: Path) -> None:
    old, out = shutil.copytree(run, tmp_path / "old"), tmp_path / "old.html"
    record = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**record, "data": str(tmp_path / "gone"), "machine": {}}))
    facts, text = report(old, out)
    assert "no tasks, documents or texts: " in facts["missing"][0] in text
    assert "loss" in {key for part in facts["points"] for key in part} and facts["summary"] is None
    assert "not recorded by the chattrain that began this run" in text and "Its documents are unknown" in text
    with pytest.raises(ChatdataError, match="gone"):
        report(old, out, str(tmp_path / "gone"))
    shutil.rmtree(old / "checkpoints")
    shutil.rmtree(old / "losses")
    facts, text = report(old, out, str(build))
    whats = [line.partition(":")[0] for line in facts["missing"]]
    assert whats == ["no losses of tasks and documents"]
    lines = (old / "log.jsonl").read_text().splitlines()
    (old / "log.jsonl").write_text("\n".join([*lines[:2], lines[2].replace('"loss": ', '"loss": NaN, "x": ')[:60]]))
    facts, text = report(old, out, str(build))
    assert "not finished, 1 of 24 steps; the log was last written on 20" in text and "There is one validation" in text
    (old / "log.jsonl").unlink()
    assert "there is no log" in report(old, out, str(build))[1]


@pytest.mark.usefixtures("quick")
def test_losses_that_were_not_finite_but_are_when_replayed(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    reads = np.fromfile(other / "losses/reads.bin", READ)
    reads["loss"] = np.nan
    reads.tofile(other / "losses/reads.bin")
    (other / "log.jsonl").write_text(re.sub('"loss": [^,]+', '"loss": NaN', (other / "log.jsonl").read_text()))
    facts, text = report(other, tmp_path / "other.html")
    assert facts["replays"]["reads"] == facts["replays"]["unequal"] > 0 and "are close to the record" in text


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_of_a_gpu_is_not_replayed_on_a_cpu(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"machine": record["machine"] | {"device": "cuda"}}))
    facts, _ = report(other, tmp_path / "other.html")
    assert facts["replays"] is None and facts["missing"][-1].startswith("no losses of tokens: device 'cuda' is not ava")


@pytest.mark.usefixtures("quick")
def test_steps_that_are_not_finite_or_skipped(run: Path, tmp_path: Path) -> None:
    broken, out = shutil.copytree(run, tmp_path / "broken"), tmp_path / "broken.html"
    entries = [entry(step, math.nan if step > 2 else 1.0, skipped=step > 2) for step in range(5)]
    lines = [json.dumps(msgspec.to_builtins(each)) for each in entries]
    (broken / "log.jsonl").write_text("\n".join(lines) + "\n")
    facts, text = report(broken, out)
    assert "2 skipped; 2 with a loss that is not finite" in text and "Step 3: the loss is not finite" in text
    assert "No validation is in the log" in text
    assert [jump["step"] for jump in facts["jumps"]] == [3, 4]


@pytest.mark.usefixtures("quick")
def test_where_the_page_goes(run: Path, tmp_path: Path, chattrain: Callable[..., str]) -> None:
    small = shutil.copytree(run, tmp_path / "small", ignore=shutil.ignore_patterns("checkpoints", "losses"))
    other = tmp_path / "notes.md"
    other.write_text("mine")
    with pytest.raises(UsageError, match=r"notes.md is a file that is not a report; choose another name"):
        chattrain("report", small, "--out", other)
    with pytest.raises(RunError, match="not a run folder"):
        chattrain("report", tmp_path)
    printed = chattrain("report", small).splitlines()
    assert printed[0].startswith("no losses of tasks and documents: ") and printed[-1].startswith(
        f"{small}-report.html: "
    )
    assert json.loads(chattrain("report", small, "--json"))["out"] == f"{small}-report.html"


# In a browser
def test_in_a_browser(browser: Any, made: tuple[dict[str, Any], Path]) -> None:
    facts, page = made
    for width, dark in ((1280, False), (500, True)):
        browser.open(page.as_uri(), width=width, dark=dark)
        browser.wait_for_charts()
        browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
        assert browser.axe() == []
        assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelector('h1').textContent") == "<i>run&lt;"
    assert browser.run("document.querySelectorAll('.chart').length") == 1 + 2 + 3 + 4
    assert [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")] == [page.as_uri()]
    assert browser.said("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.tabIndex)"
    assert set(browser.run(wide)) == {0}
    shown = sorted(facts["replays"]["shown"], key=lambda read: read["why"])
    losses = [cell["loss"] for read in shown for cell in read["cells"] if cell["loss"] is not None]
    assert browser.run("[...document.querySelectorAll('rt')].map(e => e.textContent)") == [f"{x:.1f}" for x in losses]
    assert browser.run("[...document.querySelectorAll('ruby')].map(e => e.title)") == [f"{x:.3f} nats" for x in losses]


def test_printed_and_without_javascript(browser: Any, made: tuple[dict[str, Any], Path]) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(made[1].as_uri(), width=500, dark=True)
        pictures = browser.run("[...document.querySelectorAll('.chart > svg')].map(e => e.checkVisibility())")
        assert pictures == [True] * 10 and browser.run("document.documentElement.scrollWidth") == 500
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.run("getComputedStyle(document.querySelector('ruby')).printColorAdjust") == "exact"
        assert browser.run("getComputedStyle(document.querySelector('.h5, .h4')).backgroundColor") != "rgba(0, 0, 0, 0)"
        hidden = "[...document.querySelectorAll('.tokens')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
        assert browser.run(hidden) == 0
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
