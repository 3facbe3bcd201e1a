"""`chateval watch`: every checkpoint is scored once, whatever is pruned, killed or started again meanwhile."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import chateval.ask.watch as chateval_watch
from chateval.ask.generate import Sampling
from chateval.ask.run import ScoringSettings
from chateval.ask.subject import load_subject
from chateval.ask.watch import watch
from chateval.errors import ResultsError
from chattrain.checkpoint import PlanRecord, Recipe, checkpoint_name, keep_last, read_checkpoint, save_checkpoint
from chattrain.errors import RunError
from chattrain.run.telemetry import RunRecord, lock_run, write_run

RECIPE = Recipe("random:d2", "mid", 40, 1.0, "float32", "raise", 42)
PLAN = PlanRecord("b" * 64, "train", "stream", "ignore", "plan", 64, 2, 42, None, None, None, 2, "a" * 64)
LOAD = partial(load_subject, device=torch.device("cpu"), dtype=None)
TASKS = ("demo_choice", "simple_spelling")


@pytest.fixture(scope="module")
def checkpoints(save_random, tmp_path_factory):
    """Step → a checkpoint that no run ever prunes."""
    folder, made = tmp_path_factory.mktemp("all"), {}
    config = read_checkpoint(path := save_random(folder / "first")).config
    for step in (10, 20, 30, 40):
        weights = read_checkpoint(save_random(folder / f"seed-{step}", seed=step)).weights()
        tensors = {"lm_head.weight/exp_avg": torch.zeros(1)}
        made[step] = save_checkpoint(folder, step, config, weights, tensors, {}, {}, path / "tokenizer")
    return made


@pytest.fixture
def run(tmp_path):
    write_run_of(tmp_path / "run")
    return tmp_path / "run"


def write_run_of(run: Path, **changes: Any) -> None:
    run.mkdir(exist_ok=True)
    write_run(run, RunRecord("data", PLAN, msgspec.structs.replace(RECIPE, **changes), save_every=10))


@pytest.fixture
def save(checkpoints, run):
    def into_run(*steps: int) -> None:
        for step in steps:
            shutil.copytree(checkpoints[step], run / "checkpoints" / checkpoint_name(step))

    return into_run


@pytest.fixture
def settings(tmp_path, words):
    sampling = Sampling(max_new_tokens=10)
    return ScoringSettings(TASKS, tmp_path / "scores", words=str(words), limit=6, batch_size=2, sampling=sampling)


def steps_of(found: Any) -> list[int]:
    return [results.step for results in found]


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_once_scores_what_is_there_and_only_once(chateval, run, save, words, tmp_path) -> None:
    save(10, 20)
    out = tmp_path / "scores"
    command = ["watch", run, "--tasks", ",".join(TASKS), "--words", words, "--limit", 6, "--max-new-tokens", 10]
    command += ["--once", "--out", out]
    result = chateval(*command)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("step 10: demo_choice ") and second.startswith("step 20: demo_choice ")
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "run.json", "scores.json", "scores.png", "step-00000010", "step-00000020",
    ]  # fmt: skip
    names = {"run.json", "items.jsonl", "results.json", "report.md", "scores.png"}
    assert {path.name for path in (out / "step-00000010").iterdir()} == names
    rows = json.loads((out / "scores.json").read_text())
    assert [(row["step"], row["task"], row["items"]) for row in rows] == [
        (10, "demo_choice", 6), (10, "simple_spelling", 6), (20, "demo_choice", 6), (20, "simple_spelling", 6),
    ]  # fmt: skip
    figures = json.loads((out / "step-00000020/results.json").read_text())
    assert figures["step"] == 20 and figures["checkpoint"] == str(run / "checkpoints/step-00000020")
    assert rows[2] == {"step": 20, "task": "demo_choice"} | {
        key: figures["tasks"]["demo_choice"][key]
        for key in ("items", "accuracy", "interval", "chance", "bits_per_byte")
    }
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    compared = chateval("compare", out / "step-00000010", out / "step-00000020")
    assert compared.returncode == 0 and "A: " in compared.stdout and "step 20" in compared.stdout
    before = files_of(out)
    again = chateval(*command, "--json")
    assert (again.returncode, again.stdout) == (0, "") and files_of(out) == before
    save(30)
    line = json.loads(chateval(*command, "--json").stdout)
    assert line == json.loads((out / "step-00000030/results.json").read_text())


def test_checkpoints_come_and_go(run, save, settings, monkeypatch, capsys) -> None:
    """Each wait is a step of the script. A run that does not exist, or was stopped, is waited for."""
    (run / "run.json").unlink()
    script = [
        lambda: write_run_of(run),
        lambda: save(10),
        lambda: None,  # stopped
        lambda: (save(30), keep_last(run, 1)),  # 20 was here while nobody looked
        lambda: save(40),
    ]
    monkeypatch.setattr(chateval_watch.time, "sleep", lambda duration_s: script.pop(0)())
    found = watch(run, settings, LOAD)
    assert next(found).step == 10
    assert next(found).step == 30
    assert steps_of(found) == [40] and not script
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"{run}: no run there yet (Ctrl-C ends)",
        f"{run}: waiting for its next checkpoint, until step-00000040 (Ctrl-C ends)",
    ]
    assert steps_of(watch(run, settings, LOAD)) == []  # finished


def test_what_was_pruned_is_named_once(run, save, settings, monkeypatch, capsys) -> None:
    save(30, 40)
    assert steps_of(watch(run, settings, LOAD, once=True)) == [30, 40]
    errors = capsys.readouterr().err
    assert errors.count("pruned before") == 1
    assert f"{run}: pruned before they could be copied: step-00000010, step-00000020\n" in errors


def test_a_checkpoint_that_is_pruned_while_it_is_copied(run, save, settings, monkeypatch, capsys) -> None:
    save(10, 20)
    link = os.link

    def prune_and_link(source: Path, target: Path) -> None:
        keep_last(run, 1)
        link(source, target)

    monkeypatch.setattr(os, "link", prune_and_link)
    assert steps_of(watch(run, settings, LOAD, once=True)) == [20]
    assert "pruned before they could be copied: step-00000010\n" in capsys.readouterr().err


def test_a_run_may_prune_while_its_checkpoints_are_scored(run, save, settings, monkeypatch) -> None:
    """What appears meanwhile is copied between two batches, so that slow scoring misses nothing."""
    save(10)
    score, later = chateval_watch.score, iter([20, 30, 40])

    def slow(subject: Any, settings: Any, ranks: Any, progress: Any) -> None:
        def show(*counts: Any) -> None:
            if (step := next(later, None)) is not None:
                save(step)
                progress(*counts)
                keep_last(run, 1)

        score(subject, settings, ranks, show)

    monkeypatch.setattr(chateval_watch, "score", slow)
    assert steps_of(watch(run, settings, LOAD)) == [10, 20, 30, 40]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000040"]


def test_the_last_copy_is_one_that_failed(run, save, settings, monkeypatch, capsys) -> None:
    """What is left of it is in nobody's way."""
    save(10)
    link, score = os.link, chateval_watch.score

    def vanish(source: Path, target: Path) -> None:
        shutil.rmtree(run / "checkpoints/step-00000020", ignore_errors=True)
        link(source, target)

    def score_and_save(*arguments: Any) -> None:
        save(20)
        monkeypatch.setattr(os, "link", vanish)
        score(*arguments)

    monkeypatch.setattr(chateval_watch, "score", score_and_save)
    assert steps_of(watch(run, settings, LOAD, once=True)) == [10]
    assert "pruned before they could be copied: step-00000020\n" in capsys.readouterr().err
    assert {path.name for path in settings.out.iterdir() if path.is_dir()} == {"step-00000010"}


@pytest.mark.parametrize("links", [True, False])
def test_files_are_linked_where_that_is_possible(run, save, settings, links, monkeypatch) -> None:
    save(10)
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EXDEV, "other device")))
    seen = []

    def load(copy: Path) -> Any:
        seen.append({str(path.relative_to(copy)): path.stat() for path in copy.rglob("*") if path.is_file()})
        return LOAD(copy)

    assert steps_of(watch(run, settings, load, once=True)) == [10]
    (files,) = seen
    assert "model.safetensors" in files and "optimizer.safetensors" not in files
    for name, stat in files.items():
        assert (stat.st_ino == (run / "checkpoints/step-00000010" / name).stat().st_ino) == links


def test_kill_9_in_the_middle(run, save, settings, words, tmp_path) -> None:
    """Killed while it copies, scores and draws; the run prunes meanwhile. Then it is as if it had never been killed."""
    save(10, 20)
    alone, killed = tmp_path / "alone", tmp_path / "scores"
    assert steps_of(watch(run, settings._replace(out=alone), LOAD, once=True)) == [10, 20]
    command = [sys.executable, "-m", "chateval", "watch", str(run), "--tasks", ",".join(TASKS), "--words", str(words)]
    command += ["--limit", "6", "--batch-size", "2", "--max-new-tokens", "10", "--device", "cpu", "--out", str(killed)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline, items = time.monotonic() + 120, killed / "step-00000010/items.jsonl"
    while process.poll() is None and time.monotonic() < deadline and not (items.is_file() and items.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    assert (killed / "step-00000010/checkpoint").is_dir()
    keep_last(run, 1)
    (killed / ".copy/checkpoint").mkdir(parents=True)  # killed while copying
    assert steps_of(watch(run, settings, LOAD, once=True)) == [10, 20]
    assert files_of(killed) == files_of(alone)


@pytest.mark.parametrize("name", ["write_report", "write_steps", "shutil.rmtree"])
def test_ended_between_any_two_steps(run, save, settings, name, monkeypatch, tmp_path) -> None:
    save(10)
    assert steps_of(watch(run, settings._replace(out=tmp_path / "alone"), LOAD, once=True)) == [10]
    with monkeypatch.context() as patch:

        def end(*paths: Any, **options: Any) -> None:
            if name != "shutil.rmtree" or (tmp_path / "scores/scores.json").exists():
                raise KeyboardInterrupt

        patch.setattr(f"chateval.ask.watch.{name}", end)
        with pytest.raises(KeyboardInterrupt):
            list(watch(run, settings, LOAD, once=True))
    shutil.rmtree(run / "checkpoints")
    list(watch(run, settings, LOAD, once=True))
    assert files_of(tmp_path / "scores") == files_of(tmp_path / "alone")


def test_scores_of_another_run_or_of_other_settings_are_refused(run, save, settings) -> None:
    save(10)
    list(watch(run, settings, LOAD, once=True))
    save(20)
    with pytest.raises(ResultsError, match=r"its items are of other tasks: .*items is 6, not 5.*; use another --out"):
        list(watch(run, settings._replace(limit=5), LOAD, once=True))
    with pytest.raises(ResultsError, match=r"of other settings: max_new_tokens is 10, not 9; use another --out"):
        list(watch(run, settings._replace(sampling=Sampling(max_new_tokens=9)), LOAD, once=True))
    write_run_of(run, seed=43)
    with pytest.raises(ResultsError, match=r"has scores of a run with another plan or recipe; use another --out"):
        list(watch(run, settings, LOAD, once=True))
    write_run_of(run)
    assert steps_of(watch(run, settings, LOAD, once=True)) == [20]


def test_two_watches_do_not_share_a_folder(run, save, settings) -> None:
    save(10)
    with lock_run(settings.out), pytest.raises(RunError, match="another run is writing there; wait for it, or choose"):
        list(watch(run, settings, LOAD, once=True))


def test_a_damaged_checkpoint_is_named(chateval, run, save, words, tmp_path) -> None:
    save(10)
    command = ["watch", run, "--tasks", "demo_choice", "--limit", 2, "--once", "--out", tmp_path / "scores"]
    checkpoint = run / "checkpoints/step-00000010"
    state = (checkpoint / "state.json").read_bytes()
    (checkpoint / "state.json").write_bytes(state[:10])
    result = chateval(*command)
    assert result.returncode == 1 and result.stderr.startswith(f"Error: {checkpoint}/state.json: ")
    (checkpoint / "state.json").write_bytes(state)
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:-4] + b"abcd")
    result = chateval(*command)
    copy = tmp_path / "scores/step-00000010/checkpoint/model.safetensors"
    assert result.returncode == 1 and result.stderr.startswith(f"Error: {copy}: SHA-256 differs from state.json's")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").write_bytes(whole)  # repaired: another file than the copy's
    assert chateval(*command).returncode == 0


def test_once_needs_a_run(chateval, tmp_path) -> None:
    result = chateval("watch", tmp_path / "none", "--tasks", "demo_choice", "--out", tmp_path / "scores", "--once")
    assert result.returncode == 1 and result.stderr.startswith(f"Error: {tmp_path}/none: not a run folder: ")
    assert not (tmp_path / "scores").exists()


def test_wrong_tasks_are_refused_before_there_is_a_checkpoint(chateval, tmp_path) -> None:
    for tasks, message in (("nmlu", 'no scored task "nmlu"'), ("humaneval", "pass --allow-code"), ("mmlu", "missing")):
        folders = ("--data-dir", tmp_path, "--out", tmp_path / "scores")
        result = chateval("watch", tmp_path / "none", "--tasks", tasks, *folders)
        assert result.returncode in (1, 2) and message in result.stderr


def test_ctrl_c(chateval, run, save, tmp_path, monkeypatch) -> None:
    save(10)
    monkeypatch.setattr(chateval_watch.time, "sleep", lambda duration_s: signal.raise_signal(signal.SIGINT))
    result = chateval("watch", run, "--tasks", "demo_choice", "--limit", 2, "--out", tmp_path / "scores")
    assert result.returncode == 130 and result.stdout.startswith("step 10: demo_choice ")
    assert result.stderr.endswith("Error: interrupted; the same command continues where it stopped\n")


def test_beside_a_real_run(chateval, demo_mid, tmp_path) -> None:
    """The run keeps one checkpoint; it is linked before the next one replaces it."""
    train = [sys.executable, "-m", "chattrain", "run", "--data", demo_mid, "--init", "random:1x32x2", "--seq-len", 64]
    train += ["--device-batch-size", 4, "--steps", 12, "--save-every", 3, "--keep-last", 1, "--out", tmp_path / "run"]
    process = subprocess.Popen([*map(str, train), "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        command = ["watch", tmp_path / "run", "--tasks", "demo_choice", "--limit", 10, "--out", tmp_path / "scores"]
        result = chateval(*command)
    finally:
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, result.returncode) == (0, 0), errors.decode() + result.stderr
    scored = {int(line.split(":")[0].removeprefix("step ")) for line in result.stdout.splitlines()}
    named = {
        int(step) for step in re.findall(r"step-(\d+)", result.stderr.partition("pruned before")[2].partition("\n")[0])
    }
    assert scored | named == {3, 6, 9, 12} and 12 in scored and not scored & named
