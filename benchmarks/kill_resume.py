"""Kill -9 a training run at random moments, over and over, and show that nothing was lost.

    uv run python benchmarks/kill_resume.py --data out/demo-mid --kills 30

A run of --steps steps saves often, and validates before its first step and after its last. It is started with
--resume, killed after a random time, and its last checkpoint is read in full, again and again; then it may finish.
Losses, batches, weights and optimizer must equal those of a run that was never killed, to the byte. The phase of each
kill is read from the folder and the log: "starting" (no line of this start yet), "training", "saving" (there is a
partial checkpoint), "writing the log" (its last line is cut).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from msgspec import to_builtins

from chattrain.checkpoint import last_checkpoint
from chattrain.run.telemetry import read_log

# validating before the first step and after the last: more often, and most kills would fall on validations
SAVE_EVERY, EVAL_EVERY = 8, 1_000_000
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # one order of every sum, so that bytes can be compared


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    options = f"--data {arguments.data} --init random:d1 --seq-len 128 --device-batch-size 4 --device cpu --resume"
    options += f" --steps {arguments.steps} --save-every {SAVE_EVERY} --eval-every {EVAL_EVERY}"
    return [sys.executable, "-m", "chattrain", "run", *options.split(), "--out", str(out)]


def log_lines(out: Path) -> list[str]:
    path = out / "log.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def phase(out: Path, written: int) -> str:
    if list((out / "checkpoints").glob(".step-*.partial")):
        return "saving"
    lines = log_lines(out)
    if not lines or (out / "log.jsonl").stat().st_mtime_ns <= written:
        return "starting"
    try:
        json.loads(lines[-1])
    except json.JSONDecodeError:
        return "writing the log"
    return "training"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="runs/kill")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, out = random.Random(arguments.seed), Path(arguments.out)
    phases: Counter[str] = Counter()
    while phases.total() < arguments.kills:
        written = (out / "log.jsonl").stat().st_mtime_ns if log_lines(out) else 0
        process = subprocess.Popen(
            command(arguments, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # most are killed at work: after the first step of this start, which comes seconds after the log is opened
        if draw.random() < 0.9:
            while process.poll() is None and not (log_lines(out) and (out / "log.jsonl").stat().st_mtime_ns > written):
                time.sleep(0.02)
            kept = len(log_lines(out))
            while process.poll() is None and len(log_lines(out)) <= kept:
                time.sleep(0.02)
        if draw.random() < 0.45:  # aimed at a save, which takes a few hundredths of a second
            while process.poll() is None and not list((out / "checkpoints").glob(".step-*.partial")):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, 1.2))
        if process.poll() is not None:
            print(f"the run finished after {phases.total()} kills: give more --steps")
            sys.exit(1)
        process.kill()
        process.wait()
        phases[now := phase(out, written)] += 1
        last = last_checkpoint(out)
        if last is not None:
            last.weights(), last.optimizer_tensors()  # readable, or this ends here
        print(f"kill {phases.total()}: {now}, last checkpoint {last.step if last else None}", flush=True)
    subprocess.run(command(arguments, out), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    alone = Path(f"{out}-alone")
    subprocess.run(command(arguments, alone), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    for name in ("model", "optimizer"):
        files = [last_checkpoint(run).path / f"{name}.safetensors" for run in (out, alone)]  # type: ignore[union-attr]
        assert files[0].read_bytes() == files[1].read_bytes(), f"{name} differs"
    keys = ("kind", "step", "loss", "batch", "gradient_norm", "bits_per_byte")
    logs = [[{key: entry.get(key) for key in keys} for entry in to_builtins(read_log(run))] for run in (out, alone)]
    assert logs[0] == logs[1], "logs differ"
    print(f"{phases.total()} kills ({dict(phases)}): weights, optimizer, losses and batches equal to the byte")


if __name__ == "__main__":
    main()
