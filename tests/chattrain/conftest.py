"""Splits made in memory from literal documents, and the golden builds (see tests/conftest.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatdata.shards.read import Build, Split, open_build
from chattrain.model import ModelConfig, initial_weights, load_model

ROOT = Path(__file__).parents[2]
PADDING = 9  # the id of <|assistant_end|> in splits made here


@dataclass(frozen=True)
class MemorySplit(Split):
    """A split whose files are arrays: everything but `map` is chatdata's own."""

    arrays: tuple[dict[str, np.ndarray], ...] = ()

    def map(self, kind: str, number: int) -> np.ndarray:
        return self.arrays[number][kind]


@pytest.fixture(scope="session")
def make_split() -> Callable[..., Split]:
    """make_split(tokens of each document, masks, shards = documents of each shard, dtype of the tokens)."""

    def make(
        documents: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        shards: Sequence[int] | None = None,
        dtype: str = "<u2",
    ) -> Split:
        masks = masks if masks is not None else [[0] + [1] * (len(d) - 1) for d in documents]
        assert [*map(len, masks)] == [*map(len, documents)]
        arrays, records, first = [], [], 0
        for count in shards if shards is not None else [len(documents)]:
            lengths = [len(d) for d in documents[first : first + count]]
            tokens = np.array([i for d in documents[first : first + count] for i in d], dtype)
            mask = np.array([m for d in masks[first : first + count] for m in d], "|u1")
            offsets = np.cumsum([0, *lengths], dtype="<i8")
            arrays.append({"tokens": tokens, "mask": mask, "offsets": offsets})
            records.append({"documents": count, "tokens": len(tokens)})
            first += count
        assert first == len(documents)
        manifest = {
            "build_id": "memory",
            "stage": "sft",
            "splits": {"train": {"shards": records}},
            "tokenizer": {"special_ids": {"<|assistant_end|>": PADDING}},
        }
        return MemorySplit(Build(Path("memory"), manifest), "train", records, tuple(arrays))

    return make


@pytest.fixture(scope="session")
def golden_mid(golden_mid: Path) -> Build:
    """The mid mixture of golden/streams.json: 46,479 documents."""
    return open_build(golden_mid)


@pytest.fixture(scope="session")
def golden_sft(golden_sft: Path) -> Build:
    """The sft mixture of golden/streams.json: 22,139 documents."""
    return open_build(golden_sft)


@pytest.fixture(scope="session")
def tiny_sizes(shared) -> dict[str, int]:
    return json.loads((shared / "golden/model_tiny.json").read_text())["config"]


@pytest.fixture(scope="session")
def tiny_config(tiny_sizes) -> ModelConfig:
    """The golden model's sizes, with nanochat's rotary tables."""
    return ModelConfig(**tiny_sizes, rope_dtype="bfloat16")


@pytest.fixture(scope="session")
def tiny_weights(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "golden/model_tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_io(shared) -> dict[str, torch.Tensor]:
    """Golden ids, logits and losses; targets with our ignored value."""
    tensors = load_file(shared / "golden/model_tiny_io.safetensors")
    tensors["targets"] = tensors["targets"].masked_fill(tensors["targets"] == -1, -100)
    return tensors


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """A model with everything odd: a padded vocabulary, grouped heads."""
    return ModelConfig(sequence_len=64, vocab_size=101, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)


@pytest.fixture(scope="session")
def small_weights(small_config) -> dict[str, torch.Tensor]:
    """Randomised everywhere, padding rows too: on a fresh model, with its equal logits, any test of equality passes."""
    generator = torch.Generator().manual_seed(7)
    weights = initial_weights(small_config, seed=7)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


@pytest.fixture
def small_model(small_config, small_weights):
    return load_model(small_config, small_weights)
