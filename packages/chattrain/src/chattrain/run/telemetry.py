"""What a run writes besides its checkpoints: run.json, log.jsonl, loss.png, and its lock."""

import fcntl
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from chatdata.disk import Count, Positive, convert, decode, json_lines, naming, write_whole
from chattrain.checkpoint import FORMAT, PlanRecord, Recipe
from chattrain.errors import RunError
from chattrain.model import ModelConfig, parameter_shapes
from chattrain.run.track import open_tracker

RUN_NAME, LOG_NAME, CURVE_NAME, LOCK_NAME = "run.json", "log.jsonl", "loss.png", ".lock"

# Peak dense bf16 FLOP/s without sparsity, from NVIDIA's data sheets, by a part of the device's name
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class RunRecord(msgspec.Struct, frozen=True):
    """run.json, written before step 0."""

    data: str  # absolute path of the build, or its address
    plan: PlanRecord
    recipe: Recipe
    format: str = FORMAT
    save_every: Positive | None = None  # may be another after a resume
    # device, its name, num_ranks, device_batch_size: they may change how sums are rounded; {} of an earlier chattrain
    machine: dict[str, Any] = {}


class TrainEntry(msgspec.Struct, tag_field="kind", tag="train", omit_defaults=True, frozen=True):
    """A line of log.jsonl: a step, counted over all ranks."""

    step: Count
    loss: float  # nats per target
    multiplier: float  # of every learning rate
    tokens: Count
    targets: Count
    tokens_per_s: float
    mfu: float | str
    memory_bytes: Count
    data_wait_share: float  # of the step's duration
    gradient_norm: float
    batch: str  # see `digest_text`
    skipped: bool = False


class ValEntry(msgspec.Struct, tag_field="kind", tag="val", frozen=True):
    """A line of log.jsonl: a validation after `step` steps."""

    step: Count
    bits_per_byte: float
    tasks: dict[str, float]
    bytes: Count
    duration_s: float


Entry = TrainEntry | ValEntry


@contextmanager
def lock_run(out: Path, resume: bool = False) -> Iterator[None]:
    """Hold the run folder `out`, made if need be, against a second run. If this process dies, the system frees it.

    Raises RunError if another run holds the folder or, without `resume`, if there is anything in it. A folder in which
    nothing was written is removed again.
    """

    def require_empty() -> None:
        if not resume and out.exists() and any(path.name != LOCK_NAME for path in out.iterdir()):
            raise RunError(f"{out}: already exists; choose another --out, or --resume to continue the run")

    require_empty()
    made, lock = not out.exists(), out / LOCK_NAME
    out.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # its run removed it, after we opened it
                raise BlockingIOError
        except BlockingIOError:
            raise RunError(f"{out}: another run is writing there; wait for it, or choose another --out") from None
        try:
            require_empty()  # a run may have come and gone since
            yield
        finally:
            if made and [path.name for path in out.iterdir()] == [LOCK_NAME]:
                lock.unlink()
                out.rmdir()


def write_run(out: Path, record: RunRecord) -> None:
    text = json.dumps(msgspec.to_builtins(record), indent=1, sort_keys=True) + "\n"
    write_whole(out / RUN_NAME, text.encode())


def read_run(run: Path) -> RunRecord:
    """What `write_run` wrote. Raises RunError."""
    try:
        data = (run / RUN_NAME).read_bytes()
    except OSError as error:
        raise RunError(f"{run}: not a run folder: no readable {RUN_NAME}; give the --out of a chattrain run") from error
    return decode(data, RunRecord, str(run / RUN_NAME), RunError)


@contextmanager
def open_log(out: Path, start: int, tracker: str | None, is_first: bool) -> Iterator[Callable[[Entry], None]]:
    """Yield a function that appends to log.jsonl and, at a validation, draws loss.png; on other ranks it does nothing.

    Lines of steps that a resumed run does again, and a last line cut by a kill, are removed first. A `tracker` gets all
    lines, too. Raises RunError.
    """
    if not is_first:
        yield lambda entry: None
        return
    path = out / LOG_NAME
    known = read_log(out)
    # validation at step 0 is done again
    kept = [e for e in known if e.step < start or (isinstance(e, ValEntry) and 0 < e.step == start)]
    past = msgspec.to_builtins(kept)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in past).encode())
    run = msgspec.to_builtins(read_run(out)) if tracker else {}
    sending = open_tracker(tracker, out, run, past) if tracker else nullcontext(lambda line: None)
    with naming(out), sending as send, path.open("a", encoding="utf-8", buffering=1) as file:

        def write(entry: Entry) -> None:
            line = msgspec.to_builtins(entry)
            file.write(json.dumps(line) + "\n")
            send(line)
            if isinstance(entry, ValEntry):
                draw_curve(out)

        yield write


def read_log(out: Path) -> list[Entry]:
    """The entries of log.jsonl, if there is one, without a last line that a killed run did not finish.

    Raises RunError for a damaged line.
    """
    entries, path = [], out / LOG_NAME
    for where, value in json_lines(path, RunError, ": damaged, remove the line") if path.is_file() else ():
        kind = ValEntry if isinstance(value, dict) and value.get("kind") == "val" else TrainEntry
        entries.append(convert(value, kind, where, RunError))
    return entries


def digest_text(total: int) -> str:
    """A step's hash as logged, from the sum of its ranks' digests (which may wrap around in 64 bits)."""
    return f"{total % 2**64:016x}"


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward: 6 per matrix weight, 12 · layers · width · T for attention (counted full, not causal).

    The embedding is a look-up and does not count (karpathy/nanochat@790f3be:nanochat/gpt.py, after PaLM, appendix B).
    """
    shapes = parameter_shapes(config)
    weights = sum(rows * columns for name, (rows, columns) in shapes.items() if name != "transformer.wte.weight")
    return 6 * weights + 12 * config.n_layer * config.n_embd * seq_len


def mfu(config: ModelConfig, seq_len: int, tokens_per_s: float, device: torch.device) -> float | str:
    """Share of the device's peak bf16 arithmetic, or "unknown". Padding does not count as work."""
    name = device_name(device)
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    return "unknown" if peak is None else round(flops_per_token(config, seq_len) * tokens_per_s / peak, 4)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation on cuda, else the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def draw_curve(out: Path) -> Path | None:
    """loss.png from log.jsonl: training loss, and bits per byte of validation, in all and per task, if there are any.

    Returns None without matplotlib (the extra `plot`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = read_log(out)
    train = [entry for entry in entries if isinstance(entry, TrainEntry)]
    val = [entry for entry in entries if isinstance(entry, ValEntry)]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [entry.step for entry in train], [entry.loss for entry in train]
    smoothed, average, total = [], 0.0, 0.0  # an exponential average without bias at the start
    for loss in losses:
        average, total = 0.9 * average + 0.1 * loss, 0.9 * total + 0.1
        smoothed.append(average / total)
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, label="loss of each step")
    axes.plot(steps, smoothed, color="#1f4e89", linewidth=1.6, label="smoothed")
    axes.set(xlabel="step", ylabel="loss (nats per target)")
    axes.set_title(out.name.encode("utf-8", "backslashreplace").decode(), parse_math=False)
    if val:
        right, steps = axes.twinx(), [entry.step for entry in val]
        for name in val[-1].tasks:
            shown = name.replace("$", r"\$")  # no formula
            right.plot(steps, [e.tasks.get(name) for e in val], ".-", lw=1, label=f"validation: {shown}")
        right.plot(steps, [e.bits_per_byte for e in val], "o-", color="#c8553d", markersize=4, label="validation: all")
        right.set_ylabel("validation (bits per byte)", color="#c8553d")
    figure.legend(loc="outside right upper", fontsize="small")
    drawn = out / f".{CURVE_NAME}"
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.replace(out / CURVE_NAME)
