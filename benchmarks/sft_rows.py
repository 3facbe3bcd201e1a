"""Packed sft against padded sft, in target tokens per second, side by side in one run on real lengths.

    uv run python benchmarks/sft_rows.py SFT_BUILD [--steps 4] [--repeats 3]

Sides, both at d4 with the build's vocabulary, fp32, the same optimizers:
    packed   ours: documents packed into T = 2048, attention inside each, chunked loss over target positions
    padded   karpathy/nanochat@790f3be:scripts/chat_sft.py stated plainly: 4 documents in their order, padded to the
             longest of them, all logits at once
Each repeat takes its own steps from the middle of the data; repeats of the two sides take turns, medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chatdata.shards.read import open_build
from chattrain.attention import pack_sequences
from chattrain.batches import Batch, read_step
from chattrain.loss import IGNORED, chunked_loss
from chattrain.model import GPT, initial_weights, load_model, random_config
from chattrain.nanochat.order import make_nanochat_plan
from chattrain.optim import make_optimizers

SEQ_LEN = 2048


def packed_loss(model: GPT, batch: Batch) -> torch.Tensor:
    documents = pack_sequences(batch.lengths or (), SEQ_LEN)
    return chunked_loss(model(batch.inputs, documents), model.lm_head.weight, batch.targets, model.config.vocab_size)


def padded_loss(model: GPT, batch: Batch) -> torch.Tensor:
    logits = model.logits(model(batch.inputs))
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def side(
    plan: TrainingPlan, loss_of: Callable[[GPT, Batch], torch.Tensor], num_steps: int
) -> Iterator[tuple[int, float]]:
    """(targets, seconds) of `num_steps` steps at a time."""
    vocab_size = plan.split.build.manifest["tokenizer"]["vocab_size"]
    config = random_config("d4", vocab_size, SEQ_LEN)
    model = load_model(config, initial_weights(config, seed=0))
    optimizers = make_optimizers(model, 0.02)
    number = plan.num_steps // 2
    while True:
        targets, started = 0, time.perf_counter()
        for step in range(number, number + num_steps):
            (batch,) = read_step(plan, step % plan.num_steps).batches
            num_targets = int(plan.targets_per_step[step % plan.num_steps])
            (loss_of(model, batch) / num_targets).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            targets += num_targets
        number += num_steps
        yield targets, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    split = open_build(arguments.build)["train"]
    packed = plan_epoch(split, layout="pack", mask="apply", seq_len=SEQ_LEN, step_sequences=1)
    padded = make_nanochat_plan(split, mask="apply", seq_len=SEQ_LEN, num_ranks=1, device_batch_size=4)
    # as many steps of the padded side as have about the same number of targets
    more = round(packed.targets_per_step.mean() / padded.targets_per_step.mean())
    sides = {
        "packed": side(packed, packed_loss, arguments.steps),
        "padded": side(padded, padded_loss, arguments.steps * more),
    }
    for steps in sides.values():
        next(steps)  # warm up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, steps in sides.items():
            targets, duration_s = next(steps)
            rates[name].append(targets / duration_s)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(json.dumps({**medians, "ratio": medians["packed"] / medians["padded"], "all": rates}))


if __name__ == "__main__":
    main()
