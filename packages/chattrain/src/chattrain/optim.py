"""nanochat's optimizers and their schedules: Muon for the blocks' matrices, AdamW for embedding and head.

All as in karpathy/nanochat@790f3be. Muon is our own twenty lines because torch.optim.Muon (2.9 to 2.15) always
orthogonalises in bf16. Most CPUs have no bf16 arithmetic: one step at d4 took 9.8 s on 2 cores, and takes 0.19 s in
fp32. The rest is the same in nanochat, in torch with adjust_lr_fn="original", and here:
    momentum: buffer ← lerp(buffer, gradient, 1 − m); Nesterov: update = lerp(gradient, buffer, m)
    (torch's docstring says buffer ← m · buffer + gradient; its code does the above)
    update ← Newton-Schulz, 5 steps, of update / norm; × sqrt(max(1, rows / columns)); no weight decay (torch: 0.1)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class Schedule:
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
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                buffer = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(buffer, group["momentum"])
                update = orthogonalise(update, torch.float32 if update.device.type == "cpu" else torch.bfloat16)
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U S Vᵀ → about U Vᵀ (singular values between 0.7 and 1.2) by Newton-Schulz steps in `dtype`, which it returns."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).to(dtype)  # wide: x xᵀ is the smaller product
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


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


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' whole state as "parameter name/key" → tensor, ready for safetensors; empty before the first step.

    With the weights and `set_step`, these continue a run to the byte. The tensors are not copies.
    """
    return {
        f"{name}/{key}": value
        for name, parameter, optimizer in _owners(model, optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizers: list[Optimizer], tensors: Tensors) -> None:
    """Restore what `optimizer_tensors` returned. Raises WeightsError for unknown or missing names and wrong shapes."""
    slots = {
        f"{name}/{key}": (parameter, optimizer, key)
        for name, parameter, optimizer in _owners(model, optimizers)
        for key in STATE_KEYS[type(optimizer)]
    }
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
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def _owners(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter, optimizer
