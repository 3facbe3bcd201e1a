import json
import pickle

import pytest
import torch

from chattrain.errors import ConfigError, ImportNanochatError, WeightsError
from chattrain.model import load_model
from chattrain.nanochat.checkpoints import import_nanochat

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


@pytest.fixture
def write(tmp_path, small_config, small_weights):
    """Writes model_<step>.pt and meta_<step>.json as nanochat does, with changes."""

    def checkpoint(step=650, changes=None, drop=(), prefix="", meta_changes=None, sizes=None, meta_file_step=None):
        weights = {k: v for k, v in (small_weights | (changes or {})).items() if k not in drop}
        torch.save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / f"model_{step:06d}.pt")
        config = {name: getattr(small_config, name) for name in SIZES} | (sizes or {})
        meta = {"step": step, "val_bpb": 0.5, "model_config": config} | (meta_changes or {})
        name = f"meta_{meta_file_step if meta_file_step is not None else step:06d}.json"
        (tmp_path / name).write_text(json.dumps(meta))
        return tmp_path

    return checkpoint


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_import(write, small_config, small_weights, prefix):
    write(step=99)
    embedding = small_weights["transformer.wte.weight"].bfloat16()  # as nanochat keeps it on a GPU
    weights, config, step = import_nanochat(write(prefix=prefix, changes={"transformer.wte.weight": embedding}))
    assert (config, step) == (small_config, 650)
    assert weights.keys() == small_weights.keys()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert torch.equal(weights["transformer.wte.weight"], embedding.float())
    assert torch.equal(weights["lm_head.weight"], small_weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"changes": {"resid_lambdas": torch.ones(2)}},
            ImportNanochatError,
            r"model_000650\.pt, tensor resid_lambdas: scaled residuals, so it is of nanochat's architecture since "
            r"January 2026; chattrain has the one of December 2025 \(790f3be\)$",
        ),
        (
            {"changes": {"transformer.h.0.attn.ve_gate.weight": torch.ones(2)}},
            ImportNanochatError,
            r"tensor transformer\.h\.0\.attn\.ve_gate\.weight: gated value embeddings, so it is of",
        ),
        ({"changes": {"bias": torch.ones(2)}}, WeightsError, r"model_000650\.pt: unknown tensors bias"),
        ({"drop": ["lm_head.weight"]}, WeightsError, r"tensors missing: lm_head\.weight"),
        (
            {"changes": {"lm_head.weight": torch.ones(102, 64)}},
            WeightsError,
            r"has shape \(102, 64\), must be \(128, 64\)",
        ),
        ({"sizes": {"n_layer": 3}}, WeightsError, r"tensors missing: transformer\.h\.2"),
        (
            {"sizes": {"window_pattern": "SSSL"}},
            ImportNanochatError,
            r"meta_000650\.json, key window_pattern: sliding windows of attention, so it is of nanochat's architecture "
            "since January 2026",
        ),
        ({"sizes": {"n_experts": 3}}, ConfigError, r"meta_000650\.json: unknown model config keys n_experts"),
        ({"meta_changes": {"step": 649}}, ImportNanochatError, "says step 649, its name says 650"),
        ({"meta_file_step": 651}, ImportNanochatError, "last model is of step 650, the last meta file of step 651"),
        (
            {"meta_changes": {"model_config": None}},
            ImportNanochatError,
            r'meta_000650\.json, key "model_config": must be a table, not null',
        ),
    ],
)
def test_refused_by_name(write, arguments, error, message):
    with pytest.raises(error, match=message):
        import_nanochat(write(**arguments))


def test_a_checkpoint_of_chat_rl(write, small_config, small_weights):
    """Its meta file has nothing but the model's config: the step is in the name."""
    folder = write(step=466)
    config = {name: getattr(small_config, name) for name in SIZES}
    (folder / "meta_000466.json").write_text(json.dumps({"model_config": config}))
    weights, config, step = import_nanochat(folder)
    assert (config, step) == (small_config, 466)
    assert torch.equal(weights["lm_head.weight"], small_weights["lm_head.weight"])


def test_a_vocabulary_that_nanochat_did_not_pad(write, small_config, small_weights):
    names = ("transformer.wte.weight", "lm_head.weight")
    weights, config, _ = import_nanochat(write(changes={name: small_weights[name][:101] for name in names}))
    assert (config.vocab_size, config.vocab_rows) == (101, 128)
    for name in names:
        assert weights[name].shape == (128, 64) and not weights[name][101:].any()
        assert torch.equal(weights[name][:101], small_weights[name][:101])
    tokens = torch.arange(20)[None]
    logits = [load_model(config, given) for given in (weights, small_weights)]
    assert torch.equal(*(model.logits(model(tokens)) for model in logits))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ImportNanochatError, match=r"no model_<step>\.pt in it"):
        import_nanochat(tmp_path)


def test_broken_files(write):
    folder = write()
    (folder / "meta_000650.json").write_text("{")
    with pytest.raises(ImportNanochatError, match="not valid JSON"):
        import_nanochat(folder)
    write()
    (folder / "model_000650.pt").write_bytes(b"half a file")
    with pytest.raises(ImportNanochatError, match="not a file of tensors only"):
        import_nanochat(folder)
    torch.save(torch.ones(3), folder / "model_000650.pt")
    with pytest.raises(ImportNanochatError, match="not a dictionary of tensors"):
        import_nanochat(folder)


class Runs:
    """Unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_else_is_unpickled(write, tmp_path):
    folder = write()
    torch.save({"lm_head.weight": Runs(tmp_path / "ran")}, folder / "model_000650.pt")
    with pytest.raises(ImportNanochatError, match="not a file of tensors only"):
        import_nanochat(folder)
    (folder / "model_000650.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    with pytest.raises(ImportNanochatError, match="not a file of tensors only"):
        import_nanochat(folder)
    assert not (tmp_path / "ran").exists()
