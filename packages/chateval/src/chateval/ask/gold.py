"""How surprised the model is by the row's own answer: nats and bytes, for bits per byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chatdata.document import Document
from chateval.ask.subject import Subject
from chattrain.loss import IGNORED, position_losses


def gold_losses(subject: Subject, documents: Sequence[Document]) -> list[tuple[float, int]]:
    """Per document: nats over its supervised tokens that stand for bytes, and those bytes.

    Special tokens stand for none and count on neither side, as in chattrain's validation.
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
    model = subject.model
    losses = position_losses(
        hidden.float(), model.lm_head.weight, torch.from_numpy(targets).to(subject.device), model.config.vocab_size
    )
    num_bytes = byte_counts[np.maximum(targets, 0)] * (targets != IGNORED)
    return list(zip(losses.cpu().double().sum(1).tolist(), num_bytes.sum(1).tolist(), strict=True))
