"""Our train step against a plain statement of the same step with full logits, on CPU: time and peak memory.

    OMP_NUM_THREADS=2 uv run python benchmarks/train_step.py [--rows 8] [--length 512] [--steps 3] [--repeats 3]

Three sides, each in its own process (for the peak resident memory), interleaved, medians. CPU time is given too: wall
time says little on a busy machine. Memory beyond imports is given because torch takes 200 to 530 MiB, by its build.
    ours   chunked loss with its own backward, Muon with fp32 Newton-Schulz
    full   all logits at once, then autograd; the optimizers are ours: what the loss alone is worth
    plain  that commit's step: full logits, cut to the vocabulary after the matmul, mean cross-entropy, and
           torch.optim.Muon, which orthogonalises in bf16 as nanochat's does
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SIDES = ("ours", "full", "plain")


def measure(side: str, rows: int, length: int, steps: int) -> None:
    import torch
    import torch._dynamo  # what every optimizer imports

    from chattrain.loss import chunked_loss
    from chattrain.model import initial_weights, load_model, random_config
    from chattrain.optim import make_optimizers, set_step

    imports_mib = peak_mib()
    config = random_config("d4", vocab_size=65536, sequence_len=length)
    model = load_model(config, initial_weights(config, seed=0))
    optimizers = make_optimizers(model)
    if side == "plain":
        groups = optimizers[0].param_groups
        optimizers[0] = torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="original")
    times, cpu_times = [], []
    for step in range(steps + 1):  # the first is for warming up
        tokens = torch.randint(65536, (rows, length + 1), generator=torch.Generator().manual_seed(step))
        start, cpu_start = time.perf_counter(), time.process_time()
        set_step(optimizers, 1.0, 0.95)
        hidden = model(tokens[:, :-1])
        if side == "plain":
            logits = model.lm_head(hidden)[..., : config.vocab_size].float()
            logits = 15 * torch.tanh(logits / 15)
            loss = torch.nn.functional.cross_entropy(logits.view(-1, config.vocab_size), tokens[:, 1:].flatten())
            del logits
        elif side == "full":
            loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        else:
            loss = chunked_loss(hidden, model.lm_head.weight, tokens[:, 1:], config.vocab_size) / (rows * length)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
        del hidden
    found = {
        "step_s": statistics.median(times[1:]),
        "cpu_s": statistics.median(cpu_times[1:]),
        "peak_mib": peak_mib(),
        "beyond_imports_mib": peak_mib() - imports_mib,
        "loss": loss.item(),
    }
    print(json.dumps(found))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args.side, args.rows, args.length, args.steps)
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side]
            command += [f"--{name}={getattr(args, name)}" for name in ("rows", "length", "steps")]
            found[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {side: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for side, runs in found.items()}
    ours = medians["ours"]
    print(f"d4, 65,536 entries, {args.rows} × {args.length} tokens, fp32")
    for side, median in medians.items():
        figures = "   ".join(f"{key} {value:8.2f} (ours × {value / ours[key]:.2f})" for key, value in median.items())
        print(f"{side:6} {figures}")


if __name__ == "__main__":
    main()
