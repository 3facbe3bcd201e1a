"""What people install: the three wheels, and chatdata alone in an otherwise empty environment.

Versions come from the lock file, so a warm uv cache is enough; with a cold one the package registry must be reachable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("chatdata", "chattrain", "chateval")
UV = os.environ.get("UV") or shutil.which("uv")  # `uv run` sets UV

pytestmark = pytest.mark.skipif(UV is None, reason="uv is not installed")


def uv(*arguments: object) -> str:
    """What uv prints. Offline first: that asks no server for newer versions."""
    for more in (["--offline"], []):
        command = [str(UV), *map(str, arguments), *more]
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
        if result.returncode == 0:
            return result.stdout
    raise AssertionError(f"{' '.join(command)}\n{result.stderr}")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package → its wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    uv("build", "--all-packages", "--wheel", "--out-dir", folder)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def clean(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with chatdata's wheel and its dependencies.

    The other two wheels are installed without theirs: --version and --help must not load torch.
    """
    folder = tmp_path_factory.mktemp("clean")
    locked = uv("export", "--frozen", "--package", "chatdata", "--no-dev", "--no-emit-workspace", "--no-hashes", "-q")
    (folder / "lock.txt").write_text(locked)
    uv("venv", "--python", sys.executable, folder / "env")
    into = ["--python", folder / "env"]
    uv("pip", "install", *into, wheels["chatdata"], "--constraints", folder / "lock.txt")
    uv("pip", "install", *into, "--no-deps", wheels["chattrain"], wheels["chateval"])
    return folder / "env"


def run(environment: Path, command: str, *arguments: object) -> str:
    """What a command of the environment prints, run outside the working tree."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(environment / "bin" / command), *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, cwd=environment, env=variables, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheels_hold_every_file_of_their_package(wheels: dict[str, Path]) -> None:
    assert sorted(wheels) == sorted(PACKAGES)
    for package, path in wheels.items():
        source = ROOT / "packages" / package / "src"
        expected = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
        expected = {name for name in expected if "__pycache__" not in name}
        with zipfile.ZipFile(path) as wheel:
            held = {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
            licences = [wheel.read(name) for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert held == expected
        assert licences == [(ROOT / "LICENSE").read_bytes()]
        assert f"{package}/py.typed" in held
    with zipfile.ZipFile(wheels["chatdata"]) as wheel:
        held = set(wheel.namelist())
    stages = ("base", "mid", "sft", "nanochat-2025-12-mid", "nanochat-2025-12-sft")
    assert held >= {f"chatdata/recipes/{stage}.toml" for stage in stages}
    assert held >= {"chatdata/tokenizer/chat_template.jinja", "chatdata/demo/demo-mid.toml", "chatdata/demo/words.txt"}


def test_the_metadata_says_what_is_needed(wheels: dict[str, Path]) -> None:
    needs = {}
    for package, path in wheels.items():
        with zipfile.ZipFile(path) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(wheel.read(name).decode())
        assert (metadata["Name"], metadata["Requires-Python"]) == (package, ">=3.11")
        assert metadata["Summary"] and metadata["License-Expression"] == "MIT"
        always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
        needs[package] = {re.match(r"[A-Za-z0-9._-]+", need)[0] for need in always}  # type: ignore[index]
    assert "torch" not in needs["chatdata"] and {"chatdata", "torch"} <= needs["chattrain"]
    assert {"chatdata", "chattrain", "torch"} <= needs["chateval"]


def test_chatdata_alone_builds_the_demo_without_torch(clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    printed = run(clean, "chatdata", "build", "--stage", "mid", "--demo", "--limit", 20, "--out", out, "--json")
    assert json.loads(printed.splitlines()[-1])["splits"]["train"]["documents"] > 20
    code = (
        "import chatdata; from importlib.util import find_spec\n"
        f"print(chatdata.__file__, find_spec('torch'), len(chatdata.open_build({str(out)!r})['train']))"
    )
    where, torch, num_documents = run(clean, "python", "-c", code).split()
    assert Path(where).is_relative_to(clean) and torch == "None" and int(num_documents) > 20


@pytest.mark.parametrize("package", PACKAGES)
def test_every_command_says_its_version(clean: Path, wheels: dict[str, Path], package: str) -> None:
    version = wheels[package].name.split("-")[1]
    assert run(clean, package, "--version") == f"{package}, version {version}\n"
    assert "Examples:" in run(clean, package, "build" if package == "chatdata" else "run", "--help")


def test_every_hint_to_install_something_works_in_a_clone() -> None:
    """`uv sync --extra NAME` in messages and pages: uv has that extra. On the public index our names are others'."""
    folders = [ROOT / name for name in ("packages", "docs", "tests")]
    paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md")]
    texts = [path.read_text(encoding="utf-8") for path in (*paths, *ROOT.glob("*.md"))]
    extras = {extra for text in texts for extra in re.findall(r"uv sync --extra ([a-z]+)", text)}
    assert extras >= {"fast", "plot", "ray", "report", "tensorboard", "trackio", "wandb"}
    for extra in extras:
        uv("sync", "--dry-run", "--locked", "--extra", extra)
    assert not [text for text in texts for name in PACKAGES if f"pip install {name}" in text]


def test_another_project_depends_on_the_git_url(tmp_path: Path) -> None:
    """The README's `uv add "chatdata @ git+https://…#subdirectory=…"`, with this repository as the address."""
    (line,) = re.findall(r"^    uv add \"(chatdata @ git\+https://\S+)\"$", (ROOT / "README.md").read_text(), re.M)
    requirement = line.replace("https://HOST/OWNER/REPO", ROOT.as_uri())
    uv("venv", "--python", sys.executable, tmp_path / "env")
    uv("pip", "install", "--python", tmp_path / "env", "--no-deps", requirement)
    version = "from importlib.metadata import version; print(version('chatdata'))"
    assert run(tmp_path / "env", "python", "-c", version).strip() == "0.1.0"
