"""Batches from memory maps against the queue of tokens of nanochat's midtraining loader, side by side in one run.

    python benchmarks/batches.py BUILD [--sft BUILD]     BUILD: with a train split, e.g. the golden mid mixture

Both sides make the same micro-batches (B × T, order nanochat's for the comparison of content, stream for ours) from
documents already rendered: the queue is given each document's ids as a list, so rendering and tokenizing, which that
commit does inside its loop, cost it nothing here. Ours includes the plan's look-up, the batch's hash and the reading
thread. Repeats are interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from chatdata.packing.epoch import TrainingPlan, plan_epoch
from chatdata.shards.read import Split, open_build
from chattrain.batches import read_step
from chattrain.loop import read_ahead
from chattrain.nanochat.order import make_nanochat_plan


def queue_batches(split: Split, batch: int, seq_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A plain statement of scripts/mid_train.py's loader at karpathy/nanochat@790f3be, one rank, without rendering."""
    needed = batch * seq_len + 1
    queue: deque[int] = deque()
    scratch = torch.empty(needed, dtype=torch.int64)
    document = 0
    while True:
        while len(queue) < needed:
            queue.extend(split[document].tokens.tolist())
            document = (document + 1) % len(split)
        for i in range(needed):
            scratch[i] = queue.popleft()
        yield scratch[:-1].view(batch, seq_len).to(torch.int32), scratch[1:].view(batch, seq_len).clone()


def check_same(split: Split, batch: int, seq_len: int, num_steps: int = 3) -> None:
    """Both sides feed the same tokens, else the comparison means nothing."""
    plan = make_nanochat_plan(split, mask="ignore", seq_len=seq_len, num_ranks=1, device_batch_size=batch)
    for step, (inputs, targets) in zip(range(num_steps), queue_batches(split, batch, seq_len), strict=False):
        (ours,) = read_step(plan, step).batches
        assert torch.equal(ours.inputs, inputs.long()) and torch.equal(ours.targets, targets)


def seconds(work: Callable[[], int]) -> tuple[float, int]:
    start = time.perf_counter()
    count = work()
    return time.perf_counter() - start, count


def read_queue(split: Split, batch: int, seq_len: int, num_steps: int) -> int:
    loader = queue_batches(split, batch, seq_len)
    return sum(next(loader)[0].numel() for _ in range(num_steps))


def read_plan(plan: TrainingPlan, steps: range) -> int:
    return sum(step.num_tokens for step in read_ahead(plan, steps))


def compare(split: Split, batch: int, seq_len: int, repeats: int, queue_tokens: int) -> dict[str, float]:
    """Tokens per second of the queue, of ours in the same order, and of ours as `mid` reads."""
    check_same(split, batch, seq_len)
    sizes = {"seq_len": seq_len}
    plans = {
        "order nanochat": make_nanochat_plan(split, mask="ignore", num_ranks=1, device_batch_size=batch, **sizes),
        "stream": plan_epoch(split, layout="stream", mask="ignore", step_sequences=batch, **sizes),
    }
    num_steps = max(1, queue_tokens // (batch * seq_len))
    rates: dict[str, list[float]] = {"queue": [], **{name: [] for name in plans}}
    for repeat in range(repeats):
        duration_s, tokens = seconds(lambda: read_queue(split, batch, seq_len, num_steps))
        rates["queue"].append(tokens / duration_s)
        for name, plan in plans.items():
            # 30 times the queue's steps, other ones in each repeat: still a fraction of its time
            first = repeat * num_steps * 30 % plan.num_steps
            steps = range(first, min(first + num_steps * 30, plan.num_steps))
            duration_s, tokens = seconds(lambda plan=plan, steps=steps: read_plan(plan, steps))
            rates[name].append(tokens / duration_s)
    return {name: statistics.median(values) for name, values in rates.items()}


def other_rows(split: Split, batch: int, seq_len: int, repeats: int) -> dict[str, float]:
    """Input tokens per second of the sft row forms, mask applied."""
    rates = {}
    for rows in ("pack", "pad"):
        plan = plan_epoch(split, layout=rows, mask="apply", seq_len=seq_len, step_sequences=batch, long="truncate")
        steps = range(min(plan.num_steps, 100))
        durations = [seconds(lambda plan=plan, steps=steps: read_plan(plan, steps)) for _ in range(repeats)]
        rates[rows] = statistics.median(tokens / duration_s for duration_s, tokens in durations)
    return rates


def plan_seconds(split: Split, seq_len: int, repeats: int) -> dict[str, float]:
    """Time to plan an epoch, before step 0."""
    found = {}
    for rows, mask in (("stream", "ignore"), ("pack", "apply")):
        arguments = {"layout": rows, "mask": mask, "seq_len": seq_len, "step_sequences": 1, "long": "truncate"}
        found[f"{rows}, {mask}"] = statistics.median(
            seconds(lambda arguments=arguments: plan_epoch(split, **arguments).num_steps)[0] for _ in range(repeats)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--sft", type=Path, help="a second build, for the rates of pack and pad")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--queue-tokens", type=int, default=2**17, help="tokens the queue reads in each repeat")
    arguments = parser.parse_args()
    split = open_build(arguments.build)["train"]
    assert np.diff(split.offsets).min() > 0

    results = {"machine": f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}", "shapes": {}}
    print(f"{len(split):,} documents, {split.num_tokens:,} tokens; {results['machine']}")
    print(
        f"{'B × T':>10}  {'queue':>12}  {'order nanochat':>24}  {'stream':>24}   million tokens/s (ratio to the queue)"
    )
    for batch, seq_len in ((4, 512), (8, 512), (32, 512), (32, 2048)):
        rates = compare(split, batch, seq_len, arguments.repeats, max(arguments.queue_tokens, batch * seq_len))
        results["shapes"][f"{batch}x{seq_len}"] = rates
        ours = "  ".join(f"{rates[n] / 1e6:>14.1f} ({rates[n] / rates['queue']:>6.0f}×)" for n in list(rates)[1:])
        print(f"{batch:>4} × {seq_len:<4} {rates['queue'] / 1e6:>12.3f}  {ours}")
    sft = open_build(arguments.sft)["train"] if arguments.sft else split
    results["rows"] = other_rows(sft, 32, 2048, arguments.repeats)
    print("32 × 2048, mask applied: " + ", ".join(f"{n} {r / 1e6:.1f} M tokens/s" for n, r in results["rows"].items()))
    results["plan_s"] = plan_seconds(sft, 2048, arguments.repeats)
    print("planning an epoch: " + ", ".join(f"{name} {value:.3f} s" for name, value in results["plan_s"].items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
