"""nanochat's optimizers and their schedules: Muon for the blocks' matrices, AdamW for embedding and head.

All as in karpathy/nanochat@790f3be. Muon is our own twenty lines because torch.optim.Muon (2.9 to 2.15) always
orthogonalises in bf16. Most CPUs have no bf16 arithmetic: one step at d4 took 9.8 s on 2 cores, and takes 0.19 s in
fp32. The rest is the same in nanochat, in torch with adjust_lr_fn="original", and here:
    momentum: buffer ← lerp(buffer, gradient, 1 − m); Nesterov: update = lerp(gradient, buffer, m)
    (torch's docstring says buffer ← m · buffer + gradient; its code does the above)
    update ← Newton-Schulz, 5 steps, of update / norm; × sqrt(max(1, rows / columns)); no weight decay (torch: 0.1)

Several ranks share work and state by whole matrices: each is updated by one rank, which alone keeps its state and sends
it to the others. Gradients are the same on all ranks, so the weights are those that every rank would compute alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from chattrain.errors import WeightsError, named
from chattrain.model import GPT, Tensors

MATRIX_LR = 0.02
EMBEDDING_LR = 0.2
HEAD_LR = 0.004
REFERENCE_WIDTH = 768  # at which embedding and head rates were tuned; they scale with width^−0.5

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a, b, c of x ← a x + b (x xᵀ) x + c (x xᵀ)² x, from Keller Jordan's post
NEWTON_SCHULZ_STEPS = 5
ADAMW_WORK = 64  # of an element, where Muon's takes its matrix's shorter side: rough, for it depends on the device


class Schedule(NamedTuple):
    """How a stage moves the learning rates and Muon's momentum."""

    lr_fraction: float  # of every base learning rate, for the whole stage
    lr_constant: float  # share of the steps at the full rate, which then falls linearly to 0
    momentum: tuple[float, float]  # Muon's, from the first value to the second
    momentum_steps: int  # over this many steps


FULL = Schedule(lr_fraction=1.0, lr_constant=0.8, momentum=(0.85, 0.95), momentum_steps=300)
TUNING = Schedule(lr_fraction=0.02, lr_constant=0.0, momentum=(0.95, 0.95), momentum_steps=1)
SCHEDULES = {"base": FULL, "mid": FULL, "sft": TUNING}


def multiplier(schedule: Schedule, step: int, num_steps: int) -> float:
    """Learning-rate multiplier at step 0 … num_steps − 1. Without `lr_fraction`, which is in the base rates."""
    progress = step / num_steps
    return 1.0 if progress < schedule.lr_constant else (1.0 - progress) / (1.0 - schedule.lr_constant)


def momentum(schedule: Schedule, step: int) -> float:
    """Muon's momentum at a step."""
    start, end = schedule.momentum
    return start + (end - start) * min(step / schedule.momentum_steps, 1.0)


class Muon(Optimizer):
    """Momentum, then orthogonalised, for matrices. `lr` and `momentum` of its groups are set by `set_step`."""

    def __init__(self, groups: list[dict]) -> None:
        super().__init__(groups, {"lr": MATRIX_LR, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    of_shape[matrix.shape].append(matrix)
            for (rows, columns), matrices in of_shape.items():
                updates = torch.stack([self._momentum(matrix, group["momentum"]) for matrix in matrices])
                updates = orthogonalise(updates, torch.float32 if updates.device.type == "cpu" else torch.bfloat16)
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, rows, columns]: each U S Vᵀ → about U Vᵀ (singular values between 0.7 and 1.2) by Newton-Schulz steps.

    They are done in `dtype`, which is that of the result. On CPU, in MKL, a matrix gets the same bits in any company.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).to(dtype)  # wide: x xᵀ is the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


STATE_KEYS = {Muon: ("momentum_buffer",), AdamW: ("step", "exp_avg", "exp_avg_sq")}


def make_optimizers(model: GPT, lr_scale: float = 1.0) -> list[Optimizer]:
    """[Muon, AdamW] over all parameters. Every group keeps its `base_lr`, which `set_step` multiplies.

    lr_scale: multiplies every base rate: the stage's `lr_fraction` × the user's --lr-scale.
    """
    adam_scale = lr_scale * (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
    muon = Muon([{"params": list(model.transformer.h.parameters()), "base_lr": MATRIX_LR * lr_scale}])
    head = {"params": [model.lm_head.weight], "base_lr": HEAD_LR * adam_scale}
    embedding = {"params": [model.transformer.wte.weight], "base_lr": EMBEDDING_LR * adam_scale}
    adamw = AdamW([head, embedding], betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    optimizers: list[Optimizer] = [muon, adamw]
    set_step(optimizers, multiplier=1.0, momentum=0.95)
    return optimizers


def set_step(optimizers: list[Optimizer], multiplier: float, momentum: float) -> None:
    """Set learning rates (base × multiplier) and Muon's momentum for the next step; no other state is kept."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier
            if isinstance(optimizer, Muon):
                group["momentum"] = momentum


def owners(optimizers: list[Optimizer], num_ranks: int) -> dict[Tensor, int]:
    """Parameter → the rank that updates it: the most work first, each to the rank that has the least so far."""
    work = {
        parameter: parameter.numel() * (min(parameter.shape) if isinstance(optimizer, Muon) else ADAMW_WORK)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    owner, loads = {}, [0] * num_ranks
    for parameter in sorted(work, key=work.__getitem__, reverse=True):
        owner[parameter] = loads.index(min(loads))
        loads[owner[parameter]] += work[parameter]
    return owner


def update(optimizers: list[Optimizer], rank: int = 0, num_ranks: int = 1) -> None:
    """One step of all optimizers; each parameter's is done by its owner. Gradients of other ranks' are set to None."""
    owner = owners(optimizers, num_ranks)
    for parameter in owner:
        if owner[parameter] != rank:
            parameter.grad = None  # no update, and no state
    for optimizer in optimizers:
        optimizer.step()
    if num_ranks > 1:
        sent = [dist.broadcast(parameter.detach(), owner[parameter], async_op=True) for parameter in owner]
        for each in sent:
            each.wait()


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """This rank's state as "parameter name/key" → tensor, ready for safetensors; empty before the first step.

    With the weights and `set_step`, these continue a run of one rank to the byte. The tensors are not copies.
    """
    return {
        name: optimizer.state[parameter][key]
        for name, (parameter, optimizer, key) in _slots(model, optimizers).items()
        if parameter in optimizer.state
    }


def all_optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer], rank: int, num_ranks: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all ranks' state, one after another, on every rank; every rank must take all of them."""
    mine, owner = optimizer_tensors(model, optimizers), owners(optimizers, num_ranks)
    if num_ranks == 1:
        yield from mine.items()
        return
    dist.broadcast(has_state := torch.tensor(len(mine)), 0)  # rank 0 owns the first one
    for name, (parameter, _, key) in _slots(model, optimizers).items() if has_state else ():
        tensor = mine.get(name, parameter.new_empty(() if key == "step" else parameter.shape))
        dist.broadcast(tensor, owner[parameter])
        yield name, tensor


def load_optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer], tensors: Tensors, rank: int = 0, num_ranks: int = 1
) -> None:
    """Restore this rank's share of what `optimizer_tensors` of one rank, or `all_optimizer_tensors`, returned.

    Raises WeightsError for unknown or missing names and wrong shapes.
    """
    slots, owner = _slots(model, optimizers), owners(optimizers, num_ranks)
    if tensors and set(tensors) != set(slots):
        unknown, missing = named(set(tensors) - set(slots)), named(set(slots) - set(tensors))
        raise WeightsError(f"optimizer state: unknown tensors {unknown}, missing tensors {missing}")
    for name, tensor in tensors.items():
        parameter, _, key = slots[name]
        if tensor.shape != (shape := () if key == "step" else parameter.shape):
            raise WeightsError(f"optimizer state: {name} has shape {tuple(tensor.shape)}, must be {tuple(shape)}")
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter, optimizer, key = slots[name]
        if owner[parameter] == rank:
            optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _slots(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, tuple[nn.Parameter, Optimizer, str]]:
    """For each "parameter name/key": its parameter, optimizer and key: optimizer.state[parameter][key]."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": (parameter, optimizer, key)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key in STATE_KEYS[type(optimizer)]
    }
