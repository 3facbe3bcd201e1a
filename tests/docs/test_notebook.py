"""The notebook runs on the demo build."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat", reason="runs a notebook: uv sync")
NotebookClient = pytest.importorskip("nbclient", reason="runs a notebook: uv sync").NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_notebook_runs(demo_mid: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / "inspect_shards.ipynb", as_version=4)
    os.environ["CHATDATA_BUILD"] = str(demo_mid)
    try:
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    finally:
        del os.environ["CHATDATA_BUILD"]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
    html = "".join(output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert html.count("supervised (green)") >= 3 and "demo_math" in html
    assert not np.any([output.output_type == "error" for output in outputs])
