"""No file ends a command with a traceback, a hang, or memory that it does not explain (benchmarks/fuzz.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def test_damaged_files(tmp_path: Path) -> None:
    """The first 100 tries, or as many as 30 s allow. A process of its own, because it forks."""
    for package in ("altair", "datasets", "matplotlib", "rustbpe", "tokenizers"):
        pytest.importorskip(package, reason="the fuzzer runs every command")
    command = [sys.executable, str(FUZZ), "--tries", "100", "--seconds", "30", "--show"]
    command += ["--work", str(tmp_path / "fuzz")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-10_000:] + ended.stderr[-3_000:]
    assert "traceback 0, killed 0, hang 0, memory 0, escape 0, form 0" in ended.stdout
    tries = re.search(r"^all +(\d+)", ended.stdout, re.MULTILINE)
    assert tries is not None and int(tries[1]) >= 3
