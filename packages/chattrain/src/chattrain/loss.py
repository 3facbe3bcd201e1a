"""Cross-entropy over target positions without holding all logits at once. Shapes as in model.py, plus N targets.

The loss of a step is the sum over its targets ÷ their number, over all ranks and micro-batches, so these functions
return sums: a mean of micro-batch means weighs short answers more (karpathy/nanochat#59).
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chatdata.document import IGNORED
from chattrain.model import SOFTCAP, softcap

# Logits held at a time, in elements; the rows of a chunk are this ÷ V. On 2 CPU cores at V = 65,536, C = 256, chunks of
# 64 / 128 / 256 / 512 rows took 2.87 / 2.54 / 2.47 / 2.43 s for 2,048 targets: 256 rows, two buffers of 64 MiB.
# On cuda 4,096 rows at V = 65,536 are large enough for full-speed matmuls; the 1 GiB in fp32 (and as much again while
# they are worked on) would be much of the memory that mps shares with everything else.
CHUNK_ELEMENTS = {"cpu": 2**24, "mps": 2**26, "cuda": 2**28}


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_rows: int | None = None,
    compiled: bool = False,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum of cross-entropies in nats over the positions whose target is not -100; 0, with zero gradients, if all are.

    hidden: [..., C], last hidden states. weight: [vocab_rows, C], the head. targets: [...] int64, below vocab_size.
    chunk_rows: target positions whose logits are held at a time, by default as many as suit the device.
    compiled: fuse softcap, softmax and their gradient with torch.compile (for GPUs, where memory limits them).
    rows: int64 [N] on hidden's device, the flat positions with a target; None: found here, for which a GPU must wait.
    out: [N] memory for the loss of each of these positions; filled only where there are gradients.

    The head's matmuls run in hidden's dtype; softcap, softmax and sums in at least fp32 (float64 stays float64).
    Both gradients are computed with the loss, chunk by chunk while the chunk's logits are in memory, and only scaled in
    the backward pass: three head matmuls in all, as with full logits, and nothing of size N × V is kept.
    Call it outside compiled code: the number of targets differs in every batch.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return position_losses(hidden, weight, targets, vocab_size, chunk_rows, rows).sum()
    return _ChunkedLoss.apply(hidden, weight, targets, vocab_size, chunk_rows, compiled, rows, out)


@torch.no_grad()
def position_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats of every position, 0 where ignored: targets [...] → [...], at least fp32, no gradient."""
    rows, x, y = _target_rows(hidden, targets, rows)
    losses = torch.zeros(targets.numel(), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for part in _chunks(len(rows), vocab_size, hidden.device, chunk_rows):
        logits = softcap(F.linear(x[part], weight[:vocab_size].to(hidden.dtype)))
        losses[rows[part]] = F.cross_entropy(logits, y[part], reduction="none")
    return losses.view(targets.shape)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)  # hidden's dtype decides, in the loss and in its gradient
    def forward(ctx, hidden, weight, targets, vocab_size, chunk_rows, compiled, rows, out):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows, x, y = _target_rows(hidden, targets, rows)
        parts = list(_chunks(len(rows), vocab_size, hidden.device, chunk_rows))
        head = weight[:vocab_size].to(hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        x_gradient, weight_gradient = torch.empty_like(x), torch.zeros_like(weight)

        # every chunk uses the same memory: on CPU, fresh pages for each cost another 8 % of the time
        buffer_shape = (len(y[parts[0]]) if parts else 0, vocab_size)
        logits_buffer = hidden.new_empty(buffer_shape)
        weights_buffer = None if compiled else hidden.new_empty(buffer_shape, dtype=wide)
        losses_and_gradient = _compiled(_losses_and_gradient) if compiled else _losses_and_gradient
        for part in parts:
            logits = torch.mm(x[part], head.T, out=logits_buffer[: len(y[part])])
            losses, gradient = losses_and_gradient(logits, y[part], weights_buffer)
            total += losses.sum()
            if out is not None:
                out[part] = losses
            torch.mm(gradient, head, out=x_gradient[part])
            if weight_gradient.dtype == gradient.dtype:
                weight_gradient[:vocab_size].addmm_(gradient.T, x[part])
            else:  # of bf16: the sum over chunks stays in the weight's dtype
                weight_gradient[:vocab_size] += gradient.T @ x[part]

        hidden_gradient = hidden.new_zeros(hidden.shape)
        hidden_gradient.view(-1, hidden.size(-1))[rows] = x_gradient
        ctx.gradients = hidden_gradient, weight_gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.gradients
        del ctx.gradients  # scaled in place, so a second backward through the same loss must fail
        return hidden_gradient.mul_(upstream), weight_gradient.mul_(upstream), *[None] * 6


def _losses_and_gradient(logits: Tensor, targets: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uncapped logits z [n, V] (overwritten), targets [n] → losses [n], d losses / dz [n, V] in logits' dtype.

    buffer: [≥ n, V] memory. The cap is written as 15 · tanh(z / 15) = 30 σ − 15 with σ = sigmoid(2 z / 15), for
    sigmoid takes a third of tanh's time on CPU. The −15 cancels in the softmax, and 30 σ is small enough for exp
    as it is: loss = log Σ exp(30 σ) − 30 σ_target, and its gradient = (softmax − onehot) · 4 σ (1 − σ).
    """
    columns = targets[:, None]
    sigmoid = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(2 / SOFTCAP).sigmoid_()
    at_target = sigmoid.gather(1, columns) * (2 * SOFTCAP)
    weights = torch.mul(sigmoid, 2 * SOFTCAP, out=None if buffer is None else buffer[: len(logits)]).exp_()
    total = weights.sum(1, keepdim=True)
    weights.mul_(4 / total)
    if buffer is None:  # compiled: a comparison keeps all of this in one kernel, a scatter makes three
        weights = weights - 4 * (columns == torch.arange(weights.size(1), device=weights.device))
    else:
        weights.scatter_add_(1, columns, torch.full_like(total, -4.0))
    gradient = weights.mul_(sigmoid)
    gradient.addcmul_(gradient, sigmoid, value=-1)
    return (total.log() - at_target).squeeze(1), gradient.to(logits.dtype)


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # the last chunk is shorter


def _target_rows(hidden: Tensor, targets: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [..., C], targets [...] → the N flat positions with a target, their hidden states [N, C] and targets."""
    flat = targets.flatten()
    rows = (flat != IGNORED).nonzero().squeeze(1) if rows is None else rows
    return rows, hidden.reshape(-1, hidden.size(-1))[rows], flat[rows]


def _chunks(num_rows: int, vocab_size: int, device: torch.device, chunk_rows: int | None) -> Iterator[slice]:
    size = chunk_rows or max(1, CHUNK_ELEMENTS[device.type] // vocab_size)
    return (slice(start, start + size) for start in range(0, num_rows, size))
