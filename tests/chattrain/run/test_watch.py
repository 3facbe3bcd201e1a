"""A rank that ends first ends the others within seconds, with one line that names it and no traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux's pidfd")
LINE = "ended before the others, so this one ends, too: see what it printed"

# Ranks that have joined sum for ever. "deaf" ones hear nothing of a lost rank: on nccl all hang outside of Python.
SCRIPT = """
import sys, time
import click, torch
from chatdata.cli.command import run_command
from chattrain.errors import RunError
from chattrain.run.start import join_ranks

deaf, failing, finishing = (name in sys.argv for name in ("deaf", "failing", "finishing"))
sys.argv[1:] = ["work"]

@click.group()
def cli(): pass

@cli.command()
def work():
    with join_ranks("cpu") as ranks:
        print("joined", flush=True)
        sys.stdin.readline()
        if failing:
            raise RunError("a disk is full")
        if finishing:
            time.sleep(ranks.rank)  # rank 0 is done a second earlier, and waits
            return
        if deaf:
            time.sleep(100)
        while True:
            ranks.sum(torch.ones(3))

run_command(cli, "test", "interrupted")
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[object]:
    """ranks("deaf", "", …): one process each, all joined and waiting for a line of input."""
    started: list[subprocess.Popen[str]] = []

    def start(*kinds: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank, kind in enumerate(kinds):
            environment = {**os.environ, **where, "WORLD_SIZE": str(len(kinds)), "RANK": str(rank)}
            command, pipe = [sys.executable, "-c", SCRIPT, kind], subprocess.PIPE
            started.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "joined\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def go(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it said, apart from gloo's own warnings."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, "".join(line for line in errors.splitlines(True) if not line.startswith("["))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named(ranks, lost: int) -> None:
    processes = ranks("", "deaf", "") if lost != 1 else ranks("deaf", "", "")
    go(processes)
    time.sleep(0.5)
    processes[lost].send_signal(signal.SIGKILL)
    for rank, process in enumerate(processes):
        if rank != lost:
            code, said = ended(process)
            # a third rank's end may be seen first by one that gloo stopped a moment later
            assert (code, said.count("\n"), said.startswith("Error: rank")) == (1, 1, True), said
            assert said.endswith(f"{LINE}\n") and str(lost) in said


def test_a_rank_with_an_error_of_its_own(ranks) -> None:
    processes = ranks("failing", "")
    go(processes)
    assert ended(processes[0]) == (1, "Error: a disk is full\n")
    assert ended(processes[1]) == (1, f"Error: rank 0 {LINE}\n")


def test_ranks_that_are_done_at_different_times(ranks) -> None:
    processes = ranks("finishing", "finishing", "finishing")
    go(processes)
    assert [ended(process) for process in processes] == [(0, "")] * 3
