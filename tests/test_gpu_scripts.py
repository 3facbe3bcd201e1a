"""benchmarks/gpu on a CPU at toy size: what prepare.sh carries, what run.sh prints, and that a failure is seen."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "benchmarks" / "gpu"
UV = os.environ.get("UV") or shutil.which("uv")

pytestmark = pytest.mark.skipif(UV is None, reason="uv, which builds the wheels, is not installed")


def call(*command: object) -> subprocess.CompletedProcess[str]:
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "UV": str(UV)}
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= own | {"PYTHON": sys.executable, "UV_OFFLINE": "1"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that prepare.sh makes."""
    folder = tmp_path_factory.mktemp("gpu") / "carried"
    result = call(SCRIPTS / "prepare.sh", "--toy", folder)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"{folder}: \d MiB; copy it to the GPU machine and call run.sh there", result.stdout.strip())
    again = call(SCRIPTS / "prepare.sh", "--toy", folder)
    assert (again.returncode, again.stderr) == (
        1,
        f"Error: {folder}: already exists; choose another OUT, or remove it\n",
    )
    return folder


@pytest.fixture(scope="module")
def parts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_parts", SCRIPTS / "parts.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["gpu_parts"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def results(printed: str) -> list[list[str]]:
    """[part, what, result] of the lines."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_what_is_carried(carried: Path) -> None:
    assert sorted(path.name for path in carried.iterdir() if path.name != "golden") == [
        *("mid", "parts.py", "run.sh", "sft", "wheels")
    ]
    wheels = sorted(path.name.split("-")[0] for path in (carried / "wheels").iterdir())
    assert wheels == ["chatdata", "chateval", "chattrain"]


# each says enough to know that it did its work; on the CPU nothing differs
EXPECTED: dict[str, list[str]] = {
    "equality": [r"packed attention, flex and split, bf16: hidden", r"draws that differ", r"3 steps of sft, pad"],
    "resume": [r"batches that differ 0\.0e\+00, at most 0e\+00: ok", r"loss 0\.0e\+00"],
    "speed": [rf"1x32x1 {layout} 2 × 1024 [\d,]+ tokens/s, MFU" for layout in ("stream", "pack", "pad")],
    "generation": [rf"{how} [\d,]+ tokens/s" for how in ("greedy", "best 50", "drawn")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_part(name: str, parts: ModuleType, carried: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, where torch is loaded."""
    assert parts.main([name, str(carried), "--toy"]) == 0
    found = [" ".join(cells[1:]) for cells in results(capsys.readouterr().out) if cells[0] == name]
    for pattern in EXPECTED[name]:
        assert any(re.search(pattern, line) for line in found), found
    assert not any("FAILED" in line for line in found)


def test_a_wrong_result_is_seen(
    parts: ModuleType, carried: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable = parts.chunked_loss
    monkeypatch.setattr(parts, "chunked_loss", lambda *given, **more: right(*given, **more) * 1.01)
    monkeypatch.setattr(parts, "golden_logits", lambda part: part.check("not a number", float("nan"), 1e-4))
    monkeypatch.setattr(parts, "steps_as_on_the_cpu", lambda part: None)
    assert parts.main(["equality", str(carried), "--toy"]) == 1
    wrong = [cells[1] for cells in results(capsys.readouterr().out) if "FAILED" in cells[2]]
    assert "not a number" in wrong and "chunked loss, eager, float32: value" in wrong


def test_run_prints_a_table_whatever_fails(carried: Path, tmp_path: Path) -> None:
    """The loss needs no build; generation fails without one, and the table still has both."""
    folder = tmp_path / "carried"
    shutil.copytree(carried, folder)
    (folder / "mid" / "manifest.json").unlink()
    result = call(folder / "run.sh", "--toy", "generation", "loss")
    assert result.returncode == 1
    _, table = result.stdout.split("| part | what | result |\n|---|---|---|\n")
    lines = results(table)
    assert ["generation", "ended with exit code 1", "FAILED"] in lines
    assert any(part == "loss" and what == "64 targets, width 32, eager" for part, what, _ in lines)
    assert "manifest.json" in result.stderr
    assert not any(part == "loss" and "FAILED" in result for part, _, result in lines)


def test_unknown_parts_are_refused(carried: Path) -> None:
    result = call(carried / "run.sh", "--toy", "sped")
    assert result.returncode == 2 and result.stderr.startswith("Error: no part sped; parts: ")
