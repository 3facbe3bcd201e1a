"""The golden builds, and models with all weights random (see also tests/conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatdata.shards.read import Build, open_build
from chattrain.model import ModelConfig, initial_weights, load_model

ROOT = Path(__file__).parents[2]


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
