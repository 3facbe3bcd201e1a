"""40 optimizer steps of nanochat's own model and optimizers, followed with ours (golden/train_curve)."""

import json

import pytest
from safetensors.torch import load_file

from chatdata.packing.epoch import STAGE_MASKS
from chattrain.loss import chunked_loss
from chattrain.model import load_model
from chattrain.optim import SCHEDULES, make_optimizers, momentum, set_step


@pytest.fixture(scope="module")
def curve(shared, tiny_config, tiny_weights):
    golden = json.loads((shared / "golden/train_curve.json").read_text())["results"]
    batches = load_file(shared / "golden/train_curve_batches.safetensors")

    def differences(stage_name: str, num_steps: int, sabotage: str = "") -> tuple[list[float], dict[str, float]]:
        """|loss − golden loss| of every step, |norm − golden norm| of every parameter at the end."""
        schedule, expected = SCHEDULES[stage_name], golden[stage_name]
        model = load_model(tiny_config, tiny_weights)
        optimizers = make_optimizers(model, lr_scale=1.0 if sabotage == "lr not at 2 %" else schedule.lr_fraction)
        found = []
        for step in range(num_steps):
            tokens, mask = batches["tokens"][step].long(), batches["mask"][step]
            inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
            if STAGE_MASKS[stage_name] == "apply":
                kept = mask[:, 1:] if sabotage != "shifted by one" else mask[:, :-1]
                targets[kept == (1 if sabotage == "mask flipped" else 0)] = -100
            if sabotage == "target dropped":
                row, column = (targets != -100).nonzero()[0]
                targets[row, column] = -100
            if sabotage == "no momentum schedule":
                set_step(optimizers, expected["lr_multiplier"][step], 0.95)
            else:
                set_step(optimizers, expected["lr_multiplier"][step], momentum(schedule, step))
            hidden, head = model(inputs), model.lm_head.weight
            if sabotage == "mean of means":
                rows = [
                    chunked_loss(h, head, y, 512) / (y != -100).sum().clamp(min=1)
                    for h, y in zip(hidden, targets, strict=True)
                ]
                loss = sum(rows) / len(rows)
            else:
                loss = chunked_loss(hidden, head, targets, 512) / (targets != -100).sum()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            found.append(abs(loss.item() - expected["losses"][step]))
        norms = {
            name: abs(parameter.detach().double().norm().item() / expected["final_param_l2"][name] - 1)
            for name, parameter in model.named_parameters()
        }
        return found, norms

    return differences


def test_mid_follows_the_golden_curve(curve):
    losses, norms = curve("mid", 40)
    assert max(losses[:8]) <= 0.02
    assert max(losses) <= 0.1
    assert max(norms.values()) <= 0.02


def test_sft_follows_the_golden_curve(curve):
    losses, norms = curve("sft", 40)
    assert max(losses) <= 1e-4
    assert max(norms.values()) <= 1e-5


@pytest.mark.parametrize(
    "sabotage", ["mask flipped", "shifted by one", "target dropped", "mean of means", "lr not at 2 %"]
)
def test_sft_curve_sees(curve, sabotage):
    assert max(curve("sft", 8, sabotage)[0]) > 1e-3


def test_mid_curve_sees_a_dropped_target_and_what_it_cannot_see(curve):
    assert max(curve("mid", 8, "target dropped")[0]) > 0.02
    # 300 steps of momentum change too little in the golden 40 for its bounds: test_optim.py has the formula
    assert max(curve("mid", 8, "no momentum schedule")[0]) < 0.2
