import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chattrain.errors import ExportError, VerifyError, WeightsError
from chattrain.model import initial_weights
from chattrain.nanochat.export import export_transformers, read_export, verify_export

BOS, ASSISTANT_END = 92, 96
IDS = {"bos_id": BOS, "assistant_end_id": ASSISTANT_END}

transformers = pytest.importorskip("transformers", minversion="5", reason="compares with transformers: uv sync")


@pytest.fixture
def exported(tmp_path, small_config, small_weights):
    """An export that was not verified, to be verified after something was done to it."""
    export_transformers(small_weights, small_config, tmp_path / "out", **IDS, verify=False)
    return tmp_path / "out"


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_export_and_verify(tmp_path, small_config, small_weights):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "token_bytes.npy"):
        (tokenizer / name).write_text(name)
    out = tmp_path / "folder" / "out"
    export_transformers(small_weights, small_config, out, **IDS, tokenizer_dir=tokenizer, verify=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(out.parent.iterdir()) == [out]  # nothing left beside it
    assert verify_export(out, small_weights, small_config, **IDS) <= 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["rms_norm_eps"] == 1.1920928955078125e-07
    assert config["intermediate_size"] == 256
    assert config["eos_token_id"] == [ASSISTANT_END, BOS]
    assert config["pad_token_id"] is None
    assert load_file(out / "model.safetensors")["lm_head.weight"].shape == (101, 64)


def test_the_golden_model_verifies(tmp_path, tiny_config, tiny_weights):
    export_transformers(
        tiny_weights, replace(tiny_config, rope_dtype="float32"), tmp_path / "out", bos_id=1, assistant_end_id=2
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-6),
        ("intermediate_size", 8192),
        ("num_hidden_layers", 1),
        ("num_key_value_heads", 4),
        ("max_position_embeddings", 2048),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),
        ("final_logit_softcapping", 30.0),
        ("pad_token_id", 0),
        ("eos_token_id", BOS),
        ("tie_word_embeddings", True),
        ("hidden_act", "silu"),
    ],
)
def test_verify_sees_a_wrong_config(exported, small_config, small_weights, field, value):
    edit_config(exported, **{field: value})
    with pytest.raises(VerifyError):
        verify_export(exported, small_weights, small_config, **IDS)


def test_an_export_is_read_back(exported, small_config, small_weights):
    config, weights = read_export(exported)
    assert config == small_config and weights.keys() == small_weights.keys()
    for name, tensor in weights.items():
        kept = slice(101) if name in ("transformer.wte.weight", "lm_head.weight") else slice(None)
        assert torch.equal(tensor[kept], small_weights[name][kept]) and tensor.shape == small_weights[name].shape
    assert not weights["lm_head.weight"][101:].any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rms_norm_eps", 1e-6, r"out/config.json: rms_norm_eps is 1e-06, must be 1\.1920928955078125e-07"),
        ("model_type", "llama", "out/config.json: model_type is 'llama', must be 'nanochat'"),
        ("hidden_size", "64", "out: not an export of chattrain: ConfigError model config: n_embd is '64', must be"),
        ("num_attention_heads", 3, "out: not an export of chattrain: ConfigError model config: n_embd 64 must be"),
    ],
)
def test_another_model_is_not_read(exported, field, value, message):
    edit_config(exported, **{field: value})
    with pytest.raises(ExportError, match=message):
        read_export(exported)


def test_verify_sees_a_field_left_to_its_default(exported, small_config, small_weights):
    config = json.loads((exported / "config.json").read_text())
    del config["rms_norm_eps"]
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=r"rms_norm_eps is 1e-06, must be 1\.1920928955078125e-07"):
        verify_export(exported, small_weights, small_config, **IDS)


def test_verify_sees_wrong_generation_ids(exported, small_config, small_weights):
    (exported / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": 3}))
    with pytest.raises(VerifyError, match=r"GenerationConfig\.eos_token_id is 3"):
        verify_export(exported, small_weights, small_config, **IDS)


def transposed(weights):
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].T


def heads_swapped(weights):
    weights["lm_head.weight"][[3, 4]] = weights["lm_head.weight"][[4, 3]]


def left_out(weights):
    del weights["model.layers.0.mlp.fc2.weight"]


def one_too_many(weights):
    weights["model.resid_lambdas"] = torch.ones(2)


@pytest.mark.parametrize("change", [transposed, heads_swapped, left_out, one_too_many])
def test_verify_sees_wrong_weights(exported, small_config, small_weights, change):
    edit_weights(exported, change)
    with pytest.raises(VerifyError, match=r"arg-max are others|missing keys|unexpected keys"):
        verify_export(exported, small_weights, small_config, **IDS)


def test_verify_sees_kept_padding_rows(exported, small_config, small_weights):
    def keep(weights):
        weights["lm_head.weight"] = small_weights["lm_head.weight"].clone()
        weights["model.embed_tokens.weight"] = small_weights["transformer.wte.weight"].clone()

    edit_weights(exported, keep)
    with pytest.raises(VerifyError):  # shapes against the config
        verify_export(exported, small_weights, small_config, **IDS)
    edit_config(exported, vocab_size=128)
    with pytest.raises(VerifyError, match="vocab_size is 128, must be 101"):
        verify_export(exported, small_weights, small_config, **IDS)


def test_nothing_is_left_behind_by_a_failed_verification(tmp_path, small_config):
    with pytest.raises(VerifyError, match="all logits are equal"):
        export_transformers(initial_weights(small_config, 0), small_config, tmp_path / "out", **IDS)
    assert list(tmp_path.iterdir()) == []


def test_verify_refuses_bf16_tables(tmp_path, small_config, small_weights):
    config = replace(small_config, rope_dtype="bfloat16")
    with pytest.raises(VerifyError, match="rotary tables are bfloat16"):
        export_transformers(small_weights, config, tmp_path / "out", **IDS)
    assert not (tmp_path / "out").exists()
    export_transformers(small_weights, config, tmp_path / "out", **IDS, verify=False)
    with pytest.raises(VerifyError, match="rotary tables are bfloat16"):
        verify_export(tmp_path / "out", small_weights, config, **IDS)


def test_verify_without_transformers_says_so(tmp_path, small_config, small_weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VerifyError, match="transformers is not installed"):
        export_transformers(small_weights, small_config, tmp_path / "out", **IDS)
    export_transformers(small_weights, small_config, tmp_path / "out", **IDS, verify=False)


def test_export_refuses(tmp_path, small_config, small_weights):
    def export(weights=small_weights, out="out", **kwargs):
        export_transformers(weights, small_config, tmp_path / out, **(IDS | {"verify": False} | kwargs))

    with pytest.raises(ExportError, match="bos id 101 is not in the vocabulary of 101"):
        export(bos_id=101)
    with pytest.raises(WeightsError, match="tensors missing"):
        export({})
    with pytest.raises(ExportError, match=r"no tokenizer\.json in"):
        export(tokenizer_dir=tmp_path)
    export()
    with pytest.raises(ExportError, match="is not an empty folder"):
        export()
