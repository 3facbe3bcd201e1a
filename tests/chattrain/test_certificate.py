"""The same model and documents give the same loss through every export (benchmarks/peers/certificate.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from chatdata.shards.read import open_build

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def certificate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("certificate", PEERS / "certificate.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["certificate"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_every_export_has_the_loss_of_the_build(certificate: ModuleType, demo_work: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trains with trl: uv sync")
    build = open_build(demo_work / "out" / "demo-sft")
    split = build["train"]
    supervised = {name: int(part.mask(0, part.num_tokens).sum()) for name, part in build.splits.items()}
    assert certificate.export_all(build, tmp_path) == dict.fromkeys(
        ("datasets", "olmo", "megatron"), sum(supervised.values())
    )
    model = tmp_path / "model"
    config, weights = certificate.small_model(split, model)
    rows = [certificate.by_chattrain(split, config, weights, layout) for layout in ("pad", "pack")]
    rows.append(certificate.by_trl(tmp_path / "datasets", "train", model, tmp_path / "trl"))
    documents = list(certificate.olmo_layout(tmp_path / "olmo" / "train", "<u2"))
    rows.append(certificate.by_transformers("olmo", documents, model))
    assert (rows[0].documents, rows[0].targets) == (len(split), supervised["train"])
    assert certificate.disagreements(rows) == []

    # one mask that is shifted already is enough to fail
    tokens, mask = documents[0]
    documents[0] = tokens, mask[[*range(1, len(mask)), 0]]
    (shifted,) = certificate.disagreements([rows[0], certificate.by_transformers("shifted", documents, model)])
    assert shifted.startswith(f"shifted: {len(split):,} documents, {supervised['train']:,} targets, loss ")
