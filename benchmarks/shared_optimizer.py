"""What sharing the optimizer among ranks is worth: its share of a step at d4, shared and with every rank doing all.

    uv run python benchmarks/shared_optimizer.py [--ranks 4] [--rows 1] [--length 512] [--steps 5]

One process per rank on this machine's CPU, one thread each; the two ways alternate from step to step, medians of the
slowest rank. CPU time is that of all ranks: on fewer cores than ranks, wall time mostly shows how they wait.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial


def measure(rows: int, length: int, steps: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from chattrain.loss import chunked_loss
    from chattrain.model import initial_weights, load_model, random_config
    from chattrain.optim import make_optimizers, optimizer_tensors, update

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    config = random_config("d4", vocab_size=65536, sequence_len=length)
    model = load_model(config, initial_weights(config, seed=0))
    called = DistributedDataParallel(model, gradient_as_bucket_view=True)
    sides = {"shared": (make_optimizers(model), rank, num_ranks), "alone": (make_optimizers(model), 0, 1)}
    generator = torch.Generator().manual_seed(rank)
    for number in range(2 * (steps + 1)):  # the first of each is for warming up
        side = ("alone", "shared")[number % 2]
        tokens = torch.randint(65536, (rows, length + 1), generator=generator)
        dist.barrier()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = chunked_loss(called(tokens[:, :-1]), model.lm_head.weight, tokens[:, 1:], config.vocab_size)
        (loss / (rows * length)).backward()
        dist.barrier()
        optimizer, cpu_optimizer = time.perf_counter(), time.process_time()
        update(*sides[side])
        dist.barrier()
        ended, cpu_ended = time.perf_counter(), time.process_time()
        model.zero_grad(set_to_none=True)
        state = sum(tensor.nbytes for tensor in optimizer_tensors(model, sides[side][0]).values()) / 2**20
        figures = {"step_s": ended - started, "optimizer_s": ended - optimizer, "state_mib": state}
        figures |= {"step_cpu_s": cpu_ended - cpu_started, "optimizer_cpu_s": cpu_ended - cpu_optimizer}
        if number > 1:
            print(json.dumps({"side": side, "number": number} | figures), flush=True)
    dist.destroy_process_group()


def median_of_steps(steps: list[list[dict[str, float]]], key: str, over_ranks: Callable) -> float:
    return statistics.median(over_ranks(line[key] for line in step) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 4), ("rows", 1), ("length", 512), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args.rows, args.length, args.steps)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(args.ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env=os.environ | where | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(args.ranks)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [json.loads(line) for output in outputs for line in output.splitlines()]
    print(f"d4, 65,536 entries, {args.ranks} ranks × {args.rows} × {args.length} tokens, fp32, one thread a rank")
    for side in ("alone", "shared"):
        of_side = [line for line in lines if line["side"] == side]
        numbers = {line["number"] for line in of_side}
        by_step = [[line for line in of_side if line["number"] == number] for number in numbers]
        median = partial(median_of_steps, by_step)
        step_s, optimizer_s = median("step_s", max), median("optimizer_s", max)
        step_cpu_s, optimizer_cpu_s = median("step_cpu_s", sum), median("optimizer_cpu_s", sum)
        print(
            f"{side:6}  step {step_s:.2f} s, optimizer {optimizer_s:.2f} s ({optimizer_s / step_s:.0%})   "
            f"CPU time of all ranks: step {step_cpu_s:.2f} s, optimizer {optimizer_cpu_s:.2f} s "
            f"({optimizer_cpu_s / step_cpu_s:.0%})   state at most {median('state_mib', max):.0f} MiB a rank"
        )


if __name__ == "__main__":
    main()
