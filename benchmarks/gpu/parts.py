"""The parts of run.sh, one per process: `parts.py PART FOLDER [--seconds N] [--toy]`. FOLDER is what prepare.sh made.

equality    golden logits, packed attention, chunked loss, draws, the cache, steps on the CPU and on the device
resume      a run that was stopped and resumed against a whole one
speed       steps at d12 and d20, stream, packed and padded: tokens/s, MFU, memory, data wait, host synchronisations
generation  a batch of 32 answers, greedy and drawn
loss        the chunked loss, eager and compiled, against cut-cross-entropy if that is installed

Each result is a line `| part | what | result |`. A check that fails prints FAILED and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend

from chatdata.shards.read import open_build
from chatdata.tokenizer.files import load_tokenizer
from chattrain.attention import pack_sequences
from chattrain.loop import read_ahead, train_step
from chattrain.loss import chunked_loss
from chattrain.model import GPT, ModelConfig, initial_weights, load_model, random_config, softcap
from chattrain.run import start as run_start
from chattrain.run.settings import RunSettings
from chattrain.run.start import Ranks
from chattrain.run.telemetry import mfu, peak_memory

CPU = torch.device("cpu")
# fp32 on a GPU adds up in another order; bf16 has 8 bits of fraction
FP32, BF16 = 1e-4, 3e-2


@dataclass(frozen=True)
class Sizes:
    """What the parts measure at; `--toy` makes everything small."""

    equality: str = "2x256x2"
    seq_len: int = 512
    speed: tuple[tuple[str, str, int], ...] = (  # model, layout, device batch size: the most telling ones first
        ("d20", "stream", 32),
        ("d20", "pack", 16),
        ("d12", "stream", 32),
        ("d12", "pack", 16),
        ("d12", "pad", 16),
        ("d20", "pad", 16),
    )
    speed_seq_len: int = 2048
    warm_up: int = 3
    steps: int = 10
    generation: str = "d12"
    answers: int = 32
    new_tokens: int = 64
    targets: int = 32_768
    width: int = 1280


TOY = Sizes(
    equality="1x32x1",
    seq_len=64,
    speed=tuple(("1x32x1", layout, 2) for layout in ("stream", "pack", "pad")),
    speed_seq_len=1024,
    warm_up=1,
    steps=2,
    generation="1x32x1",
    answers=3,
    new_tokens=8,
    targets=64,
    width=32,
)


class Part:
    """Where to find things, and the lines of one part."""

    def __init__(self, name: str, folder: Path, seconds: float, sizes: Sizes) -> None:
        self.name, self.folder, self.sizes = name, folder, sizes
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
        self.end, self.failed = time.monotonic() + seconds, False

    def say(self, what: str, result: str) -> None:
        print(f"| {self.name} | {what} | {result} |")

    def check(self, what: str, difference: float, limit: float) -> None:
        ok = difference <= limit  # also not, if it is not a number
        self.failed |= not ok
        self.say(what, f"{difference:.1e}, at most {limit:.0e}: {'ok' if ok else 'FAILED'}")

    def build(self, stage: str):
        return open_build(self.folder / stage)

    def settings(self, stage: str, layout: str, model: str, batch: int, seq_len: int, **more: object) -> RunSettings:
        common = {"data": self.folder / stage, "out": Path("unused"), "init": f"random:{model}", "stage": stage}
        return RunSettings(
            **common, layout=layout, device_batch_size=batch, seq_len=seq_len, long="truncate", steps=10**6, **more
        )


def noisy_model(config: ModelConfig, device: torch.device) -> GPT:
    """Random weights everywhere: with fresh ones, which are zero in places, any comparison passes."""
    weights = initial_weights(config, 1)
    generator = torch.Generator().manual_seed(2)
    for tensor in weights.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return load_model(config, weights, device)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function: Callable[[], object], device: torch.device, runs: int = 5) -> float:
    durations = []
    for _ in range(runs + 1):  # the first one compiles and allocates
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        durations.append(1000 * (time.perf_counter() - started))
    return statistics.median(durations[1:])


def bf16(device: torch.device, on: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


# equality


def equality(part: Part) -> None:
    order = getattr(torch._C, "_get_sdp_priority_order", list)()  # cuDNN's attention or another first: it is torch's
    names = [str(SDPBackend(number)).removeprefix("SDPBackend.").lower() for number in order]
    part.say("attention kernels, first choice first", ", ".join(names) or "unknown")
    golden_logits(part)
    packed_attention(part)
    loss_and_gradients(part)
    choices(part)
    cached_positions(part)
    steps_as_on_the_cpu(part)


def golden_logits(part: Part) -> None:
    folder = part.folder / "golden"
    if not folder.is_dir():
        part.say("golden logits", "not carried")
        return
    sizes = json.loads((folder / "model_tiny.json").read_text())["config"]
    weights, golden = (load_file(folder / f"model_tiny{name}.safetensors") for name in ("", "_io"))
    for rope in ("float32", "bfloat16"):
        model = load_model(ModelConfig(**sizes, rope_dtype=rope), weights, part.device)
        expected = golden["logits_fp32_rope" if rope == "float32" else "logits_bf16_rope"]
        for half in (False, True):
            with torch.no_grad(), bf16(part.device, half):
                found = model.logits(model(golden["ids"].to(part.device)))
            what = f"golden logits, rotary tables in {rope}, {'bf16' if half else 'fp32'}: relative"
            part.check(what, relative(found, expected), BF16 if half else FP32)


def packed_attention(part: Part) -> None:
    """FlexAttention, which GPUs use, against one attention per document, which the CPU uses."""
    length, device = part.sizes.seq_len, part.device
    model = noisy_model(random_config(part.sizes.equality, 1024, length), device)
    rows = [[length // 3, 5, length // 4, 1], [length], [7] * (length // 8)]
    draw = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(1024, (len(rows), length), generator=draw).to(device) for _ in range(2))
    for half in (False, True):
        found = {}
        for form in ("split", "flex"):
            with torch.set_grad_enabled(device.type == "cuda"), bf16(device, half):  # flex has no backward on CPU
                hidden = model(tokens, pack_sequences(rows, length, device, form))
                loss = chunked_loss(hidden, model.lm_head.weight, targets, 1024)
            gradients = [torch.zeros(1)]
            if device.type == "cuda":
                gradients = torch.autograd.grad(loss, list(model.parameters()))
            found[form] = hidden.float(), torch.cat([g.flatten().float() for g in gradients])
        name, limit = ("bf16", BF16) if half else ("fp32", FP32)
        difference = relative(found["flex"][0], found["split"][0])
        part.check(f"packed attention, flex and split, {name}: hidden", difference, limit)
        if device.type == "cuda":
            difference = relative(found["flex"][1], found["split"][1])
            part.check(f"packed attention, flex and split, {name}: gradients", difference, limit)


def loss_and_gradients(part: Part) -> None:
    """The chunked loss, eager and compiled, against all logits at once, with values up in the softcap."""
    vocab, rows, width = 1000, 1024, 64
    draw = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(2, 300, width, generator=draw), 2 * torch.randn(rows, width, generator=draw)
    targets = torch.randint(vocab, (2, 300), generator=draw)
    targets[torch.rand(2, 300, generator=draw) < 0.4] = -100

    def gradients(loss: Callable, dtype: torch.dtype, **more: object) -> list[Tensor]:
        x = hidden.to(part.device, dtype, copy=True).requires_grad_()
        w = weight.to(part.device, copy=True).requires_grad_()
        value = loss(x, w, targets.to(part.device), vocab, **more)
        (value / 7).backward()
        return [value, x.grad, w.grad]

    def plain(x: Tensor, w: Tensor, y: Tensor, vocab_size: int) -> Tensor:
        logits = softcap(F.linear(x, w[:vocab_size].to(x.dtype)))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum")

    expected = gradients(plain, torch.float32)
    for compiled in (False, True) if part.device.type == "cuda" else (False,):
        for dtype, limit in ((torch.float32, FP32), (torch.bfloat16, BF16)):
            found = gradients(chunked_loss, dtype, chunk_rows=100, compiled=compiled)
            for name, a, b in zip(("value", "hidden's gradient", "head's gradient"), found, expected, strict=True):
                how = f"{'compiled' if compiled else 'eager'}, {str(dtype).removeprefix('torch.')}"
                part.check(f"chunked loss, {how}: {name}", relative(a, b), limit)


def choices(part: Part) -> None:
    """What generation chooses from equal logits, and what it draws, on the device and on the CPU."""
    from chateval.ask.generate import Prompt, Sampling, _choose, _Row

    num_rows, vocab = 64, 65_536
    ties = torch.zeros(num_rows, vocab, device=part.device)
    ties[1::2] = torch.randint(3, (num_rows // 2, vocab), generator=torch.Generator().manual_seed(5)).to(ties)
    lowest = (ties == ties.max(-1, keepdim=True).values).int().cpu().argmax(-1)
    same = int((ties.argmax(-1).cpu() == lowest).sum())
    part.say("argmax of equal logits is the lowest id", f"{same} of {num_rows} rows")
    logits = 4 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(6))
    for sampling in (Sampling(1.0), Sampling(0.8, top_k=50)):
        rows = ([_Row(Prompt([0], "", sampling), i, i, random.Random(i)) for i in range(num_rows)] for _ in range(2))
        drawn = [_choose(logits.to(device), own) for device, own in zip((CPU, part.device), rows, strict=True)]
        others = sum(a != b for a, b in zip(*drawn, strict=True))
        part.check(f"draws that differ from the CPU's, top_k {sampling.top_k}: share", others / num_rows, 0.02)


def cached_positions(part: Part) -> None:
    """Each position through the key/value cache, whose slots are read in multiples of 64, against the whole text."""
    from chateval.ask.kv_cache import KeyValueCache

    config = random_config(part.sizes.equality, 1024, 200)
    model = noisy_model(config, part.device)
    tokens = torch.randint(1024, (2, 150), generator=torch.Generator().manual_seed(7)).to(part.device)
    with torch.inference_mode():
        whole, given = model(tokens), 100
        store = KeyValueCache(config, 2, 200, part.device, torch.float32)
        found = [model(tokens[:, :given], cache=store)]
        for position in range(given, tokens.size(1)):
            positions = torch.full((2,), position, device=part.device)
            store.advance(positions, position)
            found.append(model(tokens[:, position : position + 1], positions=positions[:, None], cache=store))
    part.check("cache and whole text: hidden", relative(torch.cat(found, 1), whole), FP32)


def steps_as_on_the_cpu(part: Part) -> None:
    """Three steps of each layout in fp32: data, model, loss and optimizers together."""
    for stage, layout in (("mid", "stream"), ("sft", "pack"), ("sft", "pad")):
        settings = part.settings(stage, layout, part.sizes.equality, 2, part.sizes.seq_len, dtype="float32")
        losses, digests = [], []
        for device in (CPU, part.device):
            run = run_start.prepare(replace(settings, compile=False), part.build(stage), Ranks(0, 1, device))
            steps = read_ahead(run.plan, range(3), 0, 1, 2, device=device)
            results = [train_step(run.learner, run.recipe, run.plan, step) for step in steps]
            losses.append([result.loss for result in results])
            digests.append([result.batch for result in results])
        worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
        part.check(f"3 steps of {stage}, {layout}, on CPU and device: loss", worst, 1e-3)
        part.check(f"3 steps of {stage}, {layout}: batches that differ", float(digests[0] != digests[1]), 0)


# resume


def resume(part: Part) -> None:
    """`chattrain run` as a user calls it: compiled and in bf16 on a GPU."""
    from chattrain.cli import cli

    scratch = Path(tempfile.mkdtemp())  # in a folder that run.sh removes
    common = ["--data", part.folder / "mid", "--init", f"random:{part.sizes.equality}", "--steps", 8]
    common += ["--seq-len", part.sizes.seq_len, "--device-batch-size", 2, "--keep-last", 1]
    whole, cut = scratch / "whole", scratch / "cut"
    common.append("--json")
    for more in (["--out", whole], ["--out", cut, "--stop-at", 4], ["--out", cut, "--resume"]):
        cli.main([str(word) for word in ["run", *common, *more]], standalone_mode=False)
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (whole, cut)]
    same = [a["batch"] == b["batch"] for a, b in zip(*logs, strict=True)]
    part.check("resumed and whole run: batches that differ", float(len(same) != 8 or not all(same)), 0)
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(*logs, strict=True))
    part.check("resumed and whole run: loss", worst, 1e-3)


# speed


def speed(part: Part) -> None:
    with patch.object(run_start, "initial_weights", cache(initial_weights)):  # drawing d20's takes seconds
        for model, layout, batch in part.sizes.speed:
            what = f"{model} {layout} {batch} × {part.sizes.speed_seq_len}"
            if time.monotonic() > part.end - 30 and part.device.type == "cuda":
                part.say(what, "no time left")
                continue
            try:
                measure_steps(part, what, model, layout, batch)
            except Exception as error:  # the next ones may fit
                part.failed = True
                part.say(what, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}: FAILED")
            torch._dynamo.reset()
            if part.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def measure_steps(part: Part, what: str, model: str, layout: str, batch: int) -> None:
    stage, sizes = "mid" if layout == "stream" else "sft", part.sizes
    settings = part.settings(stage, layout, model, batch, sizes.speed_seq_len)
    started = time.perf_counter()
    run = run_start.prepare(settings, part.build(stage), Ranks(0, 1, part.device))
    ready_s, total = time.perf_counter() - started, sizes.warm_up + sizes.steps
    steps = read_ahead(run.plan, range(total + 1), 0, 1, batch, device=part.device)
    tokens_per_s, waits, durations = [], [], []
    for number in range(total):
        started = time.perf_counter()
        step = next(steps)
        wait_s = time.perf_counter() - started
        train_step(run.learner, run.recipe, run.plan, step)
        synchronise(part.device)
        duration_s = time.perf_counter() - started
        if number < sizes.warm_up:
            ready_s += duration_s
        else:
            durations.append(duration_s)
            tokens_per_s.append(step.num_tokens / duration_s)
            waits.append(wait_s / duration_s)
    rate = statistics.median(tokens_per_s)
    share = mfu(run.learner.model.config, sizes.speed_seq_len, rate, part.device)
    if part.device.type == "cuda":
        part.check(f"{what}: host synchronisations a step", synchronisations(part, run, next(steps)), 1)
    part.say(
        what,
        f"{rate:,.0f} tokens/s, MFU {share if isinstance(share, str) else f'{share:.1%}'}, "
        f"{1000 * statistics.median(durations):.0f} ms a step, {peak_memory(part.device) / 2**30:.1f} GiB, "
        f"data wait {statistics.median(waits):.1%}, ready after {ready_s:.0f} s",
    )


def synchronisations(part: Part, run: run_start.Run, step: object) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_step(run.learner, run.recipe, run.plan, step)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# generation


def generation(part: Part) -> None:
    from chateval.ask.generate import Prompt, Sampling, generate
    from chateval.ask.subject import Subject

    sizes, tokenizer = part.sizes, load_tokenizer(part.folder / "mid")
    config = random_config(sizes.generation, tokenizer.vocab_size, 1024)
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    subject = Subject(noisy_model(config, part.device).eval(), tokenizer, part.device, dtype, "", "random", None)
    split = part.build("mid")["train"]
    starts = range(sizes.answers)

    def prompts(sampling: Sampling) -> list[Prompt]:
        return [Prompt(split.tokens(start, start + 100).tolist(), str(start), sampling) for start in starts]

    list(generate(subject, prompts(Sampling(max_new_tokens=4))))
    for how, sampling in (
        ("greedy", Sampling()),
        ("drawn from the best 50", Sampling(1.0, 50)),
        ("drawn", Sampling(1.0)),
    ):
        synchronise(part.device)
        started = time.perf_counter()
        answers = generate(subject, prompts(sampling._replace(max_new_tokens=sizes.new_tokens)))
        num_tokens = sum(len(completion.tokens) for _, completion in answers)
        duration_s = time.perf_counter() - started
        part.say(
            f"{sizes.generation}, {sizes.answers} answers, {how}",
            f"{num_tokens / duration_s:,.0f} tokens/s, {1000 * duration_s / sizes.new_tokens:.1f} ms a token of all",
        )


# loss


def loss(part: Part) -> None:
    vocab, targets, width = 65_536, part.sizes.targets, part.sizes.width
    draw = torch.Generator().manual_seed(8)
    dtype = torch.bfloat16 if part.device.type == "cuda" else torch.float32
    hidden = torch.randn(targets, width, generator=draw).to(part.device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width, generator=draw)).to(part.device).requires_grad_()
    ids = torch.randint(vocab, (targets,), generator=draw).to(part.device)
    ways: dict[str, Callable[[], Tensor]] = {"eager": lambda: chunked_loss(hidden, weight, ids, vocab)}
    if part.device.type == "cuda":
        ways["compiled"] = lambda: chunked_loss(hidden, weight, ids, vocab, compiled=True)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        part.say("cut-cross-entropy", "not installed")
    else:
        ways["cut-cross-entropy"] = lambda: linear_cross_entropy(
            hidden, weight.to(dtype), ids, softcap=15.0, reduction="sum"
        )
    values = {}
    for name, way in ways.items():
        if part.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = peak_memory(part.device)

        def forward_and_backward(way: Callable[[], Tensor] = way) -> Tensor:
            hidden.grad = weight.grad = None
            value = way()
            value.backward()
            return value

        values[name] = forward_and_backward().item()
        ms = median_ms(forward_and_backward, part.device)
        gib = (peak_memory(part.device) - before) / 2**30
        part.say(f"{targets:,} targets, width {width}, {name}", f"{ms:.1f} ms, {gib:.2f} GiB")
    for name in values.keys() - {"eager"}:
        part.check(f"{name} and eager: value", abs(values[name] - values["eager"]) / values["eager"], BF16)


PARTS = (equality, resume, speed, generation, loss)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    functions = {function.__name__: function for function in PARTS}
    parser.add_argument("part", choices=functions)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="Begin nothing that ends after so many.")
    parser.add_argument("--toy", action="store_true", help="Small sizes, for a CPU.")
    given = parser.parse_args(arguments)
    part = Part(given.part, given.folder, given.seconds, TOY if given.toy else Sizes())
    name = torch.cuda.get_device_name(part.device) if part.device.type == "cuda" else "CPU"
    started = time.perf_counter()
    part.say("machine", f"{name}, torch {torch.__version__}")
    functions[given.part](part)
    part.say("took", f"{time.perf_counter() - started:.0f} s")
    return int(part.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
