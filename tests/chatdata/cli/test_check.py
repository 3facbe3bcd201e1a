"""`chatdata verify` on the command line; what it finds is tested in check/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def test_verify_exit_code(demo_mid: Path, tmp_path: Path, chatdata: Callable) -> None:
    assert chatdata("verify", demo_mid).stdout == f"{demo_mid}: no damage found (quick)\n"
    broken = tmp_path / "broken"
    shutil.copytree(demo_mid, broken)
    path = broken / "train" / "mask-00000.npy"
    path.write_bytes(path.read_bytes()[:-5])
    result = chatdata("verify", broken)
    assert (result.returncode, result.stdout) == (3, f"{broken}: 1 problem (quick)\n")
    assert result.stderr.startswith(f"{path}: ")
    assert json.loads(chatdata("verify", broken, "--json").stdout)["problems"] == [result.stderr.strip()]
