"""The model that is scored: load it, read its logits after prompts, measure its loss on known answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from chatdata.document import IGNORED, Document
from chatdata.tokenizer.bpe import Tokenizer
from chateval.ask.kv_cache import KeyValueCache
from chateval.errors import ScoringError
from chattrain.checkpoint import read_checkpoint
from chattrain.evaluate import token_byte_counts
from chattrain.loss import position_losses
from chattrain.model import GPT, ModelConfig, load_model
from chattrain.nanochat.export import BY_VOCABULARY, is_export, read_export


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its tokenizer, ready to answer."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype  # of activations; weights are fp32
    weights_sha256: str  # see `hash_weights`
    label: str  # its path
    step: int | None  # None: an export does not record it

    @cached_property
    def token_byte_counts(self) -> np.ndarray:
        """Number of bytes of each id, int64 [vocab_size]; 0 for special tokens."""
        return token_byte_counts(self.tokenizer)

    @property
    def num_positions(self) -> int:
        """The longest sequence it was trained on."""
        return self.model.config.sequence_len

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """tokens [B, T] → hidden states [B, T, C] in `dtype`, without a gradient."""
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(tokens, positions=positions, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] → softcapped logits [..., V] in fp32, from fp32 rows of the head."""
        with torch.inference_mode():
            return self.model.logits(hidden.float())


def prompt_logits(subject: Subject, prompts: Sequence[Sequence[int]], cache: KeyValueCache | None = None) -> Tensor:
    """Logits [B, V] after each of B prompts. Padding is on the right, where no earlier position sees it."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    hidden = subject.hidden(tokens.to(subject.device), cache=cache)
    return subject.logits(hidden[torch.arange(len(prompts)), lengths - 1])


def gold_losses(subject: Subject, documents: Sequence[Document]) -> list[tuple[float, int]]:
    """Per document: the loss in nats of its supervised tokens, and their bytes; together they give bits per byte.

    Special tokens have no bytes and count on neither side, as in chattrain's validation.
    """
    byte_counts = subject.token_byte_counts
    width = max(len(document.tokens) for document in documents) - 1
    inputs = np.zeros((len(documents), width), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    for i, document in enumerate(documents):
        tokens = document.tokens.astype(np.int64)
        counted = (document.mask[1:] == 1) & (byte_counts[tokens[1:]] > 0)
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        targets[i, : len(tokens) - 1][counted] = tokens[1:][counted]
    hidden = subject.hidden(torch.from_numpy(inputs).to(subject.device))
    model, on_device = subject.model, torch.from_numpy(targets).to(subject.device)
    losses = position_losses(hidden.float(), model.lm_head.weight, on_device, model.config.vocab_size)
    num_bytes = byte_counts[np.maximum(targets, 0)] * (targets != IGNORED)
    return list(zip(losses.cpu().double().sum(1).tolist(), num_bytes.sum(1).tolist(), strict=True))


def load_subject(path: Path, device: torch.device, dtype: str | None = None) -> Subject:
    """Load a run folder's last checkpoint, a checkpoint, or a transformers export (see `chattrain export`).

    dtype: "float32" or "bfloat16"; by default bfloat16 on cuda, else float32.
    Raises CheckpointError, WeightsError or ConfigError of chattrain, TokenizerError, and ScoringError if model and
    tokenizer do not belong together.
    """
    from chatdata.tokenizer.files import load_tokenizer

    if is_export(path):
        config, weights = read_export(path)
        tokenizer, step = load_tokenizer(path), None
    else:
        checkpoint = read_checkpoint(path)
        config, weights, step = checkpoint.config, checkpoint.weights(), checkpoint.step
        tokenizer = checkpoint.native_tokenizer()
    if tokenizer.vocab_size != config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {config.vocab_size:,}"
        raise ScoringError(f"{path}: {sizes}; they must come from the same training run")
    digest = hash_weights(weights, config, tokenizer)
    model = load_model(config, weights, device).eval()
    activations = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    return Subject(model, tokenizer, device, activations, digest, str(path), step)


def hash_weights(weights: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer) -> str:
    """SHA-256 of everything that determines answers: sizes, the tokenizer's behaviour, every weight but padding rows.

    A checkpoint and its export have the same hash.
    """
    digest = hashlib.sha256(json.dumps([asdict(config), tokenizer.canary_sha256], sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().float()
        if name in BY_VOCABULARY:
            tensor = tensor[: config.vocab_size]
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy())
    return digest.hexdigest()
