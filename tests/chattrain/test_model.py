import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import chattrain.model as model_module
from chattrain.errors import ConfigError, WeightsError
from chattrain.loss import chunked_loss, position_losses
from chattrain.model import (
    ModelConfig,
    initial_weights,
    load_model,
    parameter_shapes,
    parse_config,
    random_config,
    softcap,
)

TABLES = [("float32", "logits_fp32_rope"), ("bfloat16", "logits_bf16_rope")]


def golden_difference(tiny_sizes, tiny_weights, tiny_io, rope_dtype, name) -> float:
    model = load_model(ModelConfig(**tiny_sizes, rope_dtype=rope_dtype), tiny_weights)
    with torch.no_grad():
        return (model.logits(model(tiny_io["ids"])) - tiny_io[name]).abs().max().item()


@pytest.mark.parametrize(("rope_dtype", "name"), TABLES)
def test_logits_are_the_golden_ones(tiny_sizes, tiny_weights, tiny_io, rope_dtype, name):
    assert golden_difference(tiny_sizes, tiny_weights, tiny_io, rope_dtype, name) <= 1e-5


def test_golden_logits_see_the_other_table(tiny_sizes, tiny_weights, tiny_io):
    assert golden_difference(tiny_sizes, tiny_weights, tiny_io, "float32", "logits_bf16_rope") > 1e-4
    assert golden_difference(tiny_sizes, tiny_weights, tiny_io, "bfloat16", "logits_fp32_rope") > 1e-4


def test_golden_logits_see_llamas_sign_and_a_left_out_norm(tiny_sizes, tiny_weights, tiny_io, monkeypatch):
    right = model_module.rotate
    monkeypatch.setattr(model_module, "rotate", lambda x, cos, sin: right(x, cos, -sin))
    # q and k both rotate the other way, which leaves only the sign of their distance: causal attention sees it
    assert golden_difference(tiny_sizes, tiny_weights, tiny_io, *TABLES[0]) > 1e-2
    monkeypatch.setattr(model_module, "rotate", right)
    monkeypatch.setattr(model_module, "norm", lambda x: x)
    assert golden_difference(tiny_sizes, tiny_weights, tiny_io, *TABLES[0]) > 1e-2


def test_losses_per_position_are_the_golden_ones(tiny_config, tiny_weights, tiny_io):
    model = load_model(tiny_config, tiny_weights)
    hidden, targets = model(tiny_io["ids"]), tiny_io["targets"]
    losses = position_losses(hidden, model.lm_head.weight, targets, tiny_config.vocab_size)
    assert losses.shape == targets.shape
    assert torch.allclose(losses.flatten(), tiny_io["loss_per_position"], rtol=0, atol=1e-5)
    mean = chunked_loss(hidden, model.lm_head.weight, targets, tiny_config.vocab_size) / (targets != -100).sum()
    assert abs(mean - tiny_io["loss_mean"]).item() <= 1e-5

    shifted = targets.roll(1, dims=1)  # the sabotaged twin: shifted by one
    wrong = position_losses(hidden, model.lm_head.weight, shifted, tiny_config.vocab_size).flatten()
    assert not torch.allclose(wrong, tiny_io["loss_per_position"], rtol=0, atol=1e-1)


def test_parameter_names_are_nanochats(tiny_config, tiny_weights):
    assert parameter_shapes(tiny_config) == {name: tuple(tensor.shape) for name, tensor in tiny_weights.items()}


def test_padding_rows_give_no_logits(small_config, small_model):
    assert small_config.vocab_rows == 128
    assert small_model.lm_head.weight.shape == (128, 64)
    assert small_model.logits(small_model(torch.tensor([[1, 2, 3]]))).shape == (1, 3, 101)


@pytest.mark.parametrize(
    ("given", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_softcap_is_at_least_fp32(given, expected):
    z = torch.tensor([-1e4, 0.0, 3.0], dtype=getattr(torch, given))
    capped = softcap(z)
    assert capped.dtype == getattr(torch, expected)
    assert capped.tolist() == pytest.approx([-15, 0, 15 * math.tanh(0.2)])


def test_float64_stays_float64(small_model):
    model = small_model.double()
    hidden = model(torch.tensor([[1, 2, 3]]))
    assert hidden.dtype == model.logits(hidden).dtype == torch.float64


def test_initial_weights():
    config = random_config("d4", vocab_size=1000, sequence_len=32)
    weights = initial_weights(config, seed=1)
    again, other = initial_weights(config, seed=1), initial_weights(config, seed=2)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["transformer.wte.weight"], other["transformer.wte.weight"])
    assert not any(
        weights[name].any() for name in weights if name.endswith("c_proj.weight") or name == "lm_head.weight"
    )
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(1, rel=0.02)
    assert weights["transformer.h.0.attn.c_q.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert weights["transformer.h.3.mlp.c_fc.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    model = load_model(config, weights)
    logits = model.logits(model(torch.randint(1000, (2, 8))))
    assert logits.min() == logits.max()


def test_narrow_matrices_start_smaller():
    config = ModelConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=8, n_kv_head=2, n_embd=256)
    std = initial_weights(config, seed=0)["transformer.h.0.attn.c_k.weight"].std().item()
    assert std == pytest.approx(math.sqrt(64 / 256) / math.sqrt(256), rel=0.03)


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("d1", 64, 1),
        ("d2", 128, 1),
        ("d4", 256, 2),
        ("d7", 448, 4),
        ("d12", 768, 6),
        ("d20", 1280, 10),
        ("d127", 8128, 127),
    ],
)
def test_random_config(name, width, heads):
    config = random_config(name, vocab_size=65536, sequence_len=2048)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (int(name[1:]), width, heads, heads)
    assert config.head_size <= 128


def test_random_config_by_sizes():
    config = random_config("4x128x2", vocab_size=400, sequence_len=256)
    assert config == ModelConfig(256, 400, n_layer=4, n_head=2, n_kv_head=2, n_embd=128)
    with pytest.raises(ConfigError, match="n_embd 128 must be n_head 3 × an even head size"):
        random_config("4x128x3", vocab_size=400, sequence_len=256)


@pytest.mark.parametrize("name", ["d0", "4", "d", "d-1", "d4x", "", "e4", "4x128", "0x64x1", "4x128x2x1", "d٤"])
def test_random_config_refuses(name):
    with pytest.raises(ConfigError, match="must be 'd' and the number of layers"):
        random_config(name, vocab_size=64, sequence_len=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "n_embd 64 must be n_head 3 × an even head size"),
        ({"n_kv_head": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
        ({"n_layer": 0}, "n_layer is 0, must be an integer from 1 to 1,000"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, must be an integer from 1 to 1,000"),
        ({"n_embd": 2**60}, "n_embd is 1152921504606846976, must be an integer from 1 to 16,777,216"),
        ({"vocab_size": "512"}, "vocab_size is '512'"),
        ({"rope_dtype": "float16"}, "rope_dtype is 'float16'"),
        ({"window": 5}, "unknown model config keys window"),
    ],
)
def test_config_refuses(change, message):
    sizes = {"sequence_len": 8, "vocab_size": 64, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    with pytest.raises(ConfigError, match=message):
        parse_config(sizes | change, "state.json")
    del sizes["n_embd"]
    with pytest.raises(ConfigError, match=r"state\.json: model config keys missing: n_embd"):
        parse_config(sizes, "state.json")


def test_load_model_refuses_by_name(small_config, small_weights):
    with pytest.raises(WeightsError, match=r"tensors missing: lm_head\.weight"):
        load_model(small_config, {name: t for name, t in small_weights.items() if name != "lm_head.weight"})
    with pytest.raises(WeightsError, match="unknown tensors resid_lambdas"):
        load_model(small_config, small_weights | {"resid_lambdas": torch.ones(2)})
    with pytest.raises(WeightsError, match=r"lm_head.weight has shape \(101, 64\), must be \(128, 64\)"):
        load_model(small_config, small_weights | {"lm_head.weight": small_weights["lm_head.weight"][:101]})


def test_a_model_does_not_share_memory_with_its_weights(small_config, small_weights):
    model = load_model(small_config, small_weights)
    assert model.lm_head.weight.data_ptr() != small_weights["lm_head.weight"].data_ptr()


def gradients(model, autocast: bool = False) -> dict[str, torch.Tensor]:
    tokens = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(tokens[:, :-1])
        loss = chunked_loss(hidden, model.lm_head.weight, tokens[:, 1:], 101)
    assert hidden.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert loss.dtype == torch.float32
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputing_changes_no_gradient(small_config, small_weights):
    kept = gradients(load_model(small_config, small_weights))
    again = gradients(load_model(small_config, small_weights, recompute=True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_bf16_autocast(small_config, small_weights):
    exact = gradients(load_model(small_config, small_weights))
    rounded = gradients(load_model(small_config, small_weights), autocast=True)
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_compiles_as_one_graph(small_model):
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    compiled = torch.compile(small_model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(tokens), small_model(tokens), atol=1e-6)


class AppendingCache:
    def __init__(self):
        self.layers = {}

    def update(self, layer, k, v):
        earlier = self.layers.get(layer, (k[:, :0], v[:, :0]))
        keys, values = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
        self.layers[layer] = keys, values
        new, old = k.size(1), earlier[0].size(1)
        return keys, values, torch.ones(new, old + new, dtype=torch.bool).tril(old)[None, None]


def test_cache_gives_the_same_hidden_states(small_model):
    tokens = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))
    whole, cache = small_model(tokens), AppendingCache()
    pieces = [
        small_model(tokens[:, start:stop], positions=torch.arange(start, stop), cache=cache)
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12))
    ]
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)
    late = small_model(tokens[:, 5:6], cache=cache)  # the sabotaged twin: no positions given
    assert not torch.allclose(late, whole[:, 5:6], atol=1e-3)


def test_importing_the_model_needs_torch_and_numpy_only():
    script = (
        "import sys, torch, numpy; before = set(sys.modules); import chattrain.model; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(model_module.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert set(ast.literal_eval(done.stdout)) <= {"chattrain", "torch", "numpy"}
