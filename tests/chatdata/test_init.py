"""The packages as a bare machine has them: source code or unpacked wheels on PYTHONPATH, without installed metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import chatdata

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def without_metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment for `python -S`, which reads no site-packages: nothing there is of ours."""
    folder = tmp_path_factory.mktemp("libraries")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(("chatdata-", "chattrain-", "chateval-")):
            (folder / path.name).symlink_to(path)
    sources = [ROOT / "packages" / name / "src" for name in ("chatdata", "chattrain", "chateval")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*sources, folder]))}


def run(package: str, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-S", "-c", f"from {package}.cli import main; main()", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("package", ["chatdata", "chattrain", "chateval"])
def test_every_command_starts_without_metadata(package: str, without_metadata: dict[str, str]) -> None:
    assert run(package, without_metadata, "--version") == f"{package}, version unknown\n"


def test_a_build_without_metadata(without_metadata: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    build = ["build", "--stage", "mid", "--demo", "--limit", "5", "--workers", "1", "--out", str(out)]
    run("chatdata", without_metadata, *build)
    assert json.loads((out / "report.json").read_text())["versions"]["chatdata"] == "unknown"


def test_the_installed_version() -> None:
    assert chatdata.version_of("chatdata") == chatdata.__version__ == "0.1.0"
    assert chatdata.version_of("no-such-package") == "unknown"
