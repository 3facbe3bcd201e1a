"""Causal attention over whole rows, and inside each of several documents packed into a row.

Shapes: B rows, T positions a row, H query heads, K key/value heads (H a multiple of K), D head size.

    row of T = 8      a a a b b c c c        lengths of the row: 3, 2, 3
    positions         0 1 2 0 1 0 1 2        rotary positions restart
    attention         a sees a, b sees b, c sees c, each only backwards
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chattrain.errors import AttentionError, ConfigError

AttentionForm = Literal["split", "flex"]


@dataclass  # not frozen: torch 2.9's compiler reads every field of a frozen one, and recompiles for other lengths
class PackedSequences:
    """Where the documents of packed rows begin and end. Made by `pack_sequences`.

    lengths: of every document in row order, over all B·T positions; the free end of a row counts as one document.
    positions: [B, T] int64, counting from 0 in each document.
    attention: the chosen form: (q, k, v, these documents) → as q.
    block_mask: the documents as the flex form needs them, torch's BlockMask. Importing that takes seconds.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    attention: Callable[[Tensor, Tensor, Tensor, "PackedSequences"], Tensor]
    block_mask: Any = None


def pack_sequences(
    rows: Sequence[Sequence[int]], sequence_len: int, device: torch.device | str = "cpu", form: AttentionForm = "split"
) -> PackedSequences:
    """The `documents` argument of `GPT.forward` for rows given as document lengths in positions. Do not compile it.

    rows: per row the lengths of its documents, in order; their sum is at most `sequence_len`.
    form: "split" runs one SDPA per document (any device, best on CPU: no mask, nothing computed across documents);
        "flex" is FlexAttention with a block mask (for GPUs; it has no backward on CPU, and the forward says so).
    Raises ConfigError for lengths that are not positive or do not fit, AttentionError for an unknown form.
    """
    lengths: list[int] = []
    for number, row in enumerate(rows):
        room = sequence_len - sum(row)
        if room < 0 or any(length < 1 for length in row):
            raise ConfigError(f"row {number}: document lengths {list(row)} must be positive and fit {sequence_len}")
        lengths.extend([*row, room] if room else row)
    attention = _form(form, torch.device(device).type)
    # counted on the CPU, where the lengths are, then copied once
    counts = torch.tensor(lengths)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    positions = _sent((torch.arange(len(starts)) - starts).view(len(rows), sequence_len), device)
    block_mask = _block_mask(_sent(starts.view(len(rows), sequence_len), device)) if form == "flex" else None
    return PackedSequences(tuple(lengths), positions, attention, block_mask)


def _sent(values: Tensor, device: torch.device | str) -> Tensor:
    """On a GPU from page-locked memory: a copy from other memory waits until the GPU has done all its work."""
    return (values.pin_memory() if torch.device(device).type == "cuda" else values).to(device, non_blocking=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of T positions to S: q [B, T, H, D], k and v [B, S, K, D] → as q.

    mask: [B or 1, 1, T, S], True = seen; None: causal, for T = S.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped).transpose(1, 2)


@cache
def _form(form: str, device_type: str) -> Callable[[Tensor, Tensor, Tensor, PackedSequences], Tensor]:
    """Chosen outside compiled code. Only packed rows import torch's compiler, which takes 6 s on 2 busy cores."""
    if form == "split":
        # the lengths differ in every batch, so each batch would be a new graph
        return torch.compiler.disable(_split_attention)
    if form == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        # it is a kernel only when compiled; on CPU it serves for checks, and compiling takes longer than running it
        return partial(_flex_attention, torch.compile(flex_attention) if device_type == "cuda" else flex_attention)
    raise AttentionError(f"unknown attention form {form!r}: must be 'split' (CPU) or 'flex' (GPU)")


def _split_attention(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences) -> Tensor:
    """One call per document over views of the flattened rows: 3-4 times a dense T × T mask's speed on CPU."""
    pieces = (x.reshape(1, -1, *x.shape[2:]).split(documents.lengths, dim=1) for x in (q, k, v))
    return torch.cat([sdpa(*piece) for piece in zip(*pieces, strict=True)], dim=1).view(q.shape)


def _flex_attention(flex: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences) -> Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise AttentionError("attention form 'flex' has no backward on CPU: train with 'split' there, or on a GPU")
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return flex(q, k, v, block_mask=documents.block_mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


@cache
def _block_mask_maker(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    # compiled, the B × T × T mask is never stored: 134 MB of booleans at 32 × 2048
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask


def _block_mask(starts: Tensor) -> Any:
    """starts: [B, T], where the document of each position starts, which names it."""

    def same_document_backwards(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (starts[b, i] == starts[b, j])

    batch, length = starts.shape
    make = _block_mask_maker(starts.device.type)
    return make(same_document_backwards, batch, None, length, length, device=starts.device)
