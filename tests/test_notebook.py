"""row_to_loss.ipynb and losses.ipynb run from any folder; the first gives the outputs committed with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="runs a notebook: uv sync")
NotebookClient = pytest.importorskip("nbclient", reason="runs a notebook: uv sync").NotebookClient

ROOT = Path(__file__).parent.parent
FRACTION = re.compile(r"\d+\.\d+")


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell shows, as text: figures by their MIME type, streams joined."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            data = [output.get("data", {"text/plain": output.get("text")}) for output in cell.outputs]
            kinds = [next(kind for kind in ("image/png", "text/html", "text/plain") if kind in d) for d in data]
            shown.append("".join(kind if kind == "image/png" else d[kind] for kind, d in zip(kinds, data, strict=True)))
    return shown


def test_row_to_loss(tmp_path: Path) -> None:
    """To update the outputs: uv run jupyter execute --inplace notebooks/row_to_loss.ipynb"""
    notebook = nbformat.read(ROOT / "notebooks" / "row_to_loss.ipynb", as_version=4)
    committed = outputs(notebook)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = outputs(notebook)
    # only the last digits of losses differ between machines
    assert [FRACTION.sub("#", text) for text in found] == [FRACTION.sub("#", text) for text in committed]
    numbers = [[float(number) for text in texts for number in FRACTION.findall(text)] for texts in (found, committed)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)
    assert len(numbers[0]) == 40 + 20 + 8 and "image/png" in found[-2]
    assert str(ROOT) not in "".join(committed)


def test_row_to_loss_says_what_the_loss_is() -> None:
    """In the committed outputs, nats ÷ targets is the mean, and train_step reports the same loss."""
    notebook = nbformat.read(ROOT / "notebooks" / "row_to_loss.ipynb", as_version=4)
    pattern = r"(mid|sft): ([\d.]+) nats ÷ (\d+) targets = ([\d.]+)\n.*\n +train_step: ([\d.]+)\n"
    stages = re.findall(pattern, outputs(notebook)[-1])
    assert [(stage, int(num_targets)) for stage, _, num_targets, _, _ in stages] == [("mid", 128), ("sft", 63)]
    for _, nats, num_targets, mean, of_step in stages:
        assert float(nats) / int(num_targets) == pytest.approx(float(mean), abs=1e-4)
        assert float(of_step) == pytest.approx(float(mean), abs=1e-4)


def test_losses(tmp_path: Path) -> None:
    """The planted wrong answers lead the list, and all that was not learnt is planted (the notebook asserts both)."""
    notebook = nbformat.read(ROOT / "notebooks" / "losses.ipynb", as_version=4)
    assert str(ROOT) not in "".join(outputs(notebook))
    for cell in notebook.cells:
        cell.pop("outputs", None)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streams = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stdout"]
    assert re.match(r"96 steps; 201 \+ 8 bytes a step", streams[0])
    assert re.match(r"the first ([89]|10) of 10 are planted, of 8 in 160 documents", streams[1])
    shown = outputs(notebook)
    assert "image/png" in shown and "numbers" in shown[-2]
