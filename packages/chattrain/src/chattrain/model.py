"""nanochat's model of December 2025, with its parameter names (karpathy/nanochat@790f3be:nanochat/gpt.py).

Shapes, here and in the modules around it:
    B rows (sequences) in a batch · T positions in a row · C width (n_embd) · V tokens of the vocabulary
    H query heads · K key/value heads, each shared by H / K consecutive query heads · D head size, C = H · D

    tokens [B, T] → embedding → norm → n_layer × (x + attention(norm x), then x + mlp(norm x)) → norm → hidden [B, T, C]
    hidden → head → 15 · tanh(· / 15) → logits [B, T, V]
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chattrain.attention import PackedSequences, sdpa
from chattrain.errors import ConfigError, WeightsError, named

NORM_EPS = 1.1920928955078125e-07  # float32's machine epsilon, which nanochat's eps=None means in fp32 and bf16
ROPE_THETA = 10000.0
SOFTCAP = 15.0
VOCAB_MULTIPLE = 64  # embedding and head have this many rows or a multiple: odd sizes are slow on tensor cores
MAX_HEAD_SIZE = 128
MAX_LAYERS, MAX_SIZE = 1_000, 2**24  # a config comes from a file: shapes are made of it before weights are read


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model. Raises ConfigError if they do not fit together.

    rope_dtype: "float32" is what transformers computes; "bfloat16" rounds the rotary tables as nanochat does on CPU.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    rope_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = MAX_LAYERS if name == "n_layer" else MAX_SIZE
            if name != "rope_dtype" and (type(value) is not int or not 1 <= value <= most):
                raise ConfigError(f"model config: {name} is {value!r:.60}, must be an integer from 1 to {most:,}")
        if self.rope_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"model config: rope_dtype is {self.rope_dtype!r}, must be 'float32' or 'bfloat16'")
        if self.n_embd % (2 * self.n_head):
            raise ConfigError(f"model config: n_embd {self.n_embd} must be n_head {self.n_head} × an even head size")
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"model config: n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: vocab_size padded to a multiple of 64."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parse_config(values: Mapping[str, object], where: str) -> ModelConfig:
    """A ModelConfig from a file's keys (`where` names the file). Raises ConfigError for unknown or missing keys."""
    known = {field.name for field in fields(ModelConfig)}
    if unknown := set(values) - known:
        raise ConfigError(f"{where}: unknown model config keys {named(unknown)}; known are {named(known, most=9)}")
    if missing := known - {"rope_dtype"} - set(values):
        raise ConfigError(f"{where}: model config keys missing: {named(missing)}")
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def random_config(name: str, vocab_size: int, sequence_len: int) -> ModelConfig:
    """Sizes of `random:NAME`: "dN" is nanochat's rule, "LxWxH" names layers, width and heads.

    dN: N layers, width 64 · N, the fewest heads of at most 128 each. Raises ConfigError for other names.
    """
    if given := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)x([1-9][0-9]*)", name, re.ASCII):
        depth, width, heads = map(int, given.groups())
        return ModelConfig(sequence_len, vocab_size, depth, heads, heads, width)
    depth = int(name[1:]) if re.fullmatch(r"d[0-9]+", name, re.ASCII) else 0
    if depth < 1:
        right = "must be 'd' and the number of layers, such as 'd4', or layers x width x heads, such as '4x128x4'"
        raise ConfigError(f"model size {name!r}: {right}")
    width = 64 * depth
    # halves are rotated against each other, so a head size is even (d127 would be the first odd one)
    heads = next(h for h in range(1, width) if width % (2 * h) == 0 and width // h <= MAX_HEAD_SIZE)
    return ModelConfig(sequence_len, vocab_size, depth, heads, heads, width)


Tensors = Mapping[str, Tensor]  # by name
State = tuple[ModelConfig, Tensors, Tensors]  # weights, and optimizer tensors: {} before step 0
Rotary = tuple[Tensor, Tensor]  # cos and sin of the positions, see rotary_tables


class Cache(Protocol):
    """Keys and values of earlier positions, for generation; the generating code owns the storage and the mask."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's new k, v [B, T, K, D] → all keys, all values [B, S, K, D], mask [B or 1, 1, T, S], True = seen.

        No mask: causal, if nothing came before (S = T).
        """


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without weights, in x's dtype (autocast may answer in fp32)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS).to(x.dtype)


def rotary_tables(positions: Tensor, head_size: int, dtype: torch.dtype) -> Rotary:
    """cos and sin of the rotary angles: positions [..., T] → [..., T, 1, D/2], computed in fp32, rounded to `dtype`.

    Computed in every forward: there is no buffer to move and cast, and no longest position.
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
    frequencies = 1.0 / ROPE_THETA**exponents  # in just these operations: one more rounding is 1e-4 rad at 2,000
    angles = positions[..., None, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D] rotated by −angle (the opposite of Llama's sign) on halves, not on interleaved pairs."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def softcap(z: Tensor) -> Tensor:
    """15 · tanh(z / 15), in at least fp32."""
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    return SOFTCAP * torch.tanh(z / SOFTCAP)


class Attention(nn.Module):
    """x [B, T, C] → [B, T, C]: rotated and normed queries and keys, causal over the row, the cache or each document."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, config.head_size
        key_value_width = config.n_kv_head * config.head_size
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, key_value_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, key_value_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, documents: PackedSequences | None, cache: Cache | None) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_size)) for linear in (self.c_q, self.c_k, self.c_v))
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        if cache is not None:
            y = sdpa(q, *cache.update(self.layer, k, v))
        elif documents is not None:
            y = documents.attention(q, k, v, documents)
        else:
            y = sdpa(q, k, v)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """x [B, T, C] → [B, T, C], through 4 C units with relu² as activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """x [B, T, C] → [B, T, C]: attention, then MLP, each applied to the normed stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary, documents: PackedSequences | None, cache: Cache | None) -> Tensor:
        x = x + self.attn(norm(x), rotary, documents, cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model; make it on the device "meta", where nothing is initialised. `load_model` gives it weights.

    recompute: keep only each block's input for the backward pass and compute the rest again (activation checkpointing).
    """

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # to initialise an embedding, torch would import its compiler
        embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_rows, config.n_embd), freeze=False)
        self.transformer = nn.ModuleDict({"wte": embedding, "h": blocks})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_rows, bias=False)

    def forward(
        self,
        tokens: Tensor,
        documents: PackedSequences | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """tokens [B, T] integers → normalised hidden states [B, T, C], in the autocast dtype if autocast is on.

        documents: attention and rotary positions stay inside each (see `pack_sequences`); None: causal over the row.
        positions: [T] or [B, T] rotary positions, by default the documents' own, or 0 … T − 1.
        cache: attend to earlier positions too; give the `positions` of these tokens with it, and no documents.
        """
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device) if documents is None else documents.positions
        rotary = rotary_tables(positions, self.config.head_size, getattr(torch, self.config.rope_dtype))
        x = self.transformer.wte(tokens)
        if torch.is_autocast_enabled(x.device.type):  # the stream between blocks too, as nanochat's bf16 embedding does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = norm(x)
        for block in self.transformer.h:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, documents, cache, use_reentrant=False)
            else:
                x = block(x, rotary, documents, cache)
        return norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] → softcapped logits [..., V], at least fp32, without the padding rows."""
        weight = self.lm_head.weight[: self.config.vocab_size]
        return softcap(F.linear(hidden, weight.to(hidden.dtype)))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Fresh fp32 weights, drawn on the CPU: the same for a seed on every device and rank.

    Matrices are normal with std min(1, sqrt(out / in)) / sqrt(in), the embedding with std 1. The head and the two
    output projections of a block are zero, so a fresh model gives equal logits everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        rows, columns = shape
        if name == "lm_head.weight" or name.endswith("c_proj.weight"):
            weights[name] = torch.zeros(shape)
        else:
            std = 1.0 if name == "transformer.wte.weight" else min(1.0, (rows / columns) ** 0.5) / columns**0.5
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights


def check_weights(weights: Tensors, config: ModelConfig, where: str) -> None:
    """Raise WeightsError unless `weights` are exactly the model's, by name and shape (`where` names their source)."""
    shapes = parameter_shapes(config)
    if unknown := set(weights) - set(shapes):
        raise WeightsError(f"{where}: unknown tensors {named(unknown)}: must be nanochat's model of December 2025")
    if missing := set(shapes) - set(weights):
        raise WeightsError(f"{where}: tensors missing: {named(missing)}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise WeightsError(f"{where}: {name} has shape {tuple(weights[name].shape)}, must be {shape}")


def load_model(
    config: ModelConfig, weights: Tensors, device: torch.device | str = "cpu", recompute: bool = False
) -> GPT:
    """A model holding a copy of `weights` in fp32. Raises WeightsError for unknown, missing, wrongly shaped tensors."""
    check_weights(weights, config, "model weights")
    with torch.device("meta"):
        model = GPT(config, recompute)
    copies = {name: tensor.detach().to(device, torch.float32, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model
