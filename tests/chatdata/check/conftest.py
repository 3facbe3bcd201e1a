"""A small build, and ways to change it so that only verify's deeper levels can tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatdata.build.plan import make_build_plan
from chatdata.build.run import build
from chatdata.disk import write_json
from chatdata.recipe import load_recipe
from chatdata.shards.index import index_schema
from chatdata.shards.manifest import build_id_of
from chatdata.sources.find import Locations
from chatdata.tasks import load_tasks
from chatdata.tokenizer.bpe import Tokenizer

TOOL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "2+3"},
    {"type": "python_output", "text": "5"},
    {"type": "text", "text": "five"},
]
RECIPE = """
stage = "sft"
max_tokens = 40
overflow = "truncate"
zero_supervised = "drop"
[[train]]
task = "conversations"
path = "c.jsonl"
[[train]]
task = "identity"
path = "i.jsonl"
epochs = 2
[[val]]
task = "conversations"
path = "c.jsonl"
rows = 4
"""


def chat(user: str, *answers: Any) -> list[dict[str, Any]]:
    turns = [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}] for answer in answers]
    return [message for turn in turns for message in turn]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources and a recipe: tool calls, several turns, documents cut by max_tokens, one dropped, one on a user turn."""
    lines = [chat("x" * n, TOOL, "y" * n) for n in range(1, 9)] + [chat("u" * 60, "gone"), chat("q", "a")]
    lines.append([*chat("q", "a"), {"role": "user", "content": "more?"}])
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(chat("who?", f"me {i}")) + "\n" for i in range(5)))
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def _build_in(folder: Path, tokenizer: Tokenizer, out: str = "out") -> Path:
    tasks = load_tasks()
    plan = make_build_plan(load_recipe(str(folder / "r.toml"), tasks), tasks, tokenizer, Locations(folder))
    build(plan, folder / out)
    return folder / out


@pytest.fixture
def built(folder: Path, byte_tokenizer: Tokenizer) -> Path:
    return _build_in(folder, byte_tokenizer)


def _edit(built: Path, change: Callable[[dict[str, Any]], None], split: str = "train") -> None:
    """Let `change` edit tokens, mask, offsets and index (a list of rows) of a shard; write and sign it all again, so
    that nothing but the contract can find the change."""
    folder = built / split
    arrays: dict[str, Any] = {
        kind: np.array(np.load(folder / f"{kind}-00000.npy")) for kind in ("tokens", "mask", "offsets")
    }
    arrays["index"] = pq.ParquetFile(folder / "index-00000.parquet").read().to_pylist()
    change(arrays)
    for kind in ("tokens", "mask", "offsets"):
        np.save(folder / f"{kind}-00000.npy", arrays[kind])
    pq.write_table(pa.Table.from_pylist(arrays["index"], schema=index_schema()), folder / "index-00000.parquet")
    _sign(built)


def _sign(built: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Sizes, hashes and sums of the manifest as the files now have them, then build_id."""
    manifest = json.loads((built / "manifest.json").read_text())
    change(manifest)
    for name, split in manifest["splits"].items():
        for shard in split["shards"]:
            for record in shard["files"].values():
                content = (built / name / record["file"]).read_bytes()
                record |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest["build_id"] = build_id_of(manifest)
    write_json(built / "manifest.json", manifest)


@pytest.fixture
def build_in() -> Callable[..., Path]:
    """build_in(folder, tokenizer, out="out"): the build of the recipe in `folder`."""
    return _build_in


@pytest.fixture
def edit() -> Callable[..., None]:
    """edit(built, change, split="train"): see `_edit`."""
    return _edit


@pytest.fixture
def sign() -> Callable[..., None]:
    """sign(built): see `_sign`."""
    return _sign
