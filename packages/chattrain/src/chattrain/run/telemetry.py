"""What a run tells: log.jsonl first, then a progress line, TensorBoard if asked, and a picture at the end."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import torch

from chatdata.disk import write_whole
from chattrain.batches import Step
from chattrain.errors import RunError
from chattrain.model import ModelConfig, parameter_shapes
from chattrain.schedule import multiplier

if TYPE_CHECKING:
    from chattrain.loop import Job, StepResult

LOG_NAME, CURVE_NAME = "log.jsonl", "loss.png"
PLAIN_LINES = 20  # off a terminal: a progress line for each 20th part of the run

# Peak dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets, by a part of the device's name
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def open_log(out: Path, start: int) -> IO[str]:
    """log.jsonl for appending, without lines of steps that a resumed run does again, or that were cut in writing."""
    path = out / LOG_NAME
    entries = read_log(out) if path.is_file() else []
    kept = [e for e in entries if e["step"] < start or (e["kind"] == "val" and e["step"] <= start)]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return path.open("a", encoding="utf-8", buffering=1)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of log.jsonl, but for a last line without its end: one that a killed run was writing.

    Raises RunError for a damaged line, OSError where there is no log.
    """
    path, entries = out / LOG_NAME, []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunError(f"{path} line {number}: damaged, not JSON: {error}; remove the line") from None
    return entries


def log_step(
    log: IO[str], job: Job, step: Step, result: StepResult, duration_s: float, wait_s: float
) -> dict[str, Any]:
    """Write and return a step's line: kind "train"."""
    tokens_per_s = step.num_tokens / duration_s
    entry = {
        "kind": "train",
        "step": step.number,
        "loss": result.loss,
        "multiplier": multiplier(job.stage, step.number, job.num_steps),
        "tokens": step.num_tokens,
        "targets": step.num_targets,
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu": mfu(job.model.config, job.plan.seq_len, tokens_per_s / job.ranks.num_ranks, job.ranks.device),
        "memory_bytes": peak_memory(job.ranks.device),
        "data_wait_share": round(wait_s / duration_s, 5),
        "gradient_norm": result.gradient_norm,
        "batch": result.digest,
    }
    if result.skipped:
        entry["skipped"] = True
    log.write(json.dumps(entry) + "\n")
    return entry


def log_evaluation(log: IO[str], step: int, result: dict[str, Any], duration_s: float) -> None:
    """Write a validation's line: kind "val", after `step` steps."""
    entry = {"kind": "val", "step": step, "bits_per_byte": result["total"], "tasks": result["tasks"]}
    log.write(json.dumps({**entry, "bytes": result["bytes"], "duration_s": round(duration_s, 3)}) + "\n")
    click.echo(f"step {step}: validation {result['total']:.4f} bits per byte", err=True)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward: 6 per matrix weight, 12 · layers · width · T for attention (counted full, not causal).

    The embedding is a look-up and does not count (karpathy/nanochat@790f3be:nanochat/gpt.py, after PaLM, appendix B).
    """
    shapes = parameter_shapes(config)
    weights = sum(rows * columns for name, (rows, columns) in shapes.items() if name != "transformer.wte.weight")
    return 6 * weights + 12 * config.n_layer * config.n_embd * seq_len


def mfu(config: ModelConfig, seq_len: int, tokens_per_s: float, device: torch.device) -> float | str:
    """Share of the device's peak bf16 arithmetic, or "unknown". Tokens are the plan's: padding is not work done."""
    if device.type != "cuda":
        return "unknown"
    name = torch.cuda.get_device_name(device)
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    return "unknown" if peak is None else round(flops_per_token(config, seq_len) * tokens_per_s / peak, 4)


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation on cuda, else the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@contextmanager
def progress(job: Job, end: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callback for each step's log entry: a bar on a terminal, plain lines otherwise; TensorBoard if asked."""
    writer = _tensorboard(job.settings.out) if job.settings.tensorboard and job.ranks.is_first else None
    every = max(1, (end - job.start) // PLAIN_LINES)

    def describe(entry: dict[str, Any]) -> str:
        return f"loss {entry['loss']:.4f} · {entry['tokens_per_s']:,.0f} tokens/s"

    with click.progressbar(
        length=end - job.start,
        label=job.stage.name,
        file=sys.stderr,
        show_pos=True,
        item_show_func=lambda entry: describe(entry) if entry else "",
        hidden=not (job.ranks.is_first and sys.stderr.isatty()),
    ) as bar:

        def show(entry: dict[str, Any]) -> None:
            bar.update(1, entry)
            step = entry["step"] + 1
            if not sys.stderr.isatty() and ((step - job.start) % every == 0 or step == end):
                click.echo(f"step {step} of {end}: {describe(entry)}", err=True)
            if writer is not None:
                for key in ("loss", "multiplier", "tokens_per_s", "gradient_norm"):
                    writer.add_scalar(key, entry[key], entry["step"])

        yield show
    if writer is not None:
        writer.close()


def _tensorboard(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))


def draw_curve(out: Path) -> Path | None:
    """loss.png from log.jsonl: training loss, and validation bits per byte where it was measured; None without
    matplotlib (`chattrain[plot]`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = read_log(out)
    train = [entry for entry in entries if entry["kind"] == "train"]
    val = [entry for entry in entries if entry["kind"] == "val"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [entry["step"] for entry in train], [entry["loss"] for entry in train]
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="loss of each step")
    axes.plot(steps, _smooth(losses), color="#1f4e89", linewidth=1.6, label="smoothed")
    axes.set(xlabel="step", ylabel="loss (nats per target)", title=out.name)
    if val:
        right = axes.twinx()
        right.plot([e["step"] for e in val], [e["bits_per_byte"] for e in val], "o-", color="#c8553d", markersize=4)
        right.set_ylabel("validation (bits per byte)", color="#c8553d")
    axes.legend()
    figure.savefig(out / CURVE_NAME, dpi=110)
    return out / CURVE_NAME


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average without bias at the start."""
    smoothed, average, total = [], 0.0, 0.0
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        smoothed.append(average / total)
    return smoothed
